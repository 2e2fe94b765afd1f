"""Parts of ternary models: packed rows, signs of rotations, and tensors that stay as they are."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from threading import Lock

import numpy as np

from outlier_mlx.models.ternary_fields import module_tensors
from outlier_mlx.storage.rounding import narrowed, widened
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import row_ranges
from outlier_mlx.storage.ternary_matrix import TernaryMatrix, slabs
from outlier_mlx.ternary.scales import tile_scales
from outlier_mlx.ternary.two_bits import pack_twos
from outlier_mlx.writing.float_parts import SLAB_BYTES, affine_specs
from outlier_mlx.writing.parts import Chunk, Part, ahead, by_tensor
from outlier_mlx.writing.writer import TensorSpec

# One slab is packed at a time, beside the thread that hashes and writes: the calls of NumPy are so
# short that two threads wait for each other's more than they gain, and use more CPU time.
_packing = Lock()


@dataclass(frozen=True)
class _MatrixPart(Part):
    matrix: TernaryMatrix

    @property
    def params(self) -> int:
        """Weights of the matrix."""
        return prod(self.matrix.shape)

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return self.matrix.source.nbytes


class TernaryPart(_MatrixPart):
    """A matrix as `weight`, rows of packed trits, and `scales`; see `ternary_fields`."""

    def specs(self) -> list[TensorSpec]:
        """Rows (out, row_bytes) uint8; scales (out,), or tiles (out / 8, in / group, 8)."""
        expected = module_tensors(self.path, self.matrix.shape, self.matrix.scales)
        return [TensorSpec(name, dtype, shape) for name, (shape, dtype) in expected.items()]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The rows slab by slab, then the scales, which are kept until then."""

        def packed(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, int]:
            with _packing:
                return *self.matrix.packed(start, stop), stop - start

        rows, done = self.matrix.shape[0], 0
        kept = []
        for weight, scales, count in ahead(
            pool, (partial(packed, *slab) for slab in slabs(self.matrix.source))
        ):
            # Shares of the bytes that add up to all of them.
            used = self.source_bytes * (done + count) // rows - self.source_bytes * done // rows
            done += count
            kept.append(scales)
            yield f"{self.path}.weight", weight.data.cast("B"), used
        found = np.concatenate(kept)
        if self.matrix.scales.group:
            found = tile_scales(found)
        yield f"{self.path}.scales", np.ascontiguousarray(found).data.cast("B"), 0


@dataclass(frozen=True)
class AffinePart(_MatrixPart):
    """A ternary matrix in MLX's affine 2-bit format: codes of trit + 1, biases of -scale.

    Attributes:
        matrix: the matrix.
        group: weights that share a scale, a divisor of the matrix's own group.
        dtype: dtype of scales and biases, which holds all of them.
    """

    group: int
    dtype: str

    @property
    def affine(self) -> tuple[int, int]:
        """Bits and group size."""
        return 2, self.group

    def specs(self) -> list[TensorSpec]:
        """Codes, scales and biases; see `affine_specs`."""
        return affine_specs(self.path, self.matrix.shape, self.affine, self.dtype)

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The codes slab by slab, then scales and biases, which are kept until then."""

        def made(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
            trits, scales = self.matrix.read(start, stop)
            own = self.matrix.scales
            if own.dtype != self.dtype:
                scales = narrowed(widened(scales, own.dtype), self.dtype, self.path)
            scales = scales.reshape(len(trits), -1)
            times = trits.shape[1] // self.group // scales.shape[1]
            scales = np.repeat(scales, times, axis=1)
            biases = -scales
            if self.dtype == "bfloat16":
                biases = scales ^ np.uint16(0x8000)
            return pack_twos(trits), scales, biases, stop - start

        def unordered() -> Iterator[Chunk]:
            rows, done = self.matrix.shape[0], 0
            for codes, scales, biases, count in ahead(
                pool, (partial(made, *slab) for slab in slabs(self.matrix.source))
            ):
                used = self.source_bytes * (done + count) // rows - self.source_bytes * done // rows
                done += count
                yield f"{self.path}.weight", codes.data.cast("B"), used
                yield f"{self.path}.scales", scales.data.cast("B"), 0
                yield f"{self.path}.biases", biases.data.cast("B"), 0

        return by_tensor(unordered())


@dataclass(frozen=True)
class Verbatim(Part):
    """A tensor that stays as it is, to the last bit; floats must be finite.

    Attributes:
        tensor: the tensor.
        name: its new name.
        weights: parameters in it, which of packed weights are more than its elements; 0 for scales.
    """

    tensor: TensorRef
    name: str
    weights: int

    @property
    def params(self) -> int:
        """Parameters of the model in it."""
        return self.weights

    @property
    def source_bytes(self) -> int:
        """Its size on disk."""
        return self.tensor.nbytes

    def specs(self) -> list[TensorSpec]:
        """The tensor, under its new name."""
        return [TensorSpec(self.name, self.tensor.dtype, self.tensor.shape)]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """Its bytes, slab by slab."""
        if not self.tensor.shape:
            yield self.name, self.tensor.read_finite().reshape(1).data.cast("B"), self.tensor.nbytes
            return
        rows = self.tensor.shape[0]
        ranges = row_ranges(rows, self.tensor.nbytes // max(1, rows), SLAB_BYTES)
        for data in ahead(pool, (partial(self.tensor.read_finite, *r) for r in ranges)):
            yield self.name, data.reshape(-1).data.cast("B"), data.nbytes


@dataclass(frozen=True)
class Signs(Part):
    """The signs of a rotation: (width,), each 1 or -1.

    Attributes:
        name: the tensor's name.
        signs: the signs, int8.
        dtype: "I8" or "F32".
    """

    name: str
    signs: np.ndarray
    dtype: str = "I8"

    @property
    def params(self) -> int:
        """0: they are fixed, and no parameters."""
        return 0

    @property
    def source_bytes(self) -> int:
        """0: they are in memory."""
        return 0

    def specs(self) -> list[TensorSpec]:
        """The vector."""
        return [TensorSpec(self.name, self.dtype, self.signs.shape)]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The vector."""
        signs = self.signs if self.dtype == "I8" else self.signs.astype(np.float32)
        yield self.name, signs.data.cast("B"), 0
