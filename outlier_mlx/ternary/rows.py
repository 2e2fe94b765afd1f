"""The tier's row layout `tq1_0_rows`: five trits per byte along each row, easy to decode on a GPU.

Byte b of a row holds trits 5b .. 5b + 4. With digits d = trit + 1, most significant first, the
number is q = 81 d0 + 27 d1 + 9 d2 + 3 d3 + d4. The byte is q / 243 as a fraction of 256, rounded
up: (256 q + 242) // 243, as in ggml's TQ1_0. So each multiplication of the byte by 3 carries out
the next digit. Rows are padded with trit 0 (byte 128) to a multiple of 4 bytes.
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from outlier_mlx.ternary import flat
from outlier_mlx.ternary.arrays import (
    TernaryError,
    blocks,
    matrix_views,
    require_rows,
    require_shape,
    require_size,
    write_digits,
)
from outlier_mlx.ternary.digits import (
    CHUNK,
    FIRST_IS_LEAST,
    FIRST_IS_MOST,
    GROUP,
    NUMBERS,
    ZERO,
    Decoder,
    Encoder,
    group_table,
)

_MULTIPLE = 4
_LIFT = 256
_ZEROS = 128  # the byte for five trits 0

_BYTE = np.arange(256, dtype=np.uint16)[:, None]
# (256, 5): the digits that multiplications by 3 carry out; defined for every byte.
DIGITS = ((_BYTE * 3 ** np.arange(GROUP) % _LIFT * 3) // _LIFT).astype(np.uint8)
_TRITS = group_table(DIGITS.astype(np.int8) - np.int8(1))
_ROW_DIGITS = group_table(DIGITS)
_FLAT_DIGITS = group_table(flat.DIGITS)

_ROW_BYTE = ((_LIFT * np.arange(NUMBERS) + NUMBERS - 1) // NUMBERS).astype(np.uint8)
_IS_ENCODED = np.isin(np.arange(256), _ROW_BYTE)
# The two layouts have the same five digits in opposite orders, so a table converts bytes.
_FLAT_TO_ROW = _ROW_BYTE[flat.DIGITS[:NUMBERS] @ 3 ** np.arange(GROUP)[::-1]]
_ROW_TO_FLAT = (DIGITS @ 3 ** np.arange(GROUP)).astype(np.uint8)


def row_bytes(in_features: int) -> int:
    """Bytes of a row of `in_features` trits: ceil(in_features / 5), rounded up to a multiple of 4.

    Raises:
        TernaryError: `in_features` is not an integer, or negative.
    """
    in_features = require_size("in_features", in_features)
    return -(-flat.packed_bytes(in_features) // _MULTIPLE) * _MULTIPLE


def pack_rows(trits: np.ndarray) -> np.ndarray:
    """Pack each row of trits into the tier's layout.

    Args:
        trits: (..., out, in) int8 of any strides, every value -1, 0 or 1.

    Returns:
        (..., out, row_bytes(in)) uint8.

    Raises:
        TernaryError: wrong type or shape, or a trit outside -1..1, named with its position.
    """
    trits = require_rows("trits", trits, np.int8)
    in_features = trits.shape[-1]
    rows = np.empty((*trits.shape[:-1], row_bytes(in_features)), np.uint8)
    encoder = _RowEncoder(rows)
    for first, (source, target) in matrix_views(trits, rows):
        for lines, groups in blocks(target, CHUNK):
            piece = source[lines, _columns(groups, in_features)]
            at = (first + lines.start) * in_features + GROUP * groups.start
            digits = encoder.take_digits(target[lines, groups].shape, piece.shape[1])
            write_digits(piece, digits, trits.shape, at)
            encoder.write(target[lines, groups])
    return rows


def unpack_rows(rows: np.ndarray, in_features: int) -> np.ndarray:
    """Unpack the tier's rows. All bytes are accepted and decoded as in the kernels.

    Args:
        rows: (..., out, row_bytes(in_features)) uint8 of any strides.
        in_features: trits in a row.

    Returns:
        (..., out, in_features) int8 trits. `check_rows` checks whether the bytes are valid.

    Raises:
        TernaryError: wrong type or shape.
    """
    rows = _require_packed_rows(rows, in_features)
    trits = np.empty((*rows.shape[:-1], in_features), np.int8)
    decoder = Decoder(min(CHUNK, rows.size), _TRITS)
    for _, (source, target) in matrix_views(rows, trits):
        for lines, groups in blocks(source, CHUNK):
            piece = target[lines, _columns(groups, in_features)]
            packed = source[lines, groups].reshape(-1)
            if piece.flags.c_contiguous and piece.size == GROUP * packed.size:
                decoder.write(packed, piece.reshape(-1))
            else:
                values = decoder.digits(packed).view(np.int8).reshape(len(piece), -1)
                piece[:] = values[:, : piece.shape[1]]
    return trits


def check_rows(rows: np.ndarray, in_features: int) -> None:
    """Refuse rows that `pack_rows` cannot have written.

    Args:
        rows: (..., out, row_bytes(in_features)) uint8 of any strides.
        in_features: trits in a row.

    Raises:
        TernaryError: wrong type or shape; or one of the 13 bytes that no trits are packed into, or
            padding other than trit 0; the message has its position.
    """
    rows = _require_packed_rows(rows, in_features)
    full, used = divmod(in_features, GROUP)
    for first, (matrix,) in matrix_views(rows):
        for lines, groups in blocks(matrix, CHUNK):
            piece = matrix[lines, groups]
            wrong = ~_IS_ENCODED[piece]
            rest = max(0, full - groups.start)
            wrong[:, rest:] |= piece[:, rest:] != _ZEROS
            if used and groups.start <= full < groups.stop:
                partial = piece[:, rest]
                padded = (DIGITS[partial, used:] == ZERO).all(axis=1)
                wrong[:, rest] = ~(_IS_ENCODED[partial] & padded)
            if wrong.any():
                line, group = (int(i[0]) for i in wrong.nonzero())
                row, column = first + lines.start + line, groups.start + group
                index = [int(i) for i in np.unravel_index(row, rows.shape[:-1])] + [column]
                byte = piece[line, group]
                what = (
                    "encodes no five trits" if not _IS_ENCODED[byte] else "has padding other than 0"
                )
                raise TernaryError(f"byte {byte} at {index} {what}")


def flat_to_rows(packed: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Convert the overlays' flat bytes to the tier's rows. It uses a table if 5 divides `in`.

    Args:
        packed: (ceil(product of shape / 5),) uint8, from `pack_tq1_0`.
        shape: (..., out, in) of the trits.

    Returns:
        (..., out, row_bytes(in)) uint8.

    Raises:
        TernaryError: wrong type, shape or length, or a byte above 242, named with its position.

    Warns:
        UserWarning: padding in the last byte that is not trit 0.
    """
    shape = _require_matrix_shape(shape)
    packed = flat.require_packed(packed, prod(shape))
    rows = np.empty((*shape[:-1], row_bytes(shape[-1])), np.uint8)
    encoder = _RowEncoder(rows)
    decoder = Decoder(min(CHUNK, rows.size) + 1, _FLAT_DIGITS)
    done = 0  # trits
    for _, (target,) in matrix_views(rows):
        for lines, groups in blocks(target, CHUNK):
            piece = target[lines, groups]
            width = _width(groups, shape[-1])
            start, phase = divmod(done, GROUP)
            done += len(piece) * width
            source = packed[start : flat.packed_bytes(done)]
            if shape[-1] % GROUP == 0:
                piece[:, : width // GROUP] = _FLAT_TO_ROW[source].reshape(len(piece), -1)
                piece[:, width // GROUP :] = _ZEROS
            else:
                digits = decoder.digits(source)[phase : phase + len(piece) * width]
                encoder.take_digits(piece.shape, width)[:] = digits.reshape(len(piece), width)
                encoder.write(piece)
    return rows


def rows_to_flat(rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Convert the tier's rows to the overlays' flat bytes. It uses a table if 5 divides `in`.

    Args:
        rows: (..., out, row_bytes(in)) uint8 of any strides, valid according to `check_rows`.
        shape: (..., out, in) of the trits.

    Returns:
        (ceil(product of shape / 5),) uint8, the same as from `pack_tq1_0`.

    Raises:
        TernaryError: wrong type or shape.
    """
    shape = _require_matrix_shape(shape)
    rows = _require_packed_rows(rows, shape[-1])
    if rows.shape[:-1] != shape[:-1]:
        raise TernaryError(f"rows: expected leading shape {shape[:-1]}, got {rows.shape[:-1]}")
    packed = np.empty((flat.packed_bytes(prod(shape)),), np.uint8)
    encoder = Encoder(min(CHUNK, rows.size) + 1, FIRST_IS_LEAST)
    decoder = Decoder(min(CHUNK, rows.size), _ROW_DIGITS)
    done = 0  # bytes
    kept = 0  # number of digits at the start of the encoder's buffer that are not a whole group yet
    for _, (matrix,) in matrix_views(rows):
        for lines, groups in blocks(matrix, CHUNK):
            piece = matrix[lines, groups]
            width = _width(groups, shape[-1])
            if shape[-1] % GROUP == 0:
                numbers = _ROW_TO_FLAT[piece[:, : width // GROUP].reshape(-1)]
            else:
                digits = decoder.digits(piece.reshape(-1)).reshape(len(piece), -1)[:, :width]
                filled = kept + digits.size
                encoder.digits[kept:filled].reshape(digits.shape)[:] = digits
                numbers = encoder.numbers(filled // GROUP)
                kept = filled % GROUP
                encoder.digits[:kept] = encoder.digits[filled - kept : filled]
            packed[done : done + numbers.size] = numbers
            done += numbers.size
    if kept:
        encoder.digits[kept:GROUP] = ZERO
        packed[done:] = encoder.numbers(1)
    return packed


class _RowEncoder(Encoder):
    """Packs digits into row bytes, one block at a time."""

    def __init__(self, rows: np.ndarray) -> None:
        size = min(CHUNK, rows.size)
        super().__init__(size, FIRST_IS_MOST)
        # Numerators 256 q + 242: the number q goes into the high bytes, the low bytes stay 242.
        self._numerators = np.full(size, NUMBERS - 1, np.uint16)

    def take_digits(self, shape: tuple[int, ...], width: int) -> np.ndarray:
        """A buffer (rows, width) to fill with digits, for a block (rows, groups) with padding."""
        digits = self.digits[: GROUP * shape[0] * shape[1]].reshape(shape[0], -1)
        digits[:, width:] = ZERO
        return digits[:, :width]

    def write(self, target: np.ndarray) -> None:
        """Pack the digits into `target`, (rows, groups) uint8."""
        numerators = self._numerators[: target.size]
        numerators.view(np.uint8)[1::2] = self.numbers(target.size)
        quotients = numerators.reshape(target.shape)
        np.floor_divide(quotients, NUMBERS, out=target, casting="unsafe")


def _columns(groups: slice, in_features: int) -> slice:
    return slice(GROUP * groups.start, min(GROUP * groups.stop, in_features))


def _width(groups: slice, in_features: int) -> int:
    columns = _columns(groups, in_features)
    return max(0, columns.stop - columns.start)


def _require_matrix_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = require_shape(shape)
    if not shape:
        raise TernaryError("shape: expected (..., out, in), got ()")
    return shape


def _require_packed_rows(rows: np.ndarray, in_features: int) -> np.ndarray:
    rows = require_rows("rows", rows, np.uint8)
    expected = row_bytes(in_features)
    if rows.shape[-1] != expected:
        raise TernaryError(
            f"rows: expected {expected} bytes a row for {in_features} trits, got {rows.shape[-1]}"
        )
    return rows
