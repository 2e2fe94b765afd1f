"""The parts of a tier: what each stores, and how its bytes come from the checkpoint in slabs.

Every part knows its output shapes before it reads anything, and yields the bytes of its tensors
in order. None holds more than a few slabs.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TypeVar

import mlx.core as mx
import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.runtime.affine2 import affine_group, rows_to_affine2
from outlier_mlx.storage.safetensors import NUMPY_DTYPES
from outlier_mlx.storage.tensors import ExpertMatrix, FloatTensor, PackedTrits, row_ranges
from outlier_mlx.ternary import TernaryError, pack_rows, row_bytes
from outlier_mlx.writing.mlx_stream import own_mlx_stream
from outlier_mlx.writing.parts import Chunk, Part, ahead
from outlier_mlx.writing.writer import TensorSpec

SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Of source. Small enough to stay in a core's cache from reading to packing, and for the allocator
# to reuse: at 8 MB, fresh pages alone took a quarter of the time.
SLAB_BYTES = 2 << 20
# Where rows share bytes, every fifth begins with one.
_TRITS_PER_BYTE = 5

T = TypeVar("T")


@dataclass(frozen=True)
class Constant(Part):
    """A small array that is known at once: alphas, biases of zero."""

    name: str
    value: np.ndarray
    dtype: str

    @property
    def params(self) -> int:
        """Elements of the array."""
        return self.value.size

    @property
    def source_bytes(self) -> int:
        """Nothing is read."""
        return 0

    def specs(self) -> list[TensorSpec]:
        """The one tensor."""
        return [TensorSpec(self.name, SAFETENSORS_NAMES[self.dtype], self.value.shape)]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The array, in the dtype of the tier."""
        yield self.name, _bytes(mx.array(self.value, _mlx(self.dtype))), 0


@dataclass(frozen=True)
class FromTensor(Part):
    """A part that is made from one tensor of floats."""

    tensor: FloatTensor

    @property
    def params(self) -> int:
        """Elements of the tensor."""
        return prod(self.tensor.shape)

    @property
    def source_bytes(self) -> int:
        """The tensor's size on disk."""
        return _stored_bytes(self.tensor)


@dataclass(frozen=True)
class Plain(FromTensor):
    """A tensor that stays unquantized: norms, biases, the router, matrices no group divides.

    `twin` is the same tensor from another file, which must hold the same values.
    """

    name: str
    dtype: str
    twin: FloatTensor | None = None

    def specs(self) -> list[TensorSpec]:
        """The one tensor."""
        return [TensorSpec(self.name, SAFETENSORS_NAMES[self.dtype], self.tensor.shape)]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The tensor slab by slab, rounded to the tier's dtype."""

        def rounded(slab: np.ndarray) -> memoryview:
            return _bytes(_rounded(slab, self.dtype, self.tensor))

        for data, used in _made_slabs(self.tensor, self.twin, pool, rounded):
            yield self.name, data, used


