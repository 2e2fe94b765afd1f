"""Parts that are made from tensors of floats: norms, biases, matrices, quantized or not.

No part keeps more than a few slabs (groups of rows) in memory.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TypeVar

import mlx.core as mx
import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.rounding import STORED, narrowed, require_affine, require_fit, widened
from outlier_mlx.storage.safetensors import NUMPY_DTYPES
from outlier_mlx.storage.tensors import FloatTensor, row_ranges
from outlier_mlx.writing.mlx_stream import own_mlx_stream
from outlier_mlx.writing.parts import Chunk, Part, ahead, by_tensor
from outlier_mlx.writing.writer import TensorSpec

#: The safetensors names of the dtypes that models are written in.
SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Bytes of source read at a time: small enough to stay in a core's cache from reading to packing,
# and for the allocator to reuse: at 8 MB, fresh pages alone took a quarter of the time.
SLAB_BYTES = 2 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Constant(Part):
    """A small array in memory: alphas, biases of zero."""

    name: str
    value: np.ndarray
    dtype: str

    @property
    def params(self) -> int:
        """Elements of the array."""
        return self.value.size

    @property
    def source_bytes(self) -> int:
        """0: nothing is read from files."""
        return 0

    def specs(self) -> list[TensorSpec]:
        """The name, dtype and shape of its only tensor."""
        return [TensorSpec(self.name, SAFETENSORS_NAMES[self.dtype], self.value.shape)]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The array, in the dtype of the tier."""
        yield self.name, narrowed(self.value, self.dtype, self.name).data.cast("B"), 0


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
    """An unquantized tensor: norms, biases, the router, matrices that no group size divides.

    `twin` is the same tensor in another file, which must have the same values.
    """

    name: str
    dtype: str
    twin: FloatTensor | None = None

    def specs(self) -> list[TensorSpec]:
        """The name, dtype and shape of its only tensor."""
        return [TensorSpec(self.name, SAFETENSORS_NAMES[self.dtype], self.tensor.shape)]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The tensor slab by slab, rounded to the tier's dtype."""

        def rounded(slab: np.ndarray) -> memoryview:
            return narrowed(slab, self.dtype, self.tensor.where).data.cast("B")

        for data, used in make_slabs(self.tensor, self.twin, pool, rounded):
            yield self.name, data, used


@dataclass(frozen=True)
class Quantized(FromTensor):
    """A matrix of the base in MLX's affine format: `weight`, `scales` and `biases`."""

    bits: int
    group_size: int
    dtype: str
    twin: FloatTensor | None = None

    @property
    def affine(self) -> tuple[int, int]:
        """Bits and group size."""
        return self.bits, self.group_size

    def specs(self) -> list[TensorSpec]:
        """Packed weight, scales and biases; see `affine_specs`."""
        return affine_specs(self.path, self.tensor.shape, self.affine, self.dtype)

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The weight slab by slab, then the scales and biases, which are kept until then."""

        def quantized(slab: np.ndarray) -> tuple[memoryview, memoryview, memoryview]:
            w = _as_mlx(narrowed(slab, self.dtype, self.tensor.where), self.dtype)
            packed, *grid = mx.quantize(w, self.group_size, self.bits)
            stored = [np.frombuffer(as_bytes(found), STORED[self.dtype]) for found in grid]
            scales, biases = (widened(found, self.dtype) for found in stored)
            require_affine(scales, biases, self.bits, self.dtype, self.tensor.where)
            return as_bytes(packed), stored[0].data.cast("B"), stored[1].data.cast("B")

        def unordered() -> Iterator[Chunk]:
            for made, used in make_slabs(self.tensor, self.twin, pool, quantized):
                weight, scales, biases = made
                yield f"{self.path}.weight", weight, used
                yield f"{self.path}.scales", scales, 0
                yield f"{self.path}.biases", biases, 0

        return by_tensor(unordered())


def affine_specs(
    path: str, shape: tuple[int, ...], affine: tuple[int, int], dtype: str
) -> list[TensorSpec]:
    """The tensors of a module in MLX's affine format.

    Args:
        path: name of the module.
        shape: (..., out, in), the weight's before quantization.
        affine: bits and group size.
        dtype: dtype of scales and biases.

    Returns:
        Packed `weight` (..., out, in * bits / 32) uint32; `scales` and `biases`
        (..., out, in / group).
    """
    *lead, width = shape
    bits, group = affine
    groups = (*lead, width // group)
    return [
        TensorSpec(f"{path}.weight", "U32", (*lead, width * bits // 32)),
        TensorSpec(f"{path}.scales", SAFETENSORS_NAMES[dtype], groups),
        TensorSpec(f"{path}.biases", SAFETENSORS_NAMES[dtype], groups),
    ]


def as_bytes(array: mx.array) -> memoryview:
    """The bytes of an MLX array; bfloat16 is viewed as uint16, because NumPy does not have it."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array, copy=False)).data.cast("B")


def _as_mlx(stored: np.ndarray, dtype: str) -> mx.array:
    """The MLX array of what `narrowed` returns."""
    array = mx.array(stored)
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array


def make_slabs(
    tensor: FloatTensor,
    twin: FloatTensor | None,
    pool: ThreadPoolExecutor,
    make: Callable[[np.ndarray], T],
) -> Iterator[tuple[T, int]]:
    """The result of `make` for each slab, from the pool's threads, and its bytes of source."""

    def made(start: int, stop: int) -> tuple[T, int]:
        slab = tensor.read_float32(start, stop)
        require_fit(slab, "float32", tensor.where)
        if twin is not None and not np.array_equal(slab, twin.read_float32(start, stop)):
            raise twins_differ(tensor, twin)
        with own_mlx_stream():
            return make(slab), row_size * (stop - start)

    row_size = _stored_bytes(tensor) // max(1, tensor.shape[0])
    yield from ahead(
        pool, (partial(made, *r) for r in row_ranges(tensor.shape[0], row_size, SLAB_BYTES))
    )


def twins_differ(tensor: FloatTensor, twin: FloatTensor) -> CheckpointError:
    """The error for a tensor of the overlay that differs from the base's."""
    return CheckpointError(
        f"{tensor.where}: differs from {twin.where} of the base; an overlay may repeat base"
        " tensors, not change them"
    )


def _stored_bytes(tensor: FloatTensor) -> int:
    return prod(tensor.shape) * NUMPY_DTYPES[tensor.dtype].itemsize
