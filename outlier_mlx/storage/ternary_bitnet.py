"""Matrices of BitNet b1.58 and Falcon: packed trits, and the floats that they are rounded from.

Packed (`transformers/integrations/bitnet.py`): uint8 (out / 4, in); bits 2 i and 2 i + 1 of byte
(r, c) are trit + 1 of row i * out / 4 + r, column c. One number scales the matrix.

Master weights: what is trained. When such a model is loaded, each matrix becomes ternary: m is the
mean of |W|, at least 1e-5, and a trit is W / m, rounded (ties to even) and clipped.
"""

import threading
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.rounding import narrowed, widened
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import row_ranges
from outlier_mlx.storage.ternary_affine import HALVES
from outlier_mlx.storage.ternary_matrix import (
    GROUPS,
    SLAB_BYTES,
    InOrder,
    NotTernary,
    Scales,
    Seen,
    TernarySource,
    WeightSource,
    seen,
)
from outlier_mlx.ternary.two_bits import has_code_3

_LEAST_MEAN = 1e-5
# Another order of summation could change trits of weights that are as near to a half as this.
_NEAR_HALF = 1e-6


class _RowScales(TernarySource):
    @property
    def scales(self) -> Scales:
        """One float32 a row."""
        return Scales(0, "float32")


@dataclass(frozen=True)
class PackedBitnet(_RowScales, WeightSource):
    """A packed matrix, and the scale of all of it (finite, more than 0)."""

    scale: np.float32

    always = True  # another code is damage

    @classmethod
    def of(
        cls, weight: TensorRef, scale: TensorRef | None, shape: tuple[int, ...], divides: bool
    ) -> "PackedBitnet":
        """A packed matrix, checked.

        Args:
            weight: (out / 4, in) uint8.
            scale: (1,), or None if there is none.
            shape: (out, in) of the module.
            divides: whether the scale divides.

        Raises:
            CheckpointError: a wrong shape, or a scale that is missing or no positive number.
        """
        if scale is None:
            raise CheckpointError(f"{weight.where}: packed, but there is no weight_scale beside it")
        if scale.shape not in ((1,), ()):
            raise CheckpointError(f"{scale.where}: shape {scale.shape}, expected one number: (1,)")
        out, width = shape
        if out % 4 or weight.shape != (out // 4, width):
            raise CheckpointError(
                f"{weight.where}: shape {weight.shape}, expected {(out // 4, width)} for {shape},"
                " four rows a byte"
            )
        value = np.float32(scale.read_float32().reshape(-1)[0])
        with np.errstate(divide="ignore", over="ignore"):
            factor = np.float32(1) / value if divides else value
        if not (value > 0 and np.isfinite(value) and np.isfinite(factor)):
            raise CheckpointError(f"{scale.where}: the scale {value}, expected a positive number")
        return cls(weight, factor)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (4 * self.weight.shape[0], self.weight.shape[1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as trits, and the same scale for each."""
        quarter = self.weight.shape[0]
        trits = np.empty((stop - start, self.shape[1]), np.int8)
        for n in range(4):
            first, last = max(start, n * quarter), min(stop, (n + 1) * quarter)
            if first >= last:
                continue
            packed = self.weight.read(first - n * quarter, last - n * quarter)
            codes = packed >> np.uint8(2 * n) & np.uint8(3)
            if codes.size and codes.max() > 2:
                self._refuse(codes, first)
            np.subtract(codes.view(np.int8), 1, out=trits[first - start : last - start])
        return trits, np.full(len(trits), self.scale, np.float32)

    def examine(self, start: int, stop: int) -> Seen:
        """Look for the code 3; each byte is looked at once."""
        quarter = self.weight.shape[0]
        if start < quarter and has_code_3(self.weight.read(start, min(stop, quarter))):
            for n in range(4):
                self.read(n * quarter + start, n * quarter + min(stop, quarter))
        return Seen()

    def glance(self, start: int, stop: int) -> Seen | None:
        """Nothing to choose: one number scales all."""
        return Seen()

    def _refuse(self, codes: np.ndarray, first: int) -> None:
        row, column = (int(i[0]) for i in (codes > 2).nonzero())
        raise NotTernary(
            f"{self.where}: the weight at row {first + row}, column {column} has code 3, which is"
            " not a trit"
        )


@dataclass
class NearHalf:
    """How many master weights are so near to a half that their trits depend on a sum's order."""

    count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, count: int) -> None:
        """Count some more."""
        with self._lock:
            self.count += count


@dataclass(frozen=True)
class MasterWeights(_RowScales, WeightSource):
    """Floats that become ternary when the model is loaded; see the module.

    Attributes:
        weight: (out, in) floats.
        inverse: 1 / m in float32.
        near_half: counts what is read.
    """

    inverse: np.float32
    near_half: NearHalf

    always = True

    @classmethod
    def of(
        cls, weight: TensorRef, near_half: NearHalf, in_order: InOrder[float]
    ) -> "MasterWeights":
        """Go through a matrix for its mean.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        out, width = weight.shape
        ranges = row_ranges(out, weight.nbytes // max(1, out), SLAB_BYTES)
        calls = (partial(_sum_of_sizes, weight, *rows) for rows in ranges)
        mean = sum(in_order(calls)) / (out * width)
        return cls(weight, np.float32(1) / np.float32(max(mean, _LEAST_MEAN)), near_half)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as trits, and the scale 1 / inverse, rounded to bfloat16, for each."""
        values = self.weight.read_float32(start, stop)
        values *= self.inverse
        trits = np.clip(np.rint(values), -1, 1).astype(np.int8)
        np.abs(values, out=values)
        values -= np.float32(0.5)
        np.abs(values, out=values)
        self.near_half.add(int((values < _NEAR_HALF).sum()))
        stored = narrowed(np.array([np.float32(1) / self.inverse]), "bfloat16", self.where)
        return trits, np.repeat(widened(stored, "bfloat16"), len(trits))

    def examine(self, start: int, stop: int) -> Seen:
        """Nothing: all floats can be rounded."""
        return Seen()


def _sum_of_sizes(weight: TensorRef, start: int, stop: int) -> float:
    values = weight.read_float32(start, stop)
    total = float(np.abs(values).sum(dtype=np.float64))
    if not np.isfinite(total):
        raise CheckpointError(f"{weight.where}: holds NaN or infinity")
    return total


@dataclass(frozen=True)
class FloatSource(WeightSource):
    """Floats of 16 bits that are ternary already: unpacked models.

    Attributes:
        weight: (out, in) float16 or bfloat16.
        group: weights that share a scale, 64 or 128.
        dtype: that of the weights, and of the scales.
    """

    group: int
    dtype: str

    may_be_rows = True

    @classmethod
    def of(cls, weight: TensorRef) -> "FloatSource | None":
        """A matrix in the largest groups that fit; None if it is none of 16-bit floats."""
        if weight.dtype not in HALVES or len(weight.shape) != 2 or not weight.shape[1]:
            return None
        group = next((size for size in reversed(GROUPS) if weight.shape[1] % size == 0), None)
        return None if group is None else cls(weight, group, HALVES[weight.dtype])

    @property
    def scales(self) -> Scales:
        """A scale a group, of the weights' dtype."""
        return Scales(self.group, self.dtype)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as trits, and the largest size of a weight in each group."""
        bits = self.weight.read(start, stop).view(np.uint16)
        sizes = (bits & np.uint16(0x7FFF)).reshape(len(bits), -1, self.group)
        largest = sizes.max(axis=-1)  # sizes of floats are in the order of their bits
        if (widened(largest.view(self._numpy), self.dtype) == np.inf).any() or (
            largest > (0x7C00 if self.dtype == "float16" else 0x7F80)
        ).any():
            raise CheckpointError(f"{self.where}: holds NaN or infinity")
        wrong = ((sizes != 0) & (sizes != largest[..., None])).any(axis=-1)
        if wrong.any():
            row, group = np.argwhere(wrong)[0].tolist()
            raise NotTernary(
                f"{self.where}: not ternary: row {start + row}, group {group} holds more than one"
                " size of weight"
            )
        trits = (sizes != 0).view(np.int8).reshape(bits.shape)
        np.negative(trits, out=trits, where=bits >= 0x8000)
        return trits, largest.view(self._numpy)

    def examine(self, start: int, stop: int) -> Seen:
        """Go through rows; raises like `read`."""
        return seen(*self.read(start, stop), self.group)

    @property
    def _numpy(self) -> type[np.generic]:
        return np.float16 if self.dtype == "float16" else np.uint16
