"""Pack unsigned codes for MLX's affine format."""

from collections.abc import Sequence

import numpy as np


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes along the last axis: code n of a row begins at bit `bits * n` of the row.

    Layout: MLX 0.32, `mlx/backend/cpu/quantized.cpp`; least significant bit first. For 5 bits, a
    pack of 8 codes fills 5 bytes, so no code crosses the end of a pack.

    Args:
        codes: (..., in) uint8, each below 2**bits; in is a multiple of 32.
        bits: 1 to 8, but 7, which MLX does not have.

    Returns:
        (..., in * bits / 32) uint32, in C order.
    """
    if bits == 8:
        packed = codes
    elif bits == 5:
        packed = np.empty((*codes.shape[:-1], codes.shape[-1] * 5 // 8), np.uint8)
        for n, values in enumerate(five_bytes([codes[..., n::8] for n in range(8)])):
            packed[..., n::5] = values
    elif bits in (3, 6):
        stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        packed = np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    else:
        count = 8 // bits
        packed = codes[..., 0::count].copy()
        for n in range(1, count):
            packed |= codes[..., n::count] << np.uint8(bits * n)
    return np.ascontiguousarray(packed).view("<u4")


def five_bytes(codes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pack eight codes of 5 bits into five bytes.

    Args:
        codes: eight uint8 arrays: the first code of every pack, the second code, and so on.

    Returns:
        Five uint8 arrays: the first byte of every pack, the second byte, and so on.
    """
    a, b, c, d, e, f, g, h = codes
    return [
        a | b << 5,
        b >> 3 | c << 2 | d << 7,
        d >> 1 | e << 4,
        e >> 4 | f << 1 | g << 6,
        g >> 2 | h << 3,
    ]
