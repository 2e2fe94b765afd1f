"""Launchers of the kernels for ordinary linear layers, and for weights with scales of groups.

Rows of trits have the layout `tq1_0_strided` (affine2.py). A group of 64 or 128 weights of a row
has one 16-bit scale. Scales are in tiles of eight rows, (ceil(out / 8), groups, 8) for a matrix, so
that a kernel loads those of neighbouring rows together.
"""

import mlx.core as mx

from .affine2 import row_bytes
from .kernels import block_size, can_decode
from .launching import ACTIVATIONS, built_kernel

SCALE_GROUPS = (64, 128)
TILE_ROWS = 8
# Numbers of vectors that `tq1_0_linear` can multiply with a decoded row, and how many rows a few
# lanes compute then, so that registers are left for all threads.
SLICES = (1, 2, 3, 4, 6, 8)
SLICE_ROWS = {1: 4, 2: 4, 3: 2, 4: 2, 6: 2, 8: 2}
# Lanes that share a row, on which results depend, and simdgroups of a threadgroup.
GROUP_LANES = 8
GROUP_SIMDGROUPS = 2
# MLX passes arrays of fewer elements in another address space.
SMALLEST_WIDTH = 8


def can_multiply(vectors: int, in_features: int, out_features: int) -> bool:
    """Whether `tq1_0_linear` takes these sizes."""
    narrow = min(in_features, out_features) < SMALLEST_WIDTH
    return not narrow and can_decode(vectors, 1, 1, in_features, out_features)


def slice_size(vectors: int) -> int:
    """How many vectors are multiplied with a decoded row: all of them, or 8 at a time."""
    return next((size for size in SLICES if size >= vectors), SLICES[-1])


