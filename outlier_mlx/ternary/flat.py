"""The overlays' packed form: a tensor flattened, five trits a byte.

Trits are taken in row-major order, across row ends. With digits d = trit + 1 a byte is
d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4, the first trit in the least significant digit; trit 0 pads the
last byte. Neither shape nor scale is in the data. (Outlier's own form: ggml's TQ1_0 is another,
see `ggml`.)
"""

import warnings
from collections.abc import Sequence
from math import prod

import numpy as np

from outlier_mlx.ternary.arrays import (
    TernaryError,
    refuse_trits,
    require_array,
    require_shape,
    scratch,
)

GROUP = 5
NUMBERS = 3**GROUP  # 243

# Number of groups processed at a time. It is large, because each NumPy call has a cost and takes
# the GIL; and small enough that their digits (160 KB) and words (256 KB, twice) stay in a
# second-level cache.
_CHUNK = 32768

# A group's digits or trits are the low bytes of a 64-bit word. (All platforms of MLX are
# little-endian.)
_WORD = 8
SPILL = _WORD - GROUP
# Byte 4 of digits * _GATHER is the sum of digit[k] * 3**k. No carry reaches it: the sums in the
# bytes below stay under 243 as well.
_SUM = GROUP - 1
_GATHER = np.uint64(sum(3**k << 8 * (_SUM - k) for k in range(GROUP)))
# (256, 8): the trits of a byte, then zeros; bytes of 243 and more have none.
_GROUPS = np.zeros((256, _WORD), np.int8)
_GROUPS[:, :GROUP] = np.arange(256)[:, None] // 3 ** np.arange(GROUP) % 3 - 1
_WORDS = _GROUPS.view(np.uint64)[:, 0]


def pack_tq1_0(trits: np.ndarray) -> np.ndarray:
    """Pack trits five to a byte, the first in the least significant digit.

    Args:
        trits: int8 of any shape and strides, every value -1, 0 or 1.

    Returns:
        (ceil(trits.size / 5),) uint8. 1, 0, -1, -1, 0 gives 86.

    Raises:
        TernaryError: wrong type, or a trit outside -1..1, named with its position.
    """
    trits = require_array("trits", trits, np.int8)
    packed = np.empty((packed_bytes(trits.size),), np.uint8)
    flat = trits.reshape(-1) if trits.flags.c_contiguous else trits.flat
    digits, words = scratch(GROUP * min(_CHUNK, packed.size) + SPILL, words_bytes(packed.size))
    for start in range(0, packed.size, _CHUNK):
        part = np.asarray(flat[GROUP * start : GROUP * (start + _CHUNK)])
        filled = digits[: part.size]
        np.add(part.view(np.uint8), np.uint8(1), out=filled)
        if filled.max() > 2:
            refuse_trits(part, trits.shape, GROUP * start)
        digits[part.size : part.size + GROUP] = 1  # trit 0, if the last group is not whole
        gather_digits(digits, words, packed[start : start + _CHUNK])
    return packed


def unpack_tq1_0(packed: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Unpack what `pack_tq1_0` packed.

    Args:
        packed: (ceil(product of shape / 5),) uint8.
        shape: shape of the trits.

    Returns:
        int8 trits of that shape.

    Raises:
        TernaryError: wrong type or length, or a byte above 242, named with its position.

    Warns:
        UserWarning: padding in the last byte that is not trit 0.
    """
    shape = require_shape(shape)
    size = prod(shape)
    packed = require_packed(packed, size)
    trits = np.empty(shape, np.int8)
    flat = trits.reshape(-1)
    whole, rest = divmod(size, GROUP)
    spread_trits(packed[:whole], flat[: GROUP * whole], *scratch(*2 * [words_bytes(whole)]))
    if rest:
        flat[-rest:] = _GROUPS[packed[-1], :rest]
    return trits


def gather_digits(digits: np.ndarray, words: np.ndarray, packed: np.ndarray) -> None:
    """Write groups of digits (0, 1, 2) to flat bytes, each group's first least significant.

    One 64-bit multiplication gathers a group, with a single strided pass over the digits. Horner's
    rule would need five, and strided passes are slow in NumPy.

    Args:
        digits: uint8, five for each byte, and `SPILL` more of any content.
        words: a buffer of `words_bytes(packed.size)` bytes.
        packed: (bytes,) uint8, written.
    """
    for start in range(0, packed.size, _CHUNK):
        part = packed[start : start + _CHUNK]
        gathered = words.view(np.uint64)[: part.size]
        # Words at a distance of five bytes, each with a group in its low five.
        windows = np.ndarray(part.shape, np.uint64, digits[GROUP * start :], strides=(GROUP,))
        np.copyto(gathered, windows)
        np.multiply(gathered, _GATHER, out=gathered)
        np.copyto(part, gathered.view(np.uint8)[_SUM::_WORD])


def spread_trits(
    packed: np.ndarray, trits: np.ndarray, indices: np.ndarray, words: np.ndarray
) -> None:
    """Write the trits of flat bytes, whatever `packed` holds.

    Args:
        packed: (bytes,) uint8.
        trits: (5 * bytes,) int8, written.
        indices: a buffer of `words_bytes(packed.size)` bytes.
        words: another.
    """
    for start in range(0, packed.size, _CHUNK):
        part = packed[start : start + _CHUNK]
        values = trits[GROUP * start : GROUP * (start + _CHUNK)]
        numbers, groups = indices.view(np.intp)[: part.size], words.view(np.uint64)[: part.size]
        np.copyto(numbers, part)
        # No index is out of range, but mode "raise" would make a copy.
        _WORDS.take(numbers, out=groups, mode="clip")
        # Groups are stored as four trits and one, which is much faster than as rows of five.
        fours = np.ndarray(part.shape, np.uint32, values, strides=(GROUP,))
        np.copyto(fours, groups, casting="unsafe")
        np.copyto(values[GROUP - 1 :: GROUP], groups.view(np.int8)[GROUP - 1 :: _WORD])


def words_bytes(packed: int) -> int:
    """Bytes of a buffer for the words of so many flat bytes; not all are needed at a time."""
    return _WORD * min(_CHUNK, packed)


def packed_bytes(trits: int) -> int:
    """Bytes that hold this many trits: ceil(trits / 5)."""
    return -(-trits // GROUP)


def require_packed(packed: np.ndarray, size: int) -> np.ndarray:
    """`packed` itself, if it is one-dimensional uint8 that holds `size` trits.

    Refuses another length, and bytes above 242, by position; warns if the digits of the last byte
    that are beyond `size` trits are not those of trit 0.
    """
    packed = require_array("packed", packed, np.uint8)
    if packed.shape != (packed_bytes(size),):
        raise TernaryError(
            f"packed: expected {packed_bytes(size)} bytes in one dimension for {size} trits, got"
            f" shape {packed.shape}"
        )
    if size and packed.max() >= NUMBERS:
        for start in range(0, packed.size, _CHUNK):
            wrong = (packed[start : start + _CHUNK] >= NUMBERS).nonzero()[0]
            if wrong.size:
                first = start + int(wrong[0])
                raise TernaryError(
                    f"byte {packed[first]} at {first} encodes no five trits (0..242 do)"
                )
    used = size % GROUP
    if used and _GROUPS[packed[-1], used:GROUP].any():
        warnings.warn(
            f"the last byte, {packed[-1]}, pads {size} trits with something other than 0",
            stacklevel=3,
        )
    return packed
