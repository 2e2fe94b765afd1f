"""Ordinary linear layers with ternary weights: the choice between Metal kernels and plain MLX.

A row of trits (affine2.py) has one float32 scale, or a 16-bit scale for each group of 64 or 128
weights. All ways compute a sum in float32 and round it once to the dtype of x. On a GPU, a kernel
decodes the rows for a few vectors at a time. For more vectors, rows are converted to affine 2-bit,
and MLX's own matrix kernels multiply this temporary copy.
"""

import mlx.core as mx

from .affine2 import affine_scales, row_bytes, rows_to_affine2
from .kernels import ACTIVATIONS, LIMITS, built_kernel, can_convert, tq1_0_to_affine2
from .ops import use_metal, with_gradient_of

# Numbers of vectors that `tq1_0_linear` multiplies with a decoded row, and the cycles that it takes
# for a weight then, with groups of 128 and K = 5120 (docs/kernels.md).
SLICES = {1: 2.54, 2: 3.67, 4: 6.03, 8: 10.55}
# Rows that a few lanes compute for so many vectors, so that registers are left for all threads.
SLICE_ROWS = {1: 4, 2: 4, 4: 2, 8: 2}
# Lanes that share a row, and simdgroups of a threadgroup. Results depend on the first number.
LINEAR_LANES = 8
LINEAR_SIMDGROUPS = 2
# Most vectors for which rows are decoded: more fill the tiles of MLX's matrix kernels.
MOST_DECODED = 32
# MLX passes arrays of fewer elements in another address space.
SMALLEST_WIDTH = 8
SCALE_GROUPS = (64, 128)
TILE_ROWS = 8


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
            (ceil(out / 8), groups, 8).
        affine: `rows_to_affine2(rows, scales, in)`, if it was kept; used without a GPU.
        training: use plain MLX only. Converted weights are not kept for the gradient, but made
            again.

    Returns:
        (..., out) of the dtype of x.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    scale_group(x, rows, scales)
    wide, out = x.shape[-1], rows.shape[0]
    vectors = x.reshape(-1, wide)
    if training or not use_metal() or vectors.shape[0] == 0:
        if affine is not None and not training:
            y = _affine_linear(vectors, affine)
        else:
            y = _PLAIN(vectors, rows, scales)
    elif vectors.shape[0] <= MOST_DECODED and can_multiply(wide, out):
        y = _DECODED(vectors, rows, scales)
    else:
        y = _TRANSCODED(vectors, rows, scales)
    return y.reshape(*x.shape[:-1], out)


def can_multiply(in_features: int, out_features: int) -> bool:
    """Whether `tq1_0_linear` takes a matrix of this size."""
    most_in, most_out = LIMITS["in features"][1], LIMITS["out features"][1]
    return SMALLEST_WIDTH <= in_features <= most_in and SMALLEST_WIDTH <= out_features <= most_out


def slice_size(vectors: int) -> int:
    """How many vectors at a time take the fewest cycles in all."""
    return min(SLICES, key=lambda size: -(-vectors // size) * SLICES[size])


def scale_group(x: mx.array, rows: mx.array, scales: mx.array) -> int:
    """Check the arguments of a product; returns the weights that share a scale, 0 for a whole row.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    wide = x.shape[-1] if x.ndim else 0
    if x.dtype not in ACTIVATIONS or wide == 0:
        raise ValueError(f"x is {x.shape} {x.dtype}; expected (..., in) of 16- or 32-bit floats")
    if rows.ndim != 2 or rows.dtype != mx.uint8 or rows.shape[-1] != row_bytes(wide):
        raise ValueError(
            f"rows are {rows.shape} {rows.dtype}; expected (out, {row_bytes(wide)}) uint8 for rows"
            f" of {wide} trits"
        )
    out = rows.shape[0]
    if scales.shape == (out,) and scales.dtype == mx.float32:
        return 0
    tiles = -(-out // TILE_ROWS)
    for group in SCALE_GROUPS if scales.dtype in (mx.float16, mx.bfloat16) else ():
        if wide % group == 0 and scales.shape == (tiles, wide // group, TILE_ROWS):
            return group
    raise ValueError(
        f"scales are {scales.shape} {scales.dtype}; expected ({out},) float32, or 16-bit floats"
        f" ({tiles}, groups, {TILE_ROWS}) of groups of 64 or 128 of {wide} weights"
    )


def tq1_0_linear(
    x: mx.array, rows: mx.array, scales: mx.array, *, size: int | None = None
) -> mx.array:
    """Multiply x by a matrix with ternary weights, in one launch.

    Args:
        x: (vectors, in) float32, float16 or bfloat16.
        rows: see `ternary_linear`.
        scales: see `ternary_linear`.
        size: number of vectors that are multiplied with a decoded row, 1, 2, 4 or 8; default:
            `slice_size`. Results do not depend on it.

    Returns:
        (vectors, out) of the dtype of x.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    group = scale_group(x, rows, scales)
    vectors, (out, _) = x.shape[0], rows.shape
    if x.ndim != 2 or not can_multiply(x.shape[1], out) or vectors > LIMITS["tokens"][1]:
        raise ValueError(f"tq1_0_linear: x {x.shape} and rows {rows.shape} are not supported")
    if vectors == 0:
        return mx.zeros((0, out), x.dtype)
    size = size or slice_size(vectors)
    width = 32 * LINEAR_SIMDGROUPS
    groups = -(-out * LINEAR_LANES // (SLICE_ROWS[size] * width))
    return built_kernel("tq1_0_linear", "tq1_0", "tq1_0_groups")(
        inputs=[x, rows, scales],
        template=[
            ("T", x.dtype),
            ("S", scales.dtype),
            ("K", x.shape[1]),
            ("N", out),
            ("GROUP", group),
            ("M", size),
            ("FULL", vectors % size == 0),
            ("ROWS", SLICE_ROWS[size]),
            ("LANES", LINEAR_LANES),
            ("SIMDGROUPS", LINEAR_SIMDGROUPS),
        ],
        grid=(width * groups, -(-vectors // size), 1),
        threadgroup=(width, 1, 1),
        output_shapes=[(vectors, out)],
        output_dtypes=[x.dtype],
    )[0]


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
    # Make rows depend on x. Otherwise MLX could convert all layers before the first one runs.
    rows = mx.depends([rows], [x])[0]
    if not can_convert(rows, x.shape[-1]):
        return _plain_linear(x, rows, scales)
    codes = tq1_0_to_affine2(rows, x.shape[-1])
    return _affine_linear(x, (codes, *affine_scales(scales, rows.shape[:-1], x.shape[-1])))


_DECODED = with_gradient_of(_plain_linear, tq1_0_linear, 1)
_TRANSCODED = with_gradient_of(_plain_linear, _transcoded_linear, 1)
_PLAIN = with_gradient_of(_plain_linear, _plain_linear, 1)