def scale_group(rows: mx.array, scales: mx.array, in_features: int) -> int:
    """Check rows and scales; returns the number of weights that share a scale, 0 for a whole row.

    Args:
        rows: (..., out, row_bytes) uint8.
        scales: (..., out) float32; or float16 or bfloat16 of groups of 64 or 128 weights, in tiles:
            (..., ceil(out / 8), groups, 8).
        in_features: number of trits in a row, without padding.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    if rows.ndim < 2 or rows.dtype != mx.uint8 or rows.shape[-1] != row_bytes(in_features):
        raise ValueError(
            f"rows are {rows.shape} {rows.dtype}; expected (..., out, {row_bytes(in_features)})"
            f" uint8 for rows of {in_features} trits"
        )
    *matrices, out, _ = rows.shape
    if scales.shape == (*matrices, out) and scales.dtype == mx.float32:
        return 0
    tiles = -(-out // TILE_ROWS)
    for group in SCALE_GROUPS if scales.dtype in (mx.float16, mx.bfloat16) else ():
        shape = (*matrices, tiles, in_features // group, TILE_ROWS)
        if in_features % group == 0 and scales.shape == shape:
            return group
    raise ValueError(
        f"scales are {scales.shape} {scales.dtype} for {rows.shape[:-1]} rows of {in_features}"
        f" trits; expected one float32 for each row, or 16-bit floats for groups of 64 or 128"
        f" trits in tiles (..., {tiles}, groups, {TILE_ROWS})"
    )


def tq1_0_linear(
    x: mx.array, rows: mx.array, scales: mx.array, *, size: int | None = None
) -> mx.array:
    """Multiply x by a matrix with ternary weights, in one launch.

    Args:
        x: (vectors, in) float32, float16 or bfloat16.
        rows: (out, row_bytes) uint8.
        scales: see `scale_group`.
        size: number of vectors that are multiplied with a decoded row, one of `SLICES`; default:
            `slice_size`. Results do not depend on it.

    Returns:
        (vectors, out) of the dtype of x: summed in float32, rounded once.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    if x.ndim != 2 or x.dtype not in ACTIVATIONS or rows.ndim != 2:
        raise ValueError(
            f"tq1_0_linear: x is {x.shape} {x.dtype}, rows are {rows.shape};"
            " expected (vectors, in) and (out, bytes)"
        )
    (vectors, wide), out = x.shape, rows.shape[0]
    group = scale_group(rows, scales, wide)
    if not can_multiply(vectors, wide, out):
        raise ValueError(f"tq1_0_linear: {vectors} vectors of {wide} for {out} rows: not supported")
    if vectors == 0:
        return mx.zeros((0, out), x.dtype)
    size = size or slice_size(vectors)
    width = 32 * GROUP_SIMDGROUPS
    return built_kernel("tq1_0_linear", "tq1_0", "tq1_0_groups")(
        inputs=[x, rows, scales],
        template=[
            *_template(x, scales, out, group, SLICE_ROWS[size]),
            ("M", size),
            ("TAIL", slice_size(vectors % size) if vectors % size else 1),
            ("EXACT", vectors % size in SLICES),
        ],
        grid=(_threads(out, SLICE_ROWS[size]), -(-vectors // size), 1),
        threadgroup=(width, 1, 1),
        output_shapes=[(vectors, out)],
        output_dtypes=[x.dtype],
    )[0]


def tq1_0_qmv_groups(
    x: mx.array,
    rows: mx.array,
    scales: mx.array,
    indices: mx.array,
    *,
    blocks: mx.array | None = None,
) -> mx.array:
    """Multiply vectors by experts' matrices that have scales of groups, for many pairs.

    Args:
        x: (vectors, in) float32, float16 or bfloat16; each is used for `pairs / vectors` pairs.
        rows: (experts, out, row_bytes) uint8.
        scales: (experts, ceil(out / 8), groups, 8) float16 or bfloat16, see `scale_group`.
        indices: (pairs,) uint32, each below `experts`; the pairs of the first vector come first.
        blocks: `tq1_0_sort` of the indices: pairs of one expert then share the decoding of its
            rows. Results do not depend on it.

    Returns:
        (pairs, out) float32.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    name = "tq1_0_qmv_groups"
    if x.ndim != 2 or x.dtype not in ACTIVATIONS or rows.ndim != 3:
        raise ValueError(
            f"{name}: x is {x.shape} {x.dtype}, rows are {rows.shape};"
            " expected (vectors, in) and (experts, out, bytes)"
        )
    (vectors, wide), (experts, out, _) = x.shape, rows.shape
    group, pairs = scale_group(rows, scales, wide), indices.size
    if group == 0:
        raise ValueError(f"{name}: scales are {scales.shape} {scales.dtype}; expected tiles")
    uneven = pairs % vectors if vectors else pairs
    if indices.ndim != 1 or indices.dtype != mx.uint32 or uneven:
        raise ValueError(
            f"{name}: indices are {indices.shape} {indices.dtype}; expected (pairs,) uint32,"
            f" a multiple of {vectors} vectors"
        )
    if not can_decode(max(vectors, pairs), experts, 1, wide, out):
        raise ValueError(f"{name}: {pairs} pairs of {wide} for {rows.shape} rows: not supported")
    if pairs == 0:
        return mx.zeros((0, out))
    size = 1 if blocks is None else block_size(name, blocks)
    return built_kernel(name, "tq1_0", "tq1_0_groups")(
        # Without blocks, an input takes their place.
        inputs=[x, rows, scales, indices, indices if blocks is None else blocks],
        template=[
            *_template(x, scales, out, group, SLICE_ROWS[size]),
            ("SHARE", pairs // vectors),
            ("M", size),
        ],
        grid=(_threads(out, SLICE_ROWS[size]), pairs if blocks is None else blocks.shape[0], 1),
        threadgroup=(32 * GROUP_SIMDGROUPS, 1, 1),
        output_shapes=[(pairs, out)],
        output_dtypes=[mx.float32],
    )[0]


def _template(
    x: mx.array, scales: mx.array, out: int, group: int, rows: int
) -> list[tuple[str, int | mx.Dtype]]:
    return [
        ("T", x.dtype),
        ("S", scales.dtype),
        ("K", x.shape[1]),
        ("N", out),
        ("GROUP", group),
        ("ROWS", rows),
        ("LANES", GROUP_LANES),
        ("SIMDGROUPS", GROUP_SIMDGROUPS),
    ]


def _threads(out: int, rows: int) -> int:
    """Threads for all rows, in whole threadgroups."""
    width = 32 * GROUP_SIMDGROUPS
    return -(-out * GROUP_LANES // (rows * width)) * width
