"""Five base-3 digits to a byte: the arithmetic that both byte orders share.

A group is five consecutive digits, each trit + 1, a byte each; its number is 0..242. As 64-bit
words at a stride of 5 bytes, digits hold one group a word, in the low five bytes: both directions
work on such words. (All platforms of MLX are little-endian.)
"""

import numpy as np

GROUP = 5
NUMBERS = 3**GROUP  # 243
ZERO = 1  # the digit of trit 0

# Groups handled at a time: many enough to hide what a NumPy call costs, few enough that digits
# (320 KB) and words (512 KB) stay in a second-level cache. Each call takes the interpreter's lock
# anew: with half as many groups, two threads pack a third slower, and one as fast.
CHUNK = 65536

_SPILL = 3  # what the last window of 8 bytes covers beyond the digits of its group

# Byte 4 of digits * multiplier is the sum of digit[k] * byte[4 - k] of the multiplier. No carry
# reaches it: the sums in the bytes below stay under 243 as well.
FIRST_IS_LEAST = sum(3**k << 8 * (4 - k) for k in range(GROUP))
FIRST_IS_MOST = sum(3**k << 8 * k for k in range(GROUP))


class Encoder:
    """Turns groups of digits into numbers. Buffers belong to the object: use one a call.

    One 64-bit multiplication gathers a whole group: a single strided pass over the digits, where
    Horner's rule takes five, and strided passes are what costs in NumPy.

    Attributes:
        digits: (5 * groups + 3,) uint8, to be filled before `numbers`.
    """

    def __init__(self, groups: int, multiplier: int) -> None:
        """Buffers for `groups` groups; the multiplier decides about the digits' order."""
        self.digits = np.empty(GROUP * groups + _SPILL, np.uint8)
        self._words = np.empty(groups, np.uint64)
        self._windows = np.ndarray((groups,), np.uint64, buffer=self.digits, strides=(GROUP,))
        self._multiplier = np.uint64(multiplier)

    def numbers(self, groups: int) -> np.ndarray:
        """The numbers of the first groups: (groups,) uint8, a strided view of a buffer."""
        words = self._words[:groups]
        np.copyto(words, self._windows[:groups])
        np.multiply(words, self._multiplier, out=words)
        return words.view(np.uint8)[4::8]


class Decoder:
    """Turns bytes into groups of five digits or trits. Buffers belong to the object."""

    def __init__(self, groups: int, table: np.ndarray) -> None:
        """Buffers for `groups` groups; `table` comes from `group_table`."""
        self._table = table
        self._index = np.empty(groups, np.intp)
        self._words = np.empty(groups, np.uint64)
        self._digits = np.empty(GROUP * groups, np.uint8)

    def write(self, packed: np.ndarray, out: np.ndarray) -> None:
        """Write the digits of uint8 `packed` to contiguous one-byte `out`, 5 * bytes long.

        A look-up of words of 8 bytes, then two stores a group, of four digits and of one: both
        are much cheaper than copying rows of five bytes, or than five strided passes.
        """
        if packed.size == 0:
            return
        index, words = self._index[: packed.size], self._words[: packed.size]
        np.copyto(index, packed)
        self._table.take(index, out=words, mode="clip")  # no byte needs clipping; "raise" copies
        fours = np.ndarray(words.shape, np.uint32, buffer=out, strides=(GROUP,))
        np.copyto(fours, words, casting="unsafe")
        np.copyto(out[4::GROUP], words.view(out.dtype)[4::8])

    def digits(self, packed: np.ndarray) -> np.ndarray:
        """The digits of `packed`: (5 * bytes,) uint8, a view of a buffer."""
        out = self._digits[: GROUP * packed.size]
        self.write(packed, out)
        return out


def group_table(digits: np.ndarray) -> np.ndarray:
    """(256, 5) one-byte digits or trits as (256,) uint64, for `Decoder`."""
    padded = np.zeros((256, 8), np.uint8)
    padded[:, :GROUP] = digits.view(np.uint8)
    return padded.view(np.uint64)[:, 0]
