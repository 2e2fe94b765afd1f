"""The ternary blocks of PrismML's GGUF files, and ggml's Q2_0, byte for byte.

A weight is d * trit, with a float16 d for each block:

Q2_0 (64 weights, 18 bytes) and PQ2_0 (128 weights, 34 bytes): d, then codes of trit + 1, two bits
each, four a byte, the first in the lowest bits.

PTQ1_0 (128 weights, 28 bytes): 24 bytes, 2 bytes, d. Byte n of the first 16 holds weights n,
n + 16, ... n + 64; of the next 8, weights 80 + n, 88 + n, ... 112 + n; of the last 2, weights
120 + n, 122 + n, 124 + n, 126 + n and a digit 0. Digits are those of ggml's TQ1_0.

Sources: ggml-common.h and ggml-quants.c of ggml-org/llama.cpp (Q2_0) and PrismML-Eng/llama.cpp.
"""

import numpy as np

from outlier_mlx.ternary.arrays import (
    TernaryError,
    items,
    require_blocks,
    require_finite,
    require_rows,
)
from outlier_mlx.ternary.ggml import unpack_digits
from outlier_mlx.ternary.two_bits import has_code_3, unpack_twos

Q2_0_BYTES = 18
PQ2_0_BYTES = 34
PTQ1_0_BYTES = 28

_D_BYTES = 2
# PTQ1_0: first byte, first weight, number of bytes, weights a byte.
_RUNS = ((0, 0, 16, 5), (16, 80, 8, 5), (24, 120, 2, 4))


def unpack_q2_0_blocks(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack Q2_0.

    Args:
        packed: (..., blocks * 18) uint8.

    Returns:
        Trits (..., blocks * 64) int8 and scales d (..., blocks) float16, as stored.

    Raises:
        TernaryError: wrong type or length, a scale that is not finite, or the code 3.
    """
    return _unpack_two_bits(packed, Q2_0_BYTES)


def unpack_pq2_0_blocks(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack PQ2_0: like `unpack_q2_0_blocks`, in blocks of 34 bytes and 128 weights."""
    return _unpack_two_bits(packed, PQ2_0_BYTES)


def unpack_ptq1_0_blocks(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack PTQ1_0: like `unpack_q2_0_blocks`, in blocks of 28 bytes and 128 weights.

    Every byte decodes to trits, as in ggml.
    """
    blocks = _blocks(packed, PTQ1_0_BYTES)
    d = _scales(blocks, PTQ1_0_BYTES - _D_BYTES)
    trits = np.empty((*blocks.shape[:-1], 128), np.int8)
    trits = trits.reshape(*packed.shape[:-1], -1)
    unpack_digits(packed, trits, PTQ1_0_BYTES, 128, _RUNS)
    return trits, d


def split_two_bits(packed: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of blocks that begin with a scale.

    Args:
        packed: (..., blocks * size) uint8.
        size: bytes of a block.

    Returns:
        Codes (..., blocks * (size - 2)) uint8, four a byte, and scales d (..., blocks) float16.

    Raises:
        TernaryError: wrong type or length, or a scale that is not finite.
    """
    blocks = _blocks(packed, size)
    codes = np.ascontiguousarray(items(blocks, _D_BYTES, size - _D_BYTES))
    return codes.view(np.uint8).reshape(*packed.shape[:-1], -1), _scales(blocks, 0)


def _unpack_two_bits(packed: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    codes, d = split_two_bits(packed, size)
    trits = unpack_twos(codes)
    if has_code_3(codes):
        index = [int(i) for i in np.unravel_index(int(trits.argmax()), trits.shape)]
        raise TernaryError(f"the weight at {index} has code 3, which is not a trit")
    return trits, d


def _blocks(packed: np.ndarray, size: int) -> np.ndarray:
    packed = require_rows("packed", packed, np.uint8)
    count = require_blocks("packed", packed, size)
    return np.ascontiguousarray(packed).reshape(*packed.shape[:-1], count, size)


def _scales(blocks: np.ndarray, at: int) -> np.ndarray:
    d = np.ascontiguousarray(items(blocks, at, _D_BYTES)).view("<f2")
    require_finite(d)
    return d
