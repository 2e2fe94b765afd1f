"""Trits in two bits each, four a byte, the first in the lowest bits: codes of trit + 1.

MLX's affine 2-bit words (little-endian) and the blocks Q2_0 and PQ2_0 of GGUF have this order.
"""

import numpy as np

from outlier_mlx.ternary.arrays import scratch
from outlier_mlx.ternary.flat import GROUP, NUMBERS
from outlier_mlx.ternary.rows import row_bytes, write_fractions

_CHUNK = 1 << 18  # bytes handled at a time: buffers of their size stay in a second-level cache
_BYTE = np.arange(256, dtype=np.uint8)[:, None]
_FOUR = (_BYTE >> np.arange(0, 8, 2, dtype=np.uint8) & 3).view(np.uint32)[:, 0]
# Two bytes make eight codes, a byte each.
_EIGHT = (_FOUR.astype(np.uint64)[:, None] << np.uint64(32) | _FOUR[None, :]).reshape(-1)
_LOW_BITS = np.uint64(0x5555555555555555)
_ONES = np.uint64(0x0101010101010101)


def unpack_twos(packed: np.ndarray) -> np.ndarray:
    """Codes less 1.

    Args:
        packed: (..., n) uint8.

    Returns:
        (..., 4 n) int8; the code 3, which is no trit, gives 2.
    """
    flat = np.ascontiguousarray(packed).reshape(-1)
    trits = np.empty(4 * flat.size, np.int8)
    for start in range(0, flat.size, _CHUNK // 4):
        part = flat[start : start + _CHUNK // 4]
        pairs = part[: part.size & ~1].view("<u2")
        target = trits[4 * start : 4 * (start + 2 * pairs.size)].view(np.uint64)
        # No index is out of range, but mode "raise" would make a copy.
        _EIGHT.take(pairs.astype(np.intp), out=target, mode="clip")
        if part.size & 1:
            trits[-4:] = _FOUR[part[-1:]].view(np.int8)
        trits[4 * start : 4 * (start + part.size)] -= 1
    return trits.reshape(*packed.shape[:-1], -1)


def twos_to_rows(packed: np.ndarray) -> np.ndarray:
    """Convert rows of codes to rows of `pack_rows`, the same as by way of `unpack_twos`.

    Args:
        packed: (rows, in / 4) uint8, contiguous, `in` a multiple of 8; no code is 3.

    Returns:
        (rows, row_bytes(in)) uint8.
    """
    pairs = packed.view("<u2")
    size = row_bytes(4 * packed.shape[1])
    rows = np.empty((len(packed), size), np.uint8)
    step = max(1, _CHUNK // max(1, packed.shape[1]))
    for start in range(0, len(rows), step):
        target = rows[start : start + step]
        buffers = [buffer.view(np.uint64) for buffer in scratch(*3 * [target.size])]
        numbers = buffers[0].reshape(len(target), -1)
        # Horner's rule for eight bytes at once: all are below 243, so that none carries.
        for n in range(GROUP):
            part = pairs[start : start + step, n * size // 8 : (n + 1) * size // 8]
            indices, digits = (buffer[: part.size].reshape(part.shape) for buffer in buffers[1:])
            np.copyto(indices, part)
            if n == 0 and part.shape == numbers.shape:
                _EIGHT.take(indices.view(np.intp), out=numbers, mode="clip")
                continue
            _EIGHT.take(indices.view(np.intp), out=digits, mode="clip")
            if n == 0:
                numbers[:] = 0
            else:
                numbers *= np.uint64(3)
            numbers[:, : part.shape[1]] += digits
            numbers[:, part.shape[1] :] += _ONES
        missing = numbers.view(np.uint8)
        np.subtract(np.uint8(NUMBERS), missing, out=missing)
        write_fractions(missing, buffers[1].view(np.uint8).reshape(target.shape), target)
    return rows


def has_code_3(packed: np.ndarray) -> bool:
    """Whether any code in these bytes (uint8, any shape) is 3."""
    flat = np.ascontiguousarray(packed).reshape(-1)
    whole = flat.size // 8 * 8
    for start in range(0, whole, _CHUNK):
        words = flat[start : min(whole, start + _CHUNK)].view(np.uint64)
        (found,) = (buffer.view(np.uint64) for buffer in scratch(words.nbytes))
        np.right_shift(words, np.uint64(1), out=found)
        found &= words
        found &= _LOW_BITS
        if found.any():
            return True
    rest = flat[whole:]
    return bool((rest & rest >> np.uint8(1) & np.uint8(0x55)).any())


def pack_twos(trits: np.ndarray) -> np.ndarray:
    """Pack trits as codes of trit + 1; the inverse of `unpack_twos`.

    Args:
        trits: (..., 4 n) int8, each -1, 0 or 1.

    Returns:
        (..., n) uint8.
    """
    codes = np.ascontiguousarray(trits) + np.int8(1)
    words = codes.view("<u4")
    words |= words >> np.uint32(6)
    words |= words >> np.uint32(12)
    return words.astype(np.uint8)
