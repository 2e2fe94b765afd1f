"""Convert between groups of five base-3 digits and bytes, for both orders of digits.

A digit is a trit plus 1, stored in one byte. A group is five successive digits; its number is 0 to
242. Read as 64-bit words at a stride of 5 bytes, each word has one group in its low five bytes.
Both directions work on such words. (All platforms of MLX are little-endian.)
"""

import numpy as np

GROUP = 5
NUMBERS = 3**GROUP  # 243
ZERO = 1  # the digit of trit 0

# Number of groups processed at a time. It is large, because each NumPy call has a cost and takes
# the GIL: with half as many groups, two threads pack a third slower (one thread is as fast). And it
# is small enough that digits (320 KB) and words (512 KB) stay in a second-level cache.
CHUNK = 65536

_SPILL = 3  # bytes of the last 64-bit word after the digits of its group

# Byte 4 of digits * multiplier is the sum of digit[k] * byte[4 - k] of the multiplier. No carry
# reaches it: the sums in the bytes below stay under 243 as well.
FIRST_IS_LEAST = sum(3**k << 8 * (4 - k) for k in range(GROUP))
FIRST_IS_MOST = sum(3**k << 8 * k for k in range(GROUP))


class Encoder:
    """Converts groups of digits to numbers. It has its own buffers: do not share it among threads.

    One 64-bit multiplication gathers a whole group, with a single strided pass over the digits.
    Horner's rule would need five, and strided passes are slow in NumPy.

    Attributes:
        digits: (5 * groups + 3,) uint8, to be filled before `numbers` is called.
    """

    def __init__(self, groups: int, multiplier: int) -> None:
        """Allocate buffers for `groups` groups; the multiplier sets the order of digits."""
        self.digits = np.empty(GROUP * groups + _SPILL, np.uint8)
        self._words = np.empty(groups, np.uint64)
        self._windows = np.ndarray((groups,), np.uint64, buffer=self.digits, strides=(GROUP,))
        self._multiplier = np.uint64(multiplier)

    def numbers(self, groups: int) -> np.ndarray:
        """Numbers of the first groups: (groups,) uint8, a strided view of a buffer."""
        words = self._words[:groups]
        np.copyto(words, self._windows[:groups])
        np.multiply(words, self._multiplier, out=words)
        return words.view(np.uint8)[4::8]


class Decoder:
    """Converts bytes to groups of five digits or trits. It has its own buffers."""

    def __init__(self, groups: int, table: np.ndarray) -> None:
        """Allocate buffers for `groups` groups; `table` comes from `group_table`."""
        self._table = table
        self._index = np.empty(groups, np.intp)
        self._words = np.empty(groups, np.uint64)
        self._digits = np.empty(GROUP * groups, np.uint8)

    def write(self, packed: np.ndarray, out: np.ndarray) -> None:
        """Write the digits of uint8 `packed` to `out`, contiguous, 1 byte each, 5 per byte.

        It looks up 8-byte words, then stores each group with two stores, of four digits and of one.
        This is much faster than copying rows of five bytes, and than five strided passes.
        """
        if packed.size == 0:
            return
        index, words = self._index[: packed.size], self._words[: packed.size]
        np.copyto(index, packed)
        # No index is out of range, but mode "raise" would make a copy.
        self._table.take(index, out=words, mode="clip")
        fours = np.ndarray(words.shape, np.uint32, buffer=out, strides=(GROUP,))
        np.copyto(fours, words, casting="unsafe")
        np.copyto(out[4::GROUP], words.view(out.dtype)[4::8])

    def digits(self, packed: np.ndarray) -> np.ndarray:
        """Digits of `packed`: (5 * bytes,) uint8, a view of a buffer."""
        out = self._digits[: GROUP * packed.size]
        self.write(packed, out)
        return out


def group_table(digits: np.ndarray) -> np.ndarray:
    """Convert (256, 5) one-byte digits or trits to (256,) uint64, for `Decoder`."""
    padded = np.zeros((256, 8), np.uint8)
    padded[:, :GROUP] = digits.view(np.uint8)
    return padded.view(np.uint64)[:, 0]
