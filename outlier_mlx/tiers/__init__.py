"""Tiers: an overlay and its base as one MLX model folder."""
