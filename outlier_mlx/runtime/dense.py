"""Ordinary linear layers with ternary weights: the choice between Metal kernels and plain MLX.

A row of trits (affine2.py) has one float32 scale, or a 16-bit scale for each group of 64 or 128
weights. All ways compute a sum in float32 and round it once to the dtype of x. On a GPU, a kernel
decodes the rows for a few vectors at a time. For more vectors, rows are converted to affine 2-bit,
and MLX's own matrix kernels multiply this temporary copy.
"""

import mlx.core as mx

from .affine2 import rows_to_affine2
from .groups import can_multiply, scale_group, tq1_0_linear
from .launching import ACTIVATIONS
from .ops import transcoded, use_metal, with_gradient_of

# Most vectors for which rows are decoded: more fill the tiles of MLX's matrix kernels.
MOST_DECODED = 32


def ternary_linear(
    x: mx.array,
    rows: mx.array,
    scales: mx.array,
    *,
    affine: tuple[mx.array, mx.array, mx.array] | None = None,
    training: bool = False,
) -> mx.array:
    """Multiply x by a matrix with ternary weights.

    Args:
        x: (..., in) float32, float16 or bfloat16.
        rows: (out, row_bytes) uint8.
        scales: (out,) float32; or float16 or bfloat16 of groups of 64 or 128 weights, in tiles:
            (ceil(out / 8), groups, 8). See `scale_group`.
        affine: `rows_to_affine2(rows, scales, in)`, if it was kept; used without a GPU.
        training: use plain MLX only. Converted weights are not kept for the gradient, but made
            again.

    Returns:
        (..., out) of the dtype of x.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    wide = x.shape[-1] if x.ndim else 0
    if x.dtype not in ACTIVATIONS or wide == 0 or rows.ndim != 2:
        raise ValueError(
            f"x is {x.shape} {x.dtype}, rows are {rows.shape}; expected (..., in) in float32,"
            " float16 or bfloat16, and (out, bytes)"
        )
    scale_group(rows, scales, wide)
    out = rows.shape[0]
    vectors = x.reshape(-1, wide)
    if training or not use_metal() or vectors.shape[0] == 0:
        if affine is not None and not training:
            y = _affine_linear(vectors, affine)
        else:
            y = _PLAIN(vectors, rows, scales)
    elif vectors.shape[0] <= MOST_DECODED and can_multiply(1, wide, out):
        y = _DECODED(vectors, rows, scales)
    else:
        y = _TRANSCODED(vectors, rows, scales)
    return y.reshape(*x.shape[:-1], out)


def _affine_linear(x: mx.array, affine: tuple[mx.array, mx.array, mx.array]) -> mx.array:
    """Multiply x (vectors, in) by a matrix in MLX's affine 2-bit format, in float32."""
    weight, scales, biases = affine
    spare = weight.shape[-1] * 16 - x.shape[-1]
    wide = x.astype(mx.float32)
    if spare:
        wide = mx.pad(wide, [(0, 0), (0, spare)])
    group = weight.shape[-1] * 16 // scales.shape[-1]
    y = mx.quantized_matmul(wide, weight, scales, biases, group_size=group, bits=2)
    return y.astype(x.dtype)


def _plain_linear(x: mx.array, rows: mx.array, scales: mx.array) -> mx.array:
    return _affine_linear(x, rows_to_affine2(rows, scales, x.shape[-1]))


def _transcoded_linear(x: mx.array, rows: mx.array, scales: mx.array) -> mx.array:
    return _affine_linear(x, transcoded(x, rows, scales))


_DECODED = with_gradient_of(_plain_linear, tq1_0_linear, 1)
_TRANSCODED = with_gradient_of(_plain_linear, _transcoded_linear, 1)
_PLAIN = with_gradient_of(_plain_linear, _plain_linear, 1)
