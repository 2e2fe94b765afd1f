"""Outlier models in MLX: an int4 base plus ternary experts at 1.6 bits a weight."""

__version__ = "0.1.0"
