"""ggml's ternary blocks, TQ1_0 and TQ2_0, byte for byte.

A row is cut into blocks of 256 weights, each with a float16 scale d at its end; a weight is
d * trit. Layouts as in ggml's quantization sources and its Python package `gguf`:

TQ1_0, 54 bytes: `qs` (48), `qh` (4), d. Byte n of the first 32 holds weights n, n + 32, ...
n + 128; of the next 16, weights 160 + n, 176 + n, ... 224 + n; of `qh`, weights 240 + n, 244 + n,
248 + n, 252 + n and a digit 0. Digits and bytes are those of `rows`: most significant first, as a
fraction of 256.

TQ2_0, 66 bytes: `qs` (64), d. Byte 32 j + n holds weights 128 j + n + 32 k for k = 0..3, as
trit + 1 at bit 2 k.
"""

from collections.abc import Iterable, Iterator
from math import prod

import numpy as np

from outlier_mlx.ternary.arrays import (
    TernaryError,
    blocks,
    items,
    matrix_views,
    require_array,
    require_blocks,
    require_finite,
    require_rows,
    require_trits,
    scratch,
)
from outlier_mlx.ternary.flat import GROUP
from outlier_mlx.ternary.rows import write_fractions, write_leading

BLOCK = 256  # weights
TQ1_0_BYTES = 54
TQ2_0_BYTES = 66

_CHUNK = 1 << 20  # weights handled at a time
_D_BYTES = 2
# TQ1_0: first byte, first weight, number of bytes, weights a byte.
_RUNS = ((0, 0, 32, 5), (32, 160, 16, 5), (48, 240, 4, 4))


