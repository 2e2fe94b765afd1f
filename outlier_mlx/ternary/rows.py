"""The tier's row layout `tq1_0_strided`: five trits a byte, as the GPU kernels want them.

A row of B bytes holds trit n B + j as digit n of byte j, for n = 0 .. 4, so that the same digit of
neighbouring bytes belongs to neighbouring weights. B is a multiple of 16; weights beyond the row's
are trit 0. With digits d = trit + 1, most significant first, a byte's number is
q = 81 d0 + 27 d1 + 9 d2 + 3 d3 + d4. The byte is q / 243 as a fraction of 256, rounded up:
(256 q + 242) // 243, as in ggml's TQ1_0. So each multiplication of the byte by 3 carries out the
next digit, and 13 of the 256 bytes are never written.

Everything here is arithmetic on bytes, modulo 256, over long runs of neighbours: NumPy does that
with the processor's vector instructions, 16 to 64 bytes at a time.
"""

from collections.abc import Iterator, Sequence
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
    require_trits,
    scratch,
)
from outlier_mlx.ternary.flat import GROUP, NUMBERS

_MULTIPLE = 16
# Bytes of packed rows at a time. Large, because each NumPy call has a cost and takes the GIL; small
# enough that the trits (five times as many) and two or three buffers stay in a second-level cache.
_CHUNK = 131072


