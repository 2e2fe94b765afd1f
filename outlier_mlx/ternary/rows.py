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
)
from outlier_mlx.ternary.digits import GROUP, NUMBERS

_MULTIPLE = 16
# Bytes of packed rows at a time. Large, because each NumPy call has a cost and takes the GIL; small
# enough that the trits (five times as many) and two or three buffers stay in a second-level cache.
_CHUNK = 65536

# The fractions from which the next digit is 1, and 2.
_ONE, _TWO = 86, 171


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
    packer = _Packer(min(_CHUNK, rows.size))
    for first, (source, target) in matrix_views(trits, rows):
        for lines, columns in blocks(target, _CHUNK):
            runs = list(_runs(source[lines], target.shape[1], columns))
            at = (first + lines.start) * source.shape[1]
            require_trits(source[lines], runs, trits.shape, at)
            packer.pack(runs, target[lines, columns])
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
    unpacker = _Unpacker(min(_CHUNK, rows.size))
    for _, (source, target) in matrix_views(rows, trits):
        for lines, columns in blocks(source, _CHUNK):
            runs = list(_runs(target[lines], source.shape[1], columns))
            unpacker.unpack(source[lines, columns], runs)
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
    rests = np.empty(min(_CHUNK, rows.size), np.uint8)
    for first, (matrix,) in matrix_views(rows):
        for lines, columns in blocks(matrix, _CHUNK):
            piece = matrix[lines, columns]
            rest = rests[: piece.size].reshape(piece.shape)
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
    for lines, target in _whole_bytes(rows):
        begin, end = (shape[-1] * row for row in lines)
        part = packed[begin // GROUP : flat.packed_bytes(end)]
        trits = flat.unpack_tq1_0(part, (GROUP * part.size,))[: end - begin]
        target[:] = pack_rows(trits.reshape(len(target), -1))
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
    for lines, source in _whole_bytes(np.ascontiguousarray(rows)):
        begin, end = (shape[-1] * row for row in lines)
        part = packed[begin // GROUP : flat.packed_bytes(end)]
        part[:] = flat.pack_tq1_0(unpack_rows(source, shape[-1]))
    return packed


class _Packer:
    """Packs runs of trits, with buffers of its own: do not share it among threads."""

    def __init__(self, size: int) -> None:
        self._missing, self._scaled = np.empty((2, size), np.uint8)

    def pack(self, runs: Sequence[np.ndarray], target: np.ndarray) -> None:
        """Pack runs, each (rows, up to columns) int8, into `target` (rows, columns) uint8."""
        missing = self._missing[: target.size].reshape(target.shape)
        scaled = self._scaled[: target.size].reshape(target.shape)
        # 243 - q by Horner's rule: it becomes 122 - (81 t0 + 27 t1 + 9 t2 + 3 t3 + t4).
        missing[:] = 90  # 81 * 90 is 122 modulo 256
        for n in range(GROUP):
            if n:
                np.multiply(missing, np.uint8(3), out=missing)
            if n < len(runs):
                part = missing[:, : runs[n].shape[1]]
                np.subtract(part, runs[n].view(np.uint8), out=part)
        # The byte is 256 - m - 13 m // 243 for m = 243 - q, which is in 1 .. 243. There,
        # 13 m // 243 is (m + m // 60) // 19, which needs no more than 8 bits.
        np.floor_divide(missing, np.uint8(60), out=scaled)
        np.add(scaled, missing, out=scaled)
        np.floor_divide(scaled, np.uint8(19), out=scaled)
        np.add(scaled, missing, out=scaled)
        np.negative(scaled, out=target)


class _Unpacker:
    """Unpacks bytes into runs of trits, with buffers of its own."""

    def __init__(self, size: int) -> None:
        self._rest, self._above, self._below = np.empty((3, size), np.uint8)

    def unpack(self, packed: np.ndarray, runs: Sequence[np.ndarray]) -> None:
        """Unpack (rows, columns) uint8 into runs, each (rows, up to columns) int8."""
        rest, above, below = (
            buffer[: packed.size].reshape(packed.shape)
            for buffer in (self._rest, self._above, self._below)
        )
        np.copyto(rest, packed)
        for n, run in enumerate(runs):
            if n:
                np.multiply(rest, np.uint8(3), out=rest)
            part = slice(run.shape[1])
            high = np.greater_equal(rest[:, part], np.uint8(_TWO), out=above[:, part].view(bool))
            low = np.less(rest[:, part], np.uint8(_ONE), out=below[:, part].view(bool))
            np.subtract(high.view(np.int8), low.view(np.int8), out=run)


def _runs(trits: np.ndarray, size: int, columns: slice) -> Iterator[np.ndarray]:
    """Views of the trits that are digits 0, 1, ... of the bytes `columns` of rows of `size` bytes.

    Each is (rows, columns), or narrower where the row ends; what is empty is left out.
    """
    for n in range(GROUP):
        run = trits[:, n * size + columns.start : n * size + columns.stop]
        if run.shape[1]:
            yield run


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


def _whole_bytes(rows: np.ndarray) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Cut rows into pieces that begin where a flat byte does.

    Yields the numbers of the first row and of the one after the last, with the rows.
    """
    matrix = rows.reshape(prod(rows.shape[:-1]), rows.shape[-1])
    step = max(1, _CHUNK // max(1, GROUP * matrix.shape[1])) * GROUP
    for start in range(0, len(matrix), step):
        stop = min(start + step, len(matrix))
        yield (start, stop), matrix[start:stop]


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