def pack_tq1_0_blocks(trits: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Pack trits and block scales into ggml's TQ1_0.

    Args:
        trits: (..., in) int8 of any strides, `in` a multiple of 256, every value -1, 0 or 1.
        d: (..., in / 256) float16, finite.

    Returns:
        (..., in / 256 * 54) uint8.

    Raises:
        TernaryError: wrong type or shape, a trit outside -1..1 or a scale that is not finite,
            named with its position.
    """
    packed = _new_blocks(trits, d, TQ1_0_BYTES)
    for weights, scales, target in _packing(trits, d, packed, TQ1_0_BYTES):
        for byte, weight, size, depth in _RUNS:
            missing, scaled = np.empty((2, *target.shape[:-1], size), np.uint8)
            # 243 - q by Horner's rule, as in `rows`; a digit 0 for want of a weight is trit -1.
            missing[:] = 90 if depth == GROUP else 11  # 81 * 11 is 123 modulo 256
            for n in range(GROUP):
                if n:
                    np.multiply(missing, np.uint8(3), out=missing)
                if n < depth:
                    run = weights[..., weight + n * size : weight + (n + 1) * size]
                    np.subtract(missing, run.view(np.uint8), out=missing)
            write_fractions(missing, scaled, target[..., byte : byte + size])
        target[..., -_D_BYTES:] = scales
    return packed


def pack_tq2_0_blocks(trits: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Pack trits and block scales into ggml's TQ2_0.

    Args:
        trits: (..., in) int8 of any strides, `in` a multiple of 256, every value -1, 0 or 1.
        d: (..., in / 256) float16, finite.

    Returns:
        (..., in / 256 * 66) uint8.

    Raises:
        TernaryError: see `pack_tq1_0_blocks`.
    """
    packed = _new_blocks(trits, d, TQ2_0_BYTES)
    for weights, scales, target in _packing(trits, d, packed, TQ2_0_BYTES):
        codes = (weights + np.int8(1)).view(np.uint8)
        codes = codes.reshape(*codes.shape[:-1], 2, 4, 32)
        found = codes[..., 0, :].copy()
        for n in range(1, 4):
            found |= codes[..., n, :] << np.uint8(2 * n)
        target[..., :-_D_BYTES] = found.reshape(*found.shape[:-2], -1)
        target[..., -_D_BYTES:] = scales
    return packed


def unpack_tq1_0_blocks(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack ggml's TQ1_0; every byte decodes, as in ggml, also those that no encoder writes.

    Args:
        packed: (..., blocks * 54) uint8 of any strides.

    Returns:
        Trits (..., blocks * 256) int8 and scales d (..., blocks) float16.

    Raises:
        TernaryError: wrong type or length, or a scale that is not finite, named with its position.
    """
    trits, d = _new_trits(packed, TQ1_0_BYTES)
    unpack_digits(packed, trits, TQ1_0_BYTES, BLOCK, _RUNS)
    return trits, d


def unpack_digits(
    packed: np.ndarray,
    trits: np.ndarray,
    nbytes: int,
    weights: int,
    runs: Iterable[tuple[int, int, int, int]],
) -> None:
    """Unpack blocks of bytes with five or four digits each.

    Args:
        packed: (..., blocks * nbytes) uint8 of any strides.
        trits: (..., blocks * weights) int8, written.
        nbytes: bytes of a block.
        weights: weights of a block.
        runs: first byte, first weight, number of bytes and digits of each byte.
    """
    for source, target in _unpacking(packed, trits, nbytes, weights):
        for byte, weight, size, depth in runs:
            shape = (*source.shape[:-1], size)
            count = prod(shape)
            rest, above, below, found = (b.reshape(shape) for b in scratch(*4 * [count]))
            items(rest, 0, size)[:] = items(source, byte, size)
            for n in range(depth):
                if n:
                    np.multiply(rest, np.uint8(3), out=rest)
                write_leading(rest, above, below, found.view(np.int8))
                items(target, weight + n * size, size)[:] = items(found, 0, size)


def unpack_tq2_0_blocks(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack ggml's TQ2_0.

    Args:
        packed: (..., blocks * 66) uint8 of any strides.

    Returns:
        Trits (..., blocks * 256) int8 and scales d (..., blocks) float16.

    Raises:
        TernaryError: wrong type or length, a scale that is not finite, or the unused code 3, named
            with its position.
    """
    trits, d = _new_trits(packed, TQ2_0_BYTES)
    for source, target in _unpacking(packed, trits, TQ2_0_BYTES, BLOCK):
        shape = (*source.shape[:-1], TQ2_0_BYTES - _D_BYTES)
        count = prod(shape)
        codes, found = (buffer.reshape(shape) for buffer in scratch(count, count))
        items(codes, 0, shape[-1])[:] = items(source, 0, shape[-1])
        for n in range(4):
            np.right_shift(codes, np.uint8(2 * n), out=found)
            np.bitwise_and(found, np.uint8(3), out=found)
            np.subtract(found, np.uint8(1), out=found)
            for half in (0, 1):
                items(target, 128 * half + 32 * n, 32)[:] = items(found, 32 * half, 32)
    if trits.size and trits.max() > 1:
        index = [int(i) for i in np.unravel_index(int(trits.argmax()), trits.shape)]
        raise TernaryError(f"the weight at {index} has code 3, which is not a trit")
    return trits, d


def _packing(
    trits: np.ndarray, d: np.ndarray, packed: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Trits (rows, blocks, 256), scales as bytes and a view of `packed`, a chunk at a time."""
    for first, (source, scales, target) in matrix_views(trits, d, packed):
        target = target.reshape(len(target), -1, size)
        for lines, groups in blocks(scales, max(1, _CHUNK // BLOCK)):
            columns = slice(BLOCK * groups.start, BLOCK * groups.stop)
            piece = source[lines, columns]
            require_trits(
                piece, trits.shape, (first + lines.start) * source.shape[1] + columns.start
            )
            little = scales[lines, groups].astype("<f2")[..., None].view(np.uint8)
            yield piece.reshape(len(piece), -1, BLOCK), little, target[lines, groups]


def _unpacking(
    packed: np.ndarray, trits: np.ndarray, size: int, weights: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks (rows, blocks, size) and a view of their trits, a chunk at a time."""
    for _, (source, target) in matrix_views(packed, trits):
        source = source.reshape(len(source), -1, size)
        target = target.reshape(len(target), -1, weights)
        for lines, groups in blocks(source[..., 0], max(1, _CHUNK // weights)):
            yield np.ascontiguousarray(source[lines, groups]), target[lines, groups]


def _new_blocks(trits: np.ndarray, d: np.ndarray, size: int) -> np.ndarray:
    trits = require_rows("trits", trits, np.int8)
    d = require_array("d", d, np.float16)
    shape = (*trits.shape[:-1], require_blocks("trits", trits, BLOCK))
    if d.shape != shape:
        raise TernaryError(f"d: expected shape {shape}, one a block, got {d.shape}")
    require_finite(d)
    return np.empty((*shape[:-1], shape[-1] * size), np.uint8)


def _new_trits(packed: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    packed = require_rows("packed", packed, np.uint8)
    shape = (*packed.shape[:-1], require_blocks("packed", packed, size))
    scales = packed.reshape(*shape, size)[..., -_D_BYTES:]
    d = np.ascontiguousarray(scales).view("<f2")[..., 0].astype(np.float16)
    require_finite(d)
    return np.empty((*shape[:-1], shape[-1] * BLOCK), np.int8), d
