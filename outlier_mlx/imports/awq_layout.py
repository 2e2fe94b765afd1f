"""Repack weights from AutoAWQ's GEMM layout into MLX's affine format.

AutoAWQ stores a layer (out, in) as `qweight` (in, out / 8) int32, `qzeros` (in / g, out / 8) int32
and `scales` (in / g, out) float16. The weights are
w[o, i] = (q[i, o] - z[i // g, o]) * s[i // g, o].
Word c of a row, an int32, holds columns 8c to 8c + 7 in the order `NIBBLES`.
Source: AutoAWQ 0.2, `awq/modules/linear/gemm.py` and `awq/utils/packing_utils.py`.
"""

import numpy as np

from outlier_mlx.imports.codes import five_bytes

#: In a word of eight columns, column j is in the 4 bits of a word that begin at bit 4 * NIBBLES[j].
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
# The columns in the low halves of a word's four bytes, and those in the high halves.
_LOW = [NIBBLES.index(n) for n in (0, 2, 4, 6)]
_HIGH = [NIBBLES.index(n) for n in (1, 3, 5, 7)]
# Number of rows to transpose at a time: with 64 words a row, input and output fit in a core's
# cache.
_BLOCK = 4096


def unpack(words: np.ndarray) -> np.ndarray:
    """Unpack words (rows, c) of 32 bits into codes (rows, 8 * c) uint8."""
    rows, count = words.shape
    halves = np.ascontiguousarray(words).view(np.uint8).reshape(rows, count, 4)
    codes = np.empty((rows, count, 8), np.uint8)
    codes[..., _LOW] = halves & 15
    codes[..., _HIGH] = halves >> 4
    return codes.reshape(rows, 8 * count)


def to_four_bits(words: np.ndarray) -> np.ndarray:
    """Transpose the codes of words (in, c) and pack them for MLX.

    A byte in MLX's format holds the codes of two neighbours along `in`. In AutoAWQ's layout, these
    are in the same half of the bytes of two neighbouring rows, so the codes need not be unpacked.

    Returns:
        (8 * c, in / 8) uint32.
    """
    width, count = words.shape
    packed = np.empty((count, 8, width // 2), np.uint8)
    for start in range(0, width, _BLOCK):
        block = np.ascontiguousarray(words[start : start + _BLOCK]).view(np.uint8)
        even, odd = block[0::2], block[1::2]
        target = packed[..., start // 2 : start // 2 + len(even)]
        target[:, _LOW] = _transposed((even & 15) | (odd << 4), count)
        target[:, _HIGH] = _transposed((even >> 4) | (odd & 0xF0), count)
    return packed.reshape(8 * count, width // 2).view("<u4")


def _transposed(block: np.ndarray, count: int) -> np.ndarray:
    """Transpose (rows, 4 * c) to (c, 4, rows)."""
    return block.T.reshape(count, 4, -1)


def to_five_bits(words: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """Transpose the codes of words (in, c) and pack them for MLX as q - z + 16.

    With these codes, every bias is -16 times its scale, which float16 holds exactly.

    Args:
        words: (in, c) of 32 bits.
        zeros: (groups, c) of 32 bits; None: all zero points are 8.

    Returns:
        (8 * c, in * 5 / 32) uint32.
    """
    width, count = words.shape
    packed = np.empty((count, 8, width * 5 // 8), np.uint8)
    for start in range(0, width, _BLOCK):
        rows = slice(start, min(start + _BLOCK, width))
        low, high = _halves(words[rows])
        if zeros is None:
            low, high = low + 8, high + 8
        else:
            of_group = np.arange(rows.start, rows.stop) * len(zeros) // width
            low_zeros, high_zeros = _halves(zeros)
            low, high = low + (16 - low_zeros)[of_group], high + (16 - high_zeros)[of_group]
        target = packed[..., rows.start * 5 // 8 : rows.stop * 5 // 8]
        target[:, _LOW] = _transposed(_packed_rows(low), count)
        target[:, _HIGH] = _transposed(_packed_rows(high), count)
    return packed.reshape(8 * count, width * 5 // 8).view("<u4")


def _halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high half of each byte of words (rows, c): (rows, 4 * c) uint8 each."""
    block = np.ascontiguousarray(words).view(np.uint8)
    return block & 15, block >> 4


def _packed_rows(codes: np.ndarray) -> np.ndarray:
    """Pack codes (rows, n) of 5 bits along the rows: (rows * 5 / 8, n) uint8."""
    packed = np.empty((len(codes) * 5 // 8, codes.shape[1]), np.uint8)
    for n, values in enumerate(five_bytes([codes[n::8] for n in range(8)])):
        packed[n::5] = values
    return packed
