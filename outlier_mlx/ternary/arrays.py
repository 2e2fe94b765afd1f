"""Shared by all codecs here: check arguments, then go through arrays in small blocks."""

import operator
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NoReturn

import numpy as np


class TernaryError(ValueError):
    """Trits or packed bytes are not what they should be; the message says where."""


def require_array(name: str, array: Any, dtype: type[np.generic]) -> np.ndarray:
    """`array` itself, if it is a NumPy array of `dtype`."""
    if not isinstance(array, np.ndarray):
        raise TernaryError(f"{name}: expected a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise TernaryError(f"{name}: expected {np.dtype(dtype)}, got {array.dtype}")
    return np.asarray(array)


def require_rows(name: str, array: Any, dtype: type[np.generic]) -> np.ndarray:
    """`array` itself, if it is a NumPy array of `dtype` with at least one dimension."""
    array = require_array(name, array, dtype)
    if array.ndim == 0:
        raise TernaryError(f"{name}: expected rows, got a single number")
    return array


def require_blocks(name: str, array: np.ndarray, size: int) -> int:
    """The number of blocks of `size` in each row of `array` (..., n)."""
    count, rest = divmod(array.shape[-1], size)
    if rest:
        raise TernaryError(f"{name}: rows of {array.shape[-1]} are not whole blocks of {size}")
    return count


def require_finite(d: np.ndarray) -> None:
    """Refuse scales of blocks, (..., blocks), that are not numbers."""
    finite = np.isfinite(d)
    if not finite.all():
        index = [int(i) for i in np.argwhere(~finite)[0]]
        raise TernaryError(f"the scale of block {index} is {d[tuple(index)]}")


def require_size(name: str, value: Any) -> int:
    """`value` as an int of at least 0; booleans and floats are refused."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or number < 0:
        raise TernaryError(f"{name}: expected an integer of at least 0, got {value!r}")
    return number


def require_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` as a tuple of ints, none negative."""
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TernaryError(f"shape: expected a tuple of integers, got {shape!r}")
    return tuple(require_size("shape", size) for size in shape)


_thread = threading.local()
_ALIGNMENT = 64


def scratch(*sizes: int) -> list[np.ndarray]:
    """Buffers of this thread: for each size, uint8 of any content. The next call reuses the memory.

    A thread keeps it, because the system clears new memory page by page, which takes about as long
    as to pack trits into it.
    """
    starts = list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    memory: np.ndarray | None = getattr(_thread, "memory", None)
    if memory is None or memory.size < starts[-1]:
        memory = _thread.memory = np.empty(starts[-1], np.uint8)
    return [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def items(array: np.ndarray, start: int, size: int) -> np.ndarray:
    """Bytes `start` to `start + size` of the last axis as one item each, which copies faster.

    Args:
        array: (..., n) of bytes, the last axis contiguous.
        start: the first byte.
        size: number of bytes.

    Returns:
        A view of shape (...).
    """
    found: np.ndarray = array[..., start : start + size].view(f"V{size}")[..., 0]
    return found


def require_trits(trits: np.ndarray, shape: tuple[int, ...], at: int) -> None:
    """Refuse any other trit than -1, 0 or 1; see `refuse_trits`."""
    if trits.min(initial=0) < -1 or trits.max(initial=0) > 1:
        refuse_trits(trits, shape, at)


def refuse_trits(trits: np.ndarray, shape: tuple[int, ...], at: int) -> NoReturn:
    """Refuse trits by the first that is not -1, 0 or 1.

    Args:
        trits: int8, row-major neighbours within an array of `shape`.
        shape: shape of the array that the trits come from.
        at: the flat index of the first of them in that array.
    """
    first = int(((trits < -1) | (trits > 1)).argmax())
    trit, at = trits.flat[first], at + first
    index = [int(i) for i in np.unravel_index(at, shape)]
    raise TernaryError(f"trit {trit} at {index} (flat index {at}) is not -1, 0 or 1")


def matrix_views(*arrays: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Arrays of shapes (..., a), (..., b) as matrices (rows, a), (rows, b), never copied.

    Yields the number of the first row with the matrices: once where the strides allow it, else
    once for each leading index.
    """
    leading = arrays[0].shape[:-1]
    try:
        merged = tuple(a.reshape((prod(leading), a.shape[-1]), copy=False) for a in arrays)
    except ValueError:
        for plane, index in enumerate(np.ndindex(leading[:-1])):
            yield plane * leading[-1], tuple(a[index] for a in arrays)
    else:
        yield 0, merged


def blocks(matrix: np.ndarray, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix in row-major order: slices of rows and columns, at most `limit` elements each.

    A piece is whole rows where a row fits, else a part of one row.
    """
    rows, columns = matrix.shape
    step = max(1, limit // max(1, columns))
    for row in range(0, rows, step):
        for column in range(0, columns, limit):
            yield slice(row, min(row + step, rows)), slice(column, min(column + limit, columns))
