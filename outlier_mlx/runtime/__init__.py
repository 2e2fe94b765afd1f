"""What runs a tier: an mlx-lm model whose MoE layers keep their experts at 1.6 bits a weight.

These modules are also joined into the `outlier_moe.py` of every tier, so they import only MLX,
mlx-lm, the standard library, and each other by `from .module import name`.
"""
