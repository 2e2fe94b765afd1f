"""Exact transcoding of ternary rows (`tq1_0_rows`) to what MLX's own operations take.

A trit t with digit d = t + 1 and row scale s is the affine 2-bit weight s * d - s. MLX packs
sixteen 2-bit codes into a 32-bit word, the first in the lowest bits; rows hold five trits a byte,
the first in the most significant base-3 digit of a fixed-point fraction of 256.
"""

import mlx.core as mx

TRITS_PER_BYTE = 5
GROUP_SIZES = (128, 64, 32)


def row_bytes(in_features: int) -> int:
    """Bytes that a row of `in_features` trits takes: five a byte, padded to a multiple of 4."""
    return -(-in_features // (4 * TRITS_PER_BYTE)) * 4


def padded_width(in_features: int) -> int:
    """The width at which rows are transcoded: a multiple of the smallest affine group."""
    return -(-in_features // GROUP_SIZES[-1]) * GROUP_SIZES[-1]


def affine_group(in_features: int) -> int:
    """The largest affine group size that divides the padded width."""
    return next(size for size in GROUP_SIZES if padded_width(in_features) % size == 0)


def byte_digits(byte: int) -> list[int]:
    """The five digits (0, 1, 2) of a row byte: times 3, what carries out of the byte comes next."""
    digits = []
    for _ in range(TRITS_PER_BYTE):
        byte *= 3
        digits.append(byte >> 8)
        byte &= 255
    return digits


def rows_to_affine2(
    rows: mx.array, scales: mx.array, in_features: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Transcode ternary rows to MLX affine 2-bit weights.

    Args:
        rows: (..., out, row_bytes) uint8.
        scales: (..., out) float32, one a row.
        in_features: trits in a row that count.

    Returns:
        weight (..., out, padded / 16) uint32, and scales and biases (..., out, padded / group) of
        the dtype of `scales`; `padded_width` and `affine_group` give the sizes. The columns past
        `in_features` hold no meaning: pad x with zeros.
    """
    padded = padded_width(in_features)
    # 16 bytes of 5 digits of 2 bits are 5 words of 32.
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
    """Multiply x by transcoded experts.

    Args:
        x: (..., 1, in) float32.
        affine: what `rows_to_affine2` gives for rows (experts, out, row_bytes) of `in` trits.
        indices: (...) experts, uint32.
        sorted_indices: whether `indices` ascend.

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
    """Row scales (..., out) as affine scales and biases, (..., out, padded / group) each."""
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


def rows_to_dense(rows: mx.array, scales: mx.array, in_features: int) -> mx.array:
    """Decode ternary rows.

    Args:
        rows: (..., out, row_bytes) uint8.
        scales: (..., out) float32, one a row.
        in_features: trits in a row that count.

    Returns:
        (..., out, in_features) of the dtype of `scales`.
    """
    table = mx.array([byte_digits(b) for b in range(256)], mx.int8) - 1
    trits = mx.flatten(table[rows], -2)[..., :in_features]
    return trits.astype(scales.dtype) * scales[..., None]
