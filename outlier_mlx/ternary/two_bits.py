"""Trits in two bits each, four a byte, the first in the lowest bits: codes of trit + 1.

MLX's affine 2-bit words (little-endian) and the blocks Q2_0 and PQ2_0 of GGUF have this order.
"""

import numpy as np

_CHUNK = 1 << 16  # bytes decoded at a time: their indices stay in a second-level cache
_BYTE = np.arange(256, dtype=np.uint8)[:, None]
_FOUR = ((_BYTE >> np.arange(0, 8, 2, dtype=np.uint8) & 3) - 1).view(np.uint32)[:, 0]
# Two bytes make eight trits.
_EIGHT = (_FOUR.astype(np.uint64)[:, None] << np.uint64(32) | _FOUR[None, :]).reshape(-1)
_LOW_BITS = np.uint64(0x5555555555555555)


def unpack_twos(packed: np.ndarray) -> np.ndarray:
    """Codes less 1.

    Args:
        packed: (..., n) uint8.

    Returns:
        (..., 4 n) int8; the code 3, which is no trit, gives 2.
    """
    flat = np.ascontiguousarray(packed).reshape(-1)
    trits = np.empty(4 * flat.size, np.int8)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        pairs = part[: part.size & ~1].view("<u2")
        target = trits[4 * start : 4 * (start + 2 * pairs.size)].view(np.uint64)
        # No index is out of range, but mode "raise" would make a copy.
        _EIGHT.take(pairs.astype(np.intp), out=target, mode="clip")
        if part.size & 1:
            trits[-4:] = _FOUR[part[-1:]].view(np.int8)
    return trits.reshape(*packed.shape[:-1], -1)


def has_code_3(packed: np.ndarray) -> bool:
    """Whether any code in these bytes (uint8, any shape) is 3."""
    flat = np.ascontiguousarray(packed).reshape(-1)
    whole = flat.size // 8 * 8
    for start in range(0, whole, _CHUNK):
        words = flat[start : min(whole, start + _CHUNK)].view(np.uint64)
        if (words & (words >> np.uint64(1)) & _LOW_BITS).any():
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
