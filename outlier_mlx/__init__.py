"""Outlier models in MLX: an int4 base plus ternary experts at 1.6 bits a weight."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlier_mlx import ternary
    from outlier_mlx.checkpoints import open_overlay
    from outlier_mlx.engine.buffers import use_larger_buffers
    from outlier_mlx.engine.loading import load

__version__ = "0.2.0"

__all__ = ["convert", "load", "open_overlay", "ternary", "use_larger_buffers"]

# Imported when first used: MLX and transformers take seconds that `--help` should not.
_LAZY = {
    "load": "outlier_mlx.engine.loading",
    "open_overlay": "outlier_mlx.checkpoints",
    "ternary": "outlier_mlx.ternary",
    "use_larger_buffers": "outlier_mlx.engine.buffers",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name])
    return module if name == "ternary" else getattr(module, name)


def convert(
    overlay: str | Path,
    base: str | Path | None = None,
    out: str | Path | None = None,
    *,
    tier: str = "q4",
    base_bits: int | str | None = None,
    group_size: int | None = None,
    experts: str | None = None,
    dtype: str | None = None,
    portable: bool = False,
    **options: Any,
) -> Path:
    """Convert an overlay into a tier.

    Args:
        overlay: the overlay's folder or hub repository.
        base: the base model's folder or repository; None where the overlay contains it.
        out: the folder to make; by default NAME-RECIPE in the current folder.
        tier: the recipe: "q4", "q8", "bf16", "f16" or "f32".
        base_bits: 4, 8, or "none" for an unquantized base.
        group_size: 32, 64 or 128.
        experts: "tq1_0" or "affine2".
        dtype: "bfloat16", "float16" or "float32".
        portable: write a model that stock mlx-lm loads, its experts in "affine2".
        **options: `alpha`, `force`, `revision`, `base_revision`, `stream`, `planned` and
            `progress`, as `outlier_mlx.tiers.convert.convert_tier` takes them.

    Returns:
        The tier's path.

    Raises:
        outlier_mlx.errors.OutlierError: the input is damaged or not supported, the output exists,
            or the disk is full; nothing is left behind.
    """
    from outlier_mlx.tiers.convert import convert_tier
    from outlier_mlx.tiers.presets import make_recipe

    recipe = make_recipe(
        tier,
        base_bits=base_bits,
        group_size=group_size,
        experts=experts,
        dtype=dtype,
        portable=portable,
    )
    return convert_tier(overlay, base, out, recipe=recipe, **options).path
