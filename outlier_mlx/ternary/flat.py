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
    require_array,
    require_shape,
    write_digits,
)
from outlier_mlx.ternary.digits import (
    CHUNK,
    FIRST_IS_LEAST,
    GROUP,
    NUMBERS,
    ZERO,
    Decoder,
    Encoder,
    group_table,
)

# (256, 5): the digits of a byte; bytes of 243 and more have none.
DIGITS = (np.arange(256)[:, None] // 3 ** np.arange(GROUP) % 3).astype(np.uint8)
_TRITS = group_table(DIGITS.astype(np.int8) - np.int8(1))


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
    encoder = Encoder(min(CHUNK, packed.size), FIRST_IS_LEAST)
    for start in range(0, packed.size, CHUNK):
        part = flat[GROUP * start : GROUP * (start + CHUNK)]
        write_digits(part, encoder.digits[: part.size], trits.shape, GROUP * start)
        groups = packed_bytes(part.size)
        encoder.digits[part.size : GROUP * groups] = ZERO
        packed[start : start + groups] = encoder.numbers(groups)
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
    decoder = Decoder(min(CHUNK, packed.size), _TRITS)
    for start in range(0, packed.size, CHUNK):
        part = packed[start : start + CHUNK]
        values = flat[GROUP * start : GROUP * (start + CHUNK)]
        whole = values.size // GROUP
        decoder.write(part[:whole], values[: GROUP * whole])
        if whole < part.size:
            last = decoder.digits(part[whole:]).view(np.int8)
            values[GROUP * whole :] = last[: size % GROUP]
    return trits


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
        for start in range(0, packed.size, CHUNK):
            wrong = (packed[start : start + CHUNK] >= NUMBERS).nonzero()[0]
            if wrong.size:
                first = start + int(wrong[0])
                raise TernaryError(
                    f"byte {packed[first]} at {first} encodes no five trits (0..242 do)"
                )
    used = size % GROUP
    if used and (DIGITS[packed[-1], used:] != ZERO).any():
        warnings.warn(
            f"the last byte, {packed[-1]}, pads {size} trits with something other than 0",
            stacklevel=3,
        )
    return packed
