"""The dtype of a model's activations, and the conversion of what is loaded to it."""

from collections.abc import Callable

import mlx.core as mx

FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def activation_dtype(name: str | None) -> mx.Dtype | None:
    """The dtype to convert a model's floats to; None: they stay as they are stored.

    Args:
        name: the dtype that the caller wants. Without it, it is float32 on the CPU, where halves
            are slow, and that of the files on a GPU.
    """
    if name is not None:
        found: mx.Dtype = getattr(mx, name)
        return found
    return mx.float32 if mx.default_device() == mx.cpu else None


def converted(
    weights: dict[str, mx.array], dtype: mx.Dtype | None, stays: Callable[[str], bool]
) -> dict[str, mx.array]:
    """Convert the floats of `weights` to a dtype, if one is given, except those that stay."""
    if dtype is None:
        return weights
    return {
        name: value.astype(dtype) if value.dtype in FLOATS and not stays(name) else value
        for name, value in weights.items()
    }
