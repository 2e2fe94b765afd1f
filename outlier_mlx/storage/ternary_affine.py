"""Matrices in MLX's affine 2-bit format, whose codes may stand for {-s, 0, s}.

A weight is scale * code + bias, for a code of 0 to 3. What mlx-lm packs from ternary weights as a
rule has bias = -scale and codes of trit + 1; but any other scale and bias that give {-a, 0, a} in
each group are read as well. The test is exact: codes are integers and scales have 16 bits, so that
float64 holds every weight.
"""

from dataclasses import dataclass, replace

import numpy as np

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.storage.rounding import all_finite, is_rounded, narrowed, widened
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.ternary_matrix import (
    GROUPS,
    NotTernary,
    Scales,
    Seen,
    TernarySource,
    WeightSource,
    seen,
    without_sign,
)
from outlier_mlx.ternary.two_bits import has_code_3, twos_to_rows, unpack_twos

#: The dtypes of scales of 16 bits.
HALVES = {"F16": "float16", "BF16": "bfloat16"}
_SIGN = np.uint16(0x8000)
_CODES = np.arange(4, dtype=np.float64)
_ONES = np.uint64(0x5555555555555555)  # 32 codes 1


@dataclass(frozen=True)
class AffineSource(WeightSource):
    """A matrix in MLX's affine 2-bit format.

    Attributes:
        weight: (out, in / 16) uint32, sixteen codes a word, the first in the lowest bits.
        stored_scales: (out, in / group) float16 or bfloat16.
        biases: of the same shape and dtype.
        group: weights that share a scale and a bias, 64 or 128.
        trusted: whether nothing but scales of the usual form was seen, so that only the codes
            0 to 2 agree with it.
    """

    stored_scales: TensorRef
    biases: TensorRef
    group: int
    trusted: bool = False

    @classmethod
    def of(
        cls, weight: TensorRef, scales: TensorRef, biases: TensorRef, group: int
    ) -> "AffineSource":
        """Check the tensors of a matrix against each other.

        Raises:
            CheckpointError: a shape or dtype is wrong; names the tensor.
            NotTernary: the scales are float32, which no ternary pack has.
        """
        if weight.dtype != "U32" or len(weight.shape) != 2:
            raise CheckpointError(f"{weight.where}: {weight.dtype} {weight.shape}, expected U32")
        out, words = weight.shape
        shape = (out, 16 * words // group)
        if scales.dtype == biases.dtype == "F32":
            raise NotTernary(f"{scales.where}: float32; scales of ternary packs have 16 bits")
        dtypes = (scales.dtype,) if scales.dtype in HALVES else tuple(HALVES)
        for tensor in (scales, biases):
            if tensor.shape != shape or 16 * words % group or tensor.dtype not in dtypes:
                raise CheckpointError(
                    f"{tensor.where}: {tensor.dtype} {tensor.shape}, expected"
                    f" {listed(dtypes, last='or')} {shape}, one for each group of {group}"
                )
        assert group in GROUPS
        return cls(weight, scales, biases, group)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.weight.shape[0], 16 * self.weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.weight.nbytes + self.stored_scales.nbytes + self.biases.nbytes

    @property
    def scales(self) -> Scales:
        """One scale a group, in the stored dtype."""
        return Scales(self.group, HALVES[self.stored_scales.dtype])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as trits, and the scales of their groups; 0 is the scale of a group of zeros."""
        packed, scales, biases = self._stored(start, stop)
        if not _usual(packed, scales, biases):
            if self.trusted:
                raise NotTernary(f"{self.where}: from row {start}: other codes than of trits")
            return self._general(packed, scales, biases, start)
        trits = unpack_twos(packed)
        scales = without_sign(trits, scales.view(self._numpy), self.scales.dtype)
        zeros = scales.view(np.uint16) == 0
        if zeros.any():
            trits.reshape(*scales.shape, -1)[zeros] = 0
        empty = _all_trit_0(packed, scales.shape)
        if empty.any():
            scales[empty] = 0
        return trits, scales

    def packed(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Like `read`, but for unusual scales: None."""
        packed, scales, biases = self._stored(start, stop)
        # More than 0, as int16 and as a float.
        if not (scales.view(np.int16) > 0).all() or not _usual(packed, scales, biases):
            return None
        empty = _all_trit_0(packed, scales.shape)
        if empty.any():
            scales[empty] = 0
        return twos_to_rows(packed), scales.view(self._numpy)

    def examine(self, start: int, stop: int) -> Seen:
        """Like `read`, without unpacking what is usual."""
        packed, scales, biases = self._stored(start, stop)
        if not _usual(packed, scales, biases):
            return seen(*self._general(packed, scales, biases, start), self.group)
        return self._pairs(scales) or seen(*self.read(start, stop), self.group)

    def glance(self, start: int, stop: int) -> Seen | None:
        """Read scales and biases, and no codes."""
        scales, biases = self._scale_bits(start, stop)
        usual = (scales.view(np.int16) > 0).all() and (biases == scales ^ _SIGN).all()
        return self._pairs(scales) if usual else None

    def trusting(self) -> TernarySource:
        """The same matrix, `trusted`."""
        return replace(self, trusted=True)

    def _pairs(self, scales: np.ndarray) -> Seen | None:
        """What scales (bits) alone say; None if it depends on which groups are zeros."""
        even = scales.shape[1] // 2 * 2
        if self.group == 128 or (scales[:, 0:even:2] == scales[:, 1:even:2]).all():
            return Seen(one_a_row=False)
        return None

    @property
    def _numpy(self) -> type[np.generic]:
        return np.float16 if self.scales.dtype == "float16" else np.uint16

    def _stored(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes as bytes, and the bits (uint16) of scales and biases."""
        scales, biases = self._scale_bits(start, stop)
        return self.weight.read(start, stop).view(np.uint8), scales, biases

    def _scale_bits(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        bits = []
        for tensor in (self.stored_scales, self.biases):
            values = tensor.read(start, stop).view(np.uint16)
            if not all_finite(values, self.scales.dtype):
                raise CheckpointError(f"{tensor.where}: holds NaN or infinity")
            bits.append(values)
        return bits[0], bits[1]

    def _general(
        self, packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, start: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Any scales and biases, by the values that the codes of each group have."""
        dtype = self.scales.dtype
        codes = (unpack_twos(packed) + np.int8(1)).reshape(*scales.shape, -1)
        scale, bias = (
            widened(bits.view(self._numpy), dtype).astype(np.float64) for bits in (scales, biases)
        )
        values = scale[..., None] * _CODES + bias[..., None]  # (rows, groups, 4)
        found = np.stack([(codes == code).any(axis=-1) for code in range(4)], axis=-1)
        size = np.where(found, np.abs(values), 0)
        largest = size.max(axis=-1)
        wrong = (found & (size != 0) & (size != largest[..., None])).any(axis=-1)
        if wrong.any():
            row, group = np.argwhere(wrong)[0].tolist()
            held = ", ".join(f"{v:.6g}" for v in np.unique(values[row, group][found[row, group]]))
            raise NotTernary(
                f"{self.where}: not ternary: row {start + row}, group {group} holds {held}"
            )
        # A group of one value may have a sum of scale and bias that 16 bits do not hold.
        largest32 = largest.astype(np.float32)
        wide = (largest32 != largest) | is_rounded(largest32, dtype)
        if wide.any():
            row, group = np.argwhere(wide)[0].tolist()
            raise NotTernary(
                f"{self.where}: not ternary in {dtype}: row {start + row}, group {group} has the"
                f" scale {largest[row, group]:.9g}"
            )
        signs = np.sign(values).astype(np.int8)
        trits = np.take_along_axis(signs, codes.astype(np.intp), axis=-1)
        return trits.reshape(len(trits), -1), narrowed(largest32, dtype, self.where)


def _usual(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> bool:
    """Whether biases are the scales' negatives, and no code is 3. The arrays hold bits."""
    return bool((biases == scales ^ _SIGN).all()) and not has_code_3(packed)


def _all_trit_0(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which groups have no other code than 1: booleans of `shape`."""
    words = packed.view(np.uint64).reshape(*shape, -1)
    found: np.ndarray = words[..., 0] == _ONES
    if found.any():
        found &= (words == _ONES).all(axis=-1)
    return found