@dataclass(frozen=True)
class Quantized(FromTensor):
    """A matrix of the base in MLX's affine format: `weight`, `scales` and `biases`."""

    bits: int
    group_size: int
    dtype: str
    twin: FloatTensor | None = None

    def specs(self) -> list[TensorSpec]:
        """Packed weight (out, in * bits / 32) uint32; scales and biases (out, in / group)."""
        out, width = self.tensor.shape
        groups = (out, width // self.group_size)
        dtype = SAFETENSORS_NAMES[self.dtype]
        return [
            TensorSpec(f"{self.path}.weight", "U32", (out, width * self.bits // 32)),
            TensorSpec(f"{self.path}.scales", dtype, groups),
            TensorSpec(f"{self.path}.biases", dtype, groups),
        ]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The weight slab by slab, then the scales and biases that were put aside."""

        def quantized(slab: np.ndarray) -> tuple[memoryview, memoryview, memoryview]:
            w = _rounded(slab, self.dtype, self.tensor)
            packed, scales, biases = mx.quantize(w, self.group_size, self.bits)
            return _bytes(packed), _bytes(scales), _bytes(biases)

        aside: dict[str, list[memoryview]] = {"scales": [], "biases": []}
        for (packed, scales, biases), used in _made_slabs(self.tensor, self.twin, pool, quantized):
            aside["scales"].append(scales)
            aside["biases"].append(biases)
            yield f"{self.path}.weight", packed, used
        for name, pieces in aside.items():
            for piece in pieces:
                yield f"{self.path}.{name}", piece, 0


@dataclass(frozen=True)
class FromExperts(Part):
    """A part that is made from one projection of a layer's experts."""

    matrices: tuple[ExpertMatrix, ...]

    @property
    def params(self) -> int:
        """Trits of all experts."""
        return len(self.matrices) * prod(self.matrices[0].trits.shape)

    @property
    def source_bytes(self) -> int:
        """A byte a trit, as they are read."""
        return self.params

    def of_expert(self, number: int) -> "FromExperts":
        """The same of one expert alone; its bytes are contiguous in each tensor of the whole."""
        return replace(self, matrices=self.matrices[number : number + 1])

    @abstractmethod
    def code_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The bytes of the weights, which are made from trits alone."""

    @abstractmethod
    def scale_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The bytes of the other tensors, which are made from scales alone."""

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """Weights, then what belongs to scales."""
        yield from self.code_chunks(pool)
        yield from self.scale_chunks(pool)


@dataclass(frozen=True)
class TernaryExperts(FromExperts):
    """One projection of a layer's experts: `weight` (experts, out, row_bytes) and `scales`."""

    def specs(self) -> list[TensorSpec]:
        """Packed rows uint8, and a float32 scale a row."""
        experts = len(self.matrices)
        out, width = self.matrices[0].trits.shape
        return [
            TensorSpec(f"{self.path}.weight", "U8", (experts, out, row_bytes(width))),
            TensorSpec(f"{self.path}.scales", "F32", (experts, out)),
        ]

    def code_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """Rows packed on all of the pool's threads."""
        for rows, trits in _packed_slabs(self.matrices, pool):
            yield f"{self.path}.weight", rows.data, trits

    def scale_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """A scale a row."""
        for matrix in self.matrices:
            yield f"{self.path}.scales", matrix.row_scales().data, 0


@dataclass(frozen=True)
class AffineExperts(FromExperts):
    """One projection of a layer's experts in MLX's affine 2-bit format.

    Each expert's scales and biases are multiplied by its entry in `factors`, if there are any.
    """

    dtype: str = "float32"
    factors: tuple[float, ...] = ()

    @property
    def group_size(self) -> int:
        """The largest affine group that divides the width."""
        return affine_group(self.matrices[0].trits.shape[1])

    def of_expert(self, number: int) -> "AffineExperts":
        """The same of one expert alone."""
        one = slice(number, number + 1)
        return replace(self, matrices=self.matrices[one], factors=self.factors[one])

    def specs(self) -> list[TensorSpec]:
        """Codes (experts, out, in / 16) uint32, scales and biases (experts, out, groups)."""
        experts = len(self.matrices)
        out, width = self.matrices[0].trits.shape
        groups = (experts, out, width // self.group_size)
        return [
            TensorSpec(f"{self.path}.weight", "U32", (experts, out, width // 16)),
            TensorSpec(f"{self.path}.scales", SAFETENSORS_NAMES[self.dtype], groups),
            TensorSpec(f"{self.path}.biases", SAFETENSORS_NAMES[self.dtype], groups),
        ]

    def code_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """Codes slab by slab."""
        width = self.matrices[0].trits.shape[1]
        for rows, trits in _packed_slabs(self.matrices, pool):
            codes, _, _ = rows_to_affine2(mx.array(rows), mx.zeros(rows.shape[:1]), width)
            yield f"{self.path}.weight", _bytes(codes), trits

    def scale_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """All scales, then all biases."""
        groups = self.matrices[0].trits.shape[1] // self.group_size
        factors = self.factors or (1.0,) * len(self.matrices)
        for name, sign in (("scales", 1.0), ("biases", -1.0)):
            for matrix, factor in zip(self.matrices, factors, strict=True):
                values = mx.array(matrix.row_scales() * np.float32(sign * factor))
                yield (
                    f"{self.path}.{name}",
                    _bytes(mx.repeat(values.astype(_mlx(self.dtype)), groups)),
                    0,
                )


def _mlx(dtype: str) -> mx.Dtype:
    return getattr(mx, dtype)


def _bytes(array: mx.array) -> memoryview:
    """The bytes of an MLX array; bfloat16 goes by way of its 16 bits, which NumPy can hold."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array, copy=False)).data.cast("B")


def _rounded(slab: np.ndarray, dtype: str, tensor: FloatTensor) -> mx.array:
    """A slab in a dtype, of which float16 has but a small part of float32's range."""
    stored = mx.array(slab).astype(_mlx(dtype))
    if dtype == "float16" and not mx.isfinite(stored).all():
        raise CheckpointError(f"{tensor.where}: holds numbers too large for float16")
    return stored


def float_slabs(
    tensor: FloatTensor, twin: FloatTensor | None, pool: ThreadPoolExecutor
) -> Iterator[tuple[np.ndarray, int]]:
    """Slabs of rows as float32, checked for NaN and infinity, and against the twin."""
    return _made_slabs(tensor, twin, pool, lambda slab: slab)


def _made_slabs(
    tensor: FloatTensor,
    twin: FloatTensor | None,
    pool: ThreadPoolExecutor,
    make: Callable[[np.ndarray], T],
) -> Iterator[tuple[T, int]]:
    """What `make` makes of the slabs, on the pool's threads."""

    def made(start: int, stop: int) -> tuple[T, int]:
        slab = tensor.read_float32(start, stop)
        if not np.isfinite(slab).all():
            raise CheckpointError(f"{tensor.where}: holds NaN or infinity")
        if twin is not None and not np.array_equal(slab, twin.read_float32(start, stop)):
            raise twins_differ(tensor, twin)
        with own_mlx_stream():
            return make(slab), row_size * (stop - start)

    row_size = _stored_bytes(tensor) // max(1, tensor.shape[0])
    yield from ahead(
        pool, (partial(made, *r) for r in row_ranges(tensor.shape[0], row_size, SLAB_BYTES))
    )


def twins_differ(tensor: FloatTensor, twin: FloatTensor) -> CheckpointError:
    """The error for a tensor of the overlay that is not what the base has."""
    return CheckpointError(
        f"{tensor.where}: differs from {twin.where} of the base; an overlay may repeat base"
        " tensors, not change them"
    )


def _stored_bytes(tensor: FloatTensor) -> int:
    return prod(tensor.shape) * NUMPY_DTYPES[tensor.dtype].itemsize


def _packed_slabs(
    matrices: tuple[ExpertMatrix, ...], pool: ThreadPoolExecutor
) -> Iterator[tuple[np.ndarray, int]]:
    """Packed rows (rows, row_bytes) in order, and how many trits they hold."""
    yield from ahead(
        pool,
        (
            partial(_pack_slab, matrix, start, stop)
            for matrix in matrices
            for out, width in [matrix.trits.shape]
            for start, stop in row_ranges(out, width, SLAB_BYTES, _TRITS_PER_BYTE)
        ),
    )


def _pack_slab(matrix: ExpertMatrix, start: int, stop: int) -> tuple[np.ndarray, int]:
    if isinstance(matrix.trits, PackedTrits):
        return matrix.trits.read_rows(start, stop), (stop - start) * matrix.trits.shape[1]
    trits = matrix.trits.read(start, stop)
    try:
        return pack_rows(trits), trits.size
    except TernaryError as error:
        wrong = np.argwhere((trits < -1) | (trits > 1))
        if not len(wrong):
            raise CheckpointError(f"{matrix.trits.where}: {error}") from error
        row, column = wrong[0].tolist()
        raise CheckpointError(
            f"{matrix.trits.where}: {trits[row, column]} at row {start + row}, column {column}:"
            " trits are -1, 0 or 1"
        ) from None
