"""Convert ternary rows (`tq1_0_strided`) exactly to MLX's affine 2-bit format.

A trit t with digit d = t + 1 and row scale s is the affine 2-bit weight s * d - s. MLX packs
sixteen 2-bit codes into a 32-bit word, the first in the lowest bits. A row of B bytes holds five
trits in a byte: byte j holds the trits j, B + j, 2B + j, 3B + j and 4B + j. byte / 256 is a
fraction whose base-3 digits are the trits plus 1, most significant first.
"""

from math import gcd

import mlx.core as mx

# The formats of ternary experts that this code runs: packed rows, and MLX's own 2-bit format.
ROWS = "tq1_0_strided"
EXPERT_FORMATS = (ROWS, "affine2")
EXPERT_FORMAT_VERSION = 2
TRITS_PER_BYTE = 5
# Bytes of a row are a multiple of this, so that a lane loads 16 bytes, and so that the codes of
# each digit fill whole words.
ROW_MULTIPLE = 16
# The smallest and the largest of MLX's affine group sizes, which are powers of 2.
SMALLEST_GROUP, LARGEST_GROUP = 32, 128


def check_experts(stored: dict, formats: tuple[str, ...] = EXPERT_FORMATS) -> None:
    """Refuse experts that this code cannot run.

    Args:
        stored: what a config.json says of them: `format` and `version`.
        formats: the formats that are supported.

    Raises:
        ValueError: another format or version.
    """
    name, version = stored.get("format"), stored.get("version")
    if name == "tq1_0_rows" or (name in EXPERT_FORMATS and version == 1):
        raise ValueError(
            f"ternary format {name!r} version {version!r} was made by outlier-mlx 0.1:"
            " convert the overlay, or import the model, again"
        )
    if name not in formats or version != EXPERT_FORMAT_VERSION:
        raise ValueError(
            f"ternary format {name!r} version {version!r} is not supported: expected"
            f" {' or '.join(formats)}, version {EXPERT_FORMAT_VERSION}"
        )


def row_bytes(in_features: int) -> int:
    """Bytes of a row of `in_features` trits: five trits per byte, padded to a multiple of 16."""
    return -(-in_features // (ROW_MULTIPLE * TRITS_PER_BYTE)) * ROW_MULTIPLE


def padded_width(in_features: int) -> int:
    """Weights in a converted row: `in_features`, rounded up to the smallest affine group size."""
    return -(-in_features // SMALLEST_GROUP) * SMALLEST_GROUP


def affine_group(in_features: int) -> int:
    """The largest affine group size that divides the padded width."""
    return gcd(padded_width(in_features), LARGEST_GROUP)


def rows_to_affine2(
    rows: mx.array, scales: mx.array, in_features: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Convert ternary rows to MLX affine 2-bit weights.

    Args:
        rows: (..., out, row_bytes) uint8.
        scales: (..., out) float32, one per row; or those of groups of 32, 64 or 128 weights, in
            tiles of eight rows: (..., ceil(out / 8), groups, 8).
        in_features: number of trits in a row, without padding.

    Returns:
        weight (..., out, padded / 16) uint32, and scales and biases (..., out, padded / group) of
        the dtype of `scales`; `padded_width` and `affine_group` give the sizes, if there is one
        scale per row. Columns from `in_features` on have no meaning: pad x with zeros.
    """
    words = padded_width(in_features) // 16
    # Two registers of 16 bits a byte: multiplying by 3 carries the next digit into bits 8 and 9.
    four = rows.view(mx.uint32)
    even, odd = four & 0x00FF00FF, (four >> 8) & 0x00FF00FF
    planes = []
    for _ in range(TRITS_PER_BYTE):
        even, odd = even * 3, odd * 3
        pairs = ((even >> 8) & 0x00030003) | ((odd >> 6) & 0x000C000C)
        planes.append((pairs | (pairs >> 12)).astype(mx.uint8).view(mx.uint32))
        even, odd = even & 0x00FF00FF, odd & 0x00FF00FF
    weight = mx.concatenate(planes, axis=-1)[..., :words]  # digit n has the columns from n B on
    missing = words - weight.shape[-1]
    if missing > 0:
        weight = mx.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, missing)])
    return mx.contiguous(weight), *affine_scales(scales, rows.shape[:-1], in_features)


def affine_product(
    x: mx.array,
    affine: tuple[mx.array, mx.array, mx.array],
    indices: mx.array,
    sorted_indices: bool = False,
) -> mx.array:
    """Multiply x by experts in MLX's affine 2-bit format.

    Args:
        x: (..., 1, in) float32.
        affine: weight, scales and biases from `rows_to_affine2`, of (experts, out, row_bytes).
        indices: (...) uint32, numbers of the experts.
        sorted_indices: whether `indices` are in ascending order.

    Returns:
        (..., 1, out) float32.
    """
    weight, scales, biases = affine
    columns = weight.shape[-1] * 16
    spare = columns - x.shape[-1]
    if spare:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)])
    return mx.gather_qmm(
        x,
        weight,
        scales,
        biases,
        rhs_indices=indices,
        transpose=True,
        group_size=columns // scales.shape[-1],
        bits=2,
        sorted_indices=sorted_indices,
    )


def affine_scales(
    scales: mx.array, matrix: tuple[int, ...], in_features: int
) -> tuple[mx.array, mx.array]:
    """Convert scales of rows or of groups to affine scales and biases.

    Args:
        scales: see `rows_to_affine2`.
        matrix: (..., out), shape of the rows without their bytes.
        in_features: number of trits in a row, without padding.

    Returns:
        Two arrays (..., out, groups) of the dtype of `scales`.
    """
    if scales.shape == matrix:
        groups = padded_width(in_features) // affine_group(in_features)
        scale = mx.repeat(scales[..., None], groups, axis=-1)
    else:
        rows = mx.flatten(mx.swapaxes(scales, -1, -2), -3, -2)
        scale = mx.contiguous(rows[..., : matrix[-1], :])
    return scale, -scale
