"""A model over several ranks: processes that `mlx.launch` starts, on one Mac or on several."""
