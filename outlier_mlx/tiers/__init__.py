"""What ships: turning an overlay and its base into a tier, an ordinary MLX model folder."""
