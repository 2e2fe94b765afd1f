"""Unsigned codes packed as MLX's affine format stores them."""

import numpy as np

WIDTHS = (2, 4, 5, 8)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes along the last axis: code n of a row sits in its bits `bits * n` and on.

    Layout: MLX 0.32, `mlx/backend/cpu/quantized.cpp`; least significant bits first, and for widths
    that are no power of two no code is cut where a pack (8 codes in 5 bytes) ends.

    Args:
        codes: (..., in) uint8, each below 2**bits; in is a multiple of 32.
        bits: one of `WIDTHS`.

    Returns:
        (..., in * bits / 32) uint32, in C order.
    """
    if bits == 8:
        packed = codes
    elif bits == 5:
        wide = codes.reshape(*codes.shape[:-1], -1, 8).astype("<u8")
        for n in range(1, 8):
            wide[..., 0] |= wide[..., n] << np.uint64(5 * n)
        packed = np.ascontiguousarray(wide[..., 0]).view(np.uint8)
        packed = packed.reshape(*codes.shape[:-1], -1, 8)[..., :5]
        packed = packed.reshape(*codes.shape[:-1], -1)
    else:
        count = 8 // bits
        packed = codes[..., 0::count].copy()
        for n in range(1, count):
            packed |= codes[..., n::count] << np.uint8(bits * n)
    return np.ascontiguousarray(packed).view("<u4")
