"""Two bits a trit, four trits a byte, along each row.

The code is the trit's two low bits in two's complement: 0 -> 0b00, +1 -> 0b01, -1 -> 0b11; 0b10 is
unused and reads as 0. The first trit is in the lowest bits; rows are padded with 0 to whole bytes.
"""

import numpy as np

from outlier_mlx.ternary.arrays import (
    blocks,
    matrix_views,
    require_out,
    require_rows,
    require_size,
    write_digits,
)
from outlier_mlx.ternary.errors import TernaryError

GROUP = 4
_CHUNK = 32768  # groups handled at a time
_FOURS = 0x03030303

# Byte 3 of codes * multiplier is c0 + 4 c1 + 16 c2 + 64 c3: each code meets each power of the
# multiplier at two bits of its own, so nothing carries.
_MULTIPLIER = np.uint32(2**24 + 2**18 + 2**12 + 2**6)

_CODES = np.arange(256)[:, None] >> 2 * np.arange(GROUP) & 3
_TRITS = np.array([0, 1, 0, -1], np.int8)[_CODES].view(np.uint32)[:, 0]


def pack_two_bit(trits: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Pack each row of trits at two bits a trit.

    Args:
        trits: (..., in) int8 of any strides, every value -1, 0 or 1.
        out: (..., ceil(in / 4)) uint8 of any strides, to write to instead of a new array.

    Returns:
        (..., ceil(in / 4)) uint8.

    Raises:
        TernaryError: wrong type or shape, or a trit outside -1..1, named with its position; `out`
            may then have been written to in part.
    """
    trits = require_rows("trits", trits, np.int8)
    in_features = trits.shape[-1]
    rows = require_out(out, (*trits.shape[:-1], -(-in_features // GROUP)), np.uint8)
    words = np.empty(min(_CHUNK, rows.size), np.uint32)
    for first, (source, target) in matrix_views(trits, rows):
        for lines, groups in blocks(target, _CHUNK):
            piece = target[lines, groups]
            values = source[lines, GROUP * groups.start : GROUP * groups.stop]
            codes = words[: piece.size]
            digits = codes.view(np.uint8).reshape(len(piece), -1)
            digits[:, values.shape[1] :] = 1
            at = (first + lines.start) * in_features + GROUP * groups.start
            write_digits(values, digits[:, : values.shape[1]], trits.shape, at)
            np.add(codes, _FOURS, out=codes)  # digits 0, 1, 2 to codes 3, 0, 1
            np.bitwise_and(codes, _FOURS, out=codes)
            np.multiply(codes, _MULTIPLIER, out=codes)
            piece[:] = codes.view(np.uint8)[3::4].reshape(piece.shape)
    return rows


def unpack_two_bit(
    rows: np.ndarray, in_features: int, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Unpack what `pack_two_bit` packed.

    Args:
        rows: (..., ceil(in_features / 4)) uint8 of any strides.
        in_features: trits in a row; the bytes alone do not tell.
        out: (..., in_features) int8 of any strides, to write to instead of a new array.

    Returns:
        (..., in_features) int8 trits.

    Raises:
        TernaryError: wrong type or shape.
    """
    rows = require_rows("rows", rows, np.uint8)
    expected = -(-require_size("in_features", in_features) // GROUP)
    if rows.shape[-1] != expected:
        raise TernaryError(
            f"rows: expected {expected} bytes a row for {in_features} trits, got {rows.shape[-1]}"
        )
    trits = require_out(out, (*rows.shape[:-1], in_features), np.int8)
    for _, (source, target) in matrix_views(rows, trits):
        for lines, groups in blocks(source, _CHUNK):
            values = _TRITS.take(source[lines, groups]).view(np.int8)
            piece = target[lines, GROUP * groups.start : GROUP * groups.stop]
            piece[:] = values[:, : piece.shape[1]]
    return trits