def row_bytes(in_features: int) -> int:
    """Bytes of a row of `in_features` trits: ceil(in_features / 5), rounded up to a multiple of 16.

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
    rows = np.empty((*trits.shape[:-1], row_bytes(trits.shape[-1])), np.uint8)
    buffers = scratch(*2 * [min(_CHUNK, rows.size)])
    for first, (source, target) in matrix_views(trits, rows):
        for lines, columns in blocks(target, _CHUNK):
            if columns.start == 0:
                at = (first + lines.start) * source.shape[1]
                require_trits(source[lines], trits.shape, at)
            _pack(source[lines], target[lines, columns], columns, buffers)
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
    buffers = scratch(*3 * [min(_CHUNK, rows.size)])
    for _, (source, target) in matrix_views(rows, trits):
        for lines, columns in blocks(source, _CHUNK):
            _unpack(source[lines, columns], target[lines], columns, buffers)
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
    (rests,) = scratch(min(_CHUNK, rows.size))
    for first, (matrix,) in matrix_views(rows):
        for lines, columns in blocks(matrix, _CHUNK):
            piece = matrix[lines, columns]
            rest = _like(piece, rests)
            # Five multiplications by 3: what remains is what rounding up has added.
            np.multiply(piece, np.uint8(NUMBERS), out=rest)
            padding = list(_padding(piece, columns.start, in_features, matrix.shape[1]))
            if rest.max() < NUMBERS and not any(wrong.any() for _, wrong in padding):
                continue
            unused = rest >= NUMBERS
            wrong = unused.copy()
            for at, found in padding:
                wrong[:, at] |= found
            line, column = (int(i[0]) for i in wrong.nonzero())
            row = first + lines.start + line
            index = [int(i) for i in np.unravel_index(row, rows.shape[:-1])]
            what = "encodes no five trits" if unused[line, column] else "has padding other than 0"
            raise TernaryError(
                f"byte {piece[line, column]} at {[*index, columns.start + column]} {what}"
            )


def flat_to_rows(packed: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Convert the overlays' flat bytes to the tier's rows.

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
    for part, target in _whole_groups(packed, rows, shape[-1]):
        words = flat.words_bytes(part.size)
        trits, *buffers = scratch(GROUP * part.size, words, words, target.size, target.size)
        flat.spread_trits(part, trits.view(np.int8), *buffers[:2])
        source = trits[: len(target) * shape[-1]].reshape(len(target), -1)
        _pack(source.view(np.int8), target, slice(target.shape[1]), buffers[2:])
    return rows


def rows_to_flat(rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Convert the tier's rows to the overlays' flat bytes.

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
    for part, source in _whole_groups(packed, np.ascontiguousarray(rows), shape[-1]):
        size = GROUP * part.size + flat.SPILL
        digits, words, *buffers = scratch(size, flat.words_bytes(part.size), *3 * [source.size])
        used = digits[: len(source) * shape[-1]]
        trits = used.reshape(len(source), -1)
        _unpack(source, trits.view(np.int8), slice(source.shape[1]), buffers)
        np.add(used, np.uint8(1), out=used)
        digits[used.size :] = 1
        flat.gather_digits(digits, words, part)
    return packed


def _pack(
    trits: np.ndarray, packed: np.ndarray, columns: slice, buffers: Sequence[np.ndarray]
) -> None:
    """Pack trits (rows, in) int8 into `packed`, the bytes `columns` of their rows.

    Args:
        trits: every value -1, 0 or 1.
        packed: (rows, columns) uint8, written.
        columns: which bytes of the rows these are.
        buffers: two, of `packed.size` bytes or more.
    """
    missing, scaled = (_like(packed, buffer) for buffer in buffers)
    # 243 - q by Horner's rule: it becomes 122 - (81 t0 + 27 t1 + 9 t2 + 3 t3 + t4).
    missing[:] = 90  # 81 * 90 is 122 modulo 256
    for n, run in _runs(trits, columns):
        if n:
            np.multiply(missing, np.uint8(3), out=missing)
        part = missing[:, : run.shape[1]]
        np.subtract(part, run.view(np.uint8), out=part)
    write_fractions(missing, scaled, packed)


def write_fractions(missing: np.ndarray, scaled: np.ndarray, packed: np.ndarray) -> None:
    """Write the bytes of numbers q to `packed`, given `missing` = 243 - q.

    Args:
        missing: uint8.
        scaled: a buffer of the same shape.
        packed: uint8 of the same shape, written.
    """
    # m = 243 - q is in 1 .. 243, and the byte is 256 - m - 13 m // 243. In this range 13 m // 243
    # is (m + m // 60) // 19, which needs no more than 8 bits.
    np.floor_divide(missing, np.uint8(60), out=scaled)
    np.add(scaled, missing, out=scaled)
    np.floor_divide(scaled, np.uint8(19), out=scaled)
    np.add(scaled, missing, out=scaled)
    np.negative(scaled, out=packed)


def _unpack(
    packed: np.ndarray, trits: np.ndarray, columns: slice, buffers: Sequence[np.ndarray]
) -> None:
    """Write the trits in `packed`, the bytes `columns` of rows, to `trits` (rows, in) int8.

    Args:
        packed: (rows, columns) uint8, any bytes.
        trits: those of these bytes are written.
        columns: which bytes of the rows these are.
        buffers: three, of `packed.size` bytes or more.
    """
    rest, above, below = (_like(packed, buffer) for buffer in buffers)
    np.copyto(rest, packed)
    for n, run in _runs(trits, columns):
        if n:
            np.multiply(rest, np.uint8(3), out=rest)
        part = slice(run.shape[1])
        write_leading(rest[:, part], above[:, part], below[:, part], run)


def write_leading(
    rest: np.ndarray, above: np.ndarray, below: np.ndarray, trits: np.ndarray
) -> None:
    """Write the trit of the first digit of every byte.

    Args:
        rest: uint8. Multiplied by 3, modulo 256, it has the next digit as its first.
        above: uint8, a buffer of the same shape.
        below: another.
        trits: int8 of the same shape, written.
    """
    # Thirds of 256: the digit is 0 below the first, 2 from the second on.
    np.greater_equal(rest, np.uint8(171), out=above.view(bool))
    np.less(rest, np.uint8(86), out=below.view(bool))
    np.subtract(above.view(np.int8), below.view(np.int8), out=trits)


def _runs(trits: np.ndarray, columns: slice) -> Iterator[tuple[int, np.ndarray]]:
    """Number n and a view of the trits that are digit n of the bytes `columns` of rows.

    The views are (rows, columns), or narrower, or empty, where the rows of `trits` end.
    """
    size = row_bytes(trits.shape[1])
    for n in range(GROUP):
        first = n * size + (columns.start or 0)
        yield n, trits[:, first : n * size + columns.stop]


def _like(packed: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """The beginning of a buffer in the shape of `packed`."""
    return buffer[: packed.size].reshape(packed.shape)


def _whole_groups(
    packed: np.ndarray, rows: np.ndarray, width: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut flat bytes and contiguous rows of the same trits alike, where both begin with a byte.

    Yields views of both, the latter as (rows, row_bytes).
    """
    matrix = rows.reshape(prod(rows.shape[:-1]), rows.shape[-1])
    cycle = 1 if width % GROUP == 0 else GROUP
    step = max(1, _CHUNK // max(1, cycle * matrix.shape[1])) * cycle
    for start in range(0, len(matrix), step):
        lines = matrix[start : start + step]
        end = (start + len(lines)) * width
        yield packed[start * width // GROUP : flat.packed_bytes(end)], lines


def _padding(
    piece: np.ndarray, start: int, in_features: int, size: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Where `piece`, bytes from column `start` of rows of `size` bytes, has padding not trit 0.

    Yields columns of the piece, with the bytes in them that are wrong: (rows, columns) bool.
    """
    whole, more = divmod(in_features, size)
    # Up to column `more`, bytes hold one trit more than the others.
    for first, last, used in ((0, more, whole + 1), (more, size, whole)):
        at = slice(max(0, first - start), max(0, min(last - start, piece.shape[1])))
        if used == GROUP or at.start >= at.stop:
            continue
        # What remains after the digits in use has to start with ones.
        powers = 3 ** (GROUP - used)
        least = -(-256 * (powers // 2) // powers)
        most = -(-256 * (powers // 2 + 1) // powers) - 1
        rest = piece[:, at] * np.uint8(3**used)
        yield at, (rest < least) | (rest > most)


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
