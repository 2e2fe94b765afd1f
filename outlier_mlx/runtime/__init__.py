"""The mlx-lm model of a tier; its MoE layers keep their experts at 1.6 bits per weight.

These modules are joined into the `outlier_moe.py` of every tier. So they import only MLX, mlx-lm,
the standard library, and each other by `from .module import name`.
"""
