"""Convert ternary rows (`tq1_0_rows`) exactly to MLX's affine 2-bit format.

A trit t with digit d = t + 1 and row scale s is the affine 2-bit weight s * d - s. MLX packs
sixteen 2-bit codes into a 32-bit word, the first in the lowest bits. Rows hold five trits in a
byte: byte / 256 is a fraction whose base-3 digits are the trits plus 1, most significant first.
"""

from math import gcd

import mlx.core as mx

# The formats of ternary experts that this code runs: packed rows, and MLX's own 2-bit format.
ROWS = "tq1_0_rows"
EXPERT_FORMATS = (ROWS, "affine2")
EXPERT_FORMAT_VERSION = 1
TRITS_PER_BYTE = 5
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
    if name not in formats or version != EXPERT_FORMAT_VERSION:
        raise ValueError(
            f"ternary format {name!r} version {version!r} is not supported: expected"
            f" {' or '.join(formats)}, version {EXPERT_FORMAT_VERSION}"
        )


def row_bytes(in_features: int) -> int:
    """Bytes of a row of `in_features` trits: five trits per byte, padded to a multiple of 4."""
    return -(-in_features // (4 * TRITS_PER_BYTE)) * 4


def padded_width(in_features: int) -> int:
    """Weights in a converted row: `in_features`, rounded up to the smallest affine group size."""
    return -(-in_features // SMALLEST_GROUP) * SMALLEST_GROUP


def affine_group(in_features: int) -> int:
    """The largest affine group size that divides the padded width."""
    return gcd(padded_width(in_features), LARGEST_GROUP)


def byte_digits(byte: int) -> list[int]:
    """The five digits (0, 1, 2) of a row byte: each time the byte is tripled, one carries out."""
    digits = []
    for _ in range(TRITS_PER_BYTE):
        byte *= 3
        digits.append(byte >> 8)
        byte &= 255
    return digits


def rows_to_affine2(
    rows: mx.array, scales: mx.array, in_features: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Convert ternary rows to MLX affine 2-bit weights.

    Args:
        rows: (..., out, row_bytes) uint8.
        scales: (..., out) float32, one per row.
        in_features: number of trits in a row, without padding.

    Returns:
        weight (..., out, padded / 16) uint32, and scales and biases (..., out, padded / group) of
        the dtype of `scales`; `padded_width` and `affine_group` give the sizes. Columns from
        `in_features` on have no meaning: pad x with zeros.
    """
    padded = padded_width(in_features)
    # 16 bytes have 80 digits of 2 bits, which fill 5 words of 32 bits.
    spare = -rows.shape[-1] % 16
    rows = mx.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, spare)])
    table = mx.array(
        [sum(d << 2 * n for n, d in enumerate(byte_digits(b))) for b in range(256)], mx.uint32
    )
    codes = mx.unflatten(table[rows], -1, (-1, 16))  # (..., out, blocks, 16), 10 bits each
    words = mx.stack([_word(codes, n) for n in range(5)], axis=-1)
    weight = mx.flatten(words, -2)[..., : padded // 16]
    missing = padded // 16 - weight.shape[-1]
    if missing > 0:
        weight = mx.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, missing)])
    return mx.contiguous(weight), *spread_scales(scales, in_features)


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
    in_features = x.shape[-1]
    spare = padded_width(in_features) - in_features
    if spare:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)])
    return mx.gather_qmm(
        x,
        weight,
        scales,
        biases,
        rhs_indices=indices,
        transpose=True,
        group_size=affine_group(in_features),
        bits=2,
        sorted_indices=sorted_indices,
    )


def spread_scales(scales: mx.array, in_features: int) -> tuple[mx.array, mx.array]:
    """Convert row scales (..., out) to affine scales and biases (..., out, padded / group)."""
    groups = padded_width(in_features) // affine_group(in_features)
    scale = mx.repeat(scales[..., None], groups, axis=-1)
    return scale, -scale


def _word(codes: mx.array, n: int) -> mx.array:
    word = mx.zeros(codes.shape[:-1], mx.uint32)
    for i in range(16):
        shift = 10 * i - 32 * n
        if -10 < shift < 32:
            code = codes[..., i]
            word = word | (code << shift if shift >= 0 else code >> -shift)
    return word
