"""Write affine matrices and plain tensors from GGUF tensors, slab by slab.

The output holds all codes of a tensor, then all scales, then all biases. So the source is read
three times, but from the page cache after the first time, and nothing has to be kept in memory.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports import gguf_blocks
from outlier_mlx.imports.codes import pack_codes
from outlier_mlx.imports.gguf_names import AnyRows
from outlier_mlx.storage.rounding import narrowed, require_affine, widened
from outlier_mlx.writing.float_parts import SAFETENSORS_NAMES, affine_specs
from outlier_mlx.writing.parts import Chunk, Part, ahead
from outlier_mlx.writing.writer import TensorSpec

#: Number of weights that a thread decodes at a time.
SLAB_WEIGHTS = 1 << 19


@dataclass
class RoundingErrors:
    """Largest errors of modules that are not stored exactly; complete once they are written."""

    largest: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, path: str, exact: np.ndarray, stored: np.ndarray) -> None:
        """Compare weights of the module `path` with their stored values."""
        error = exact - stored
        largest = max(float(error.max(initial=0)), -float(error.min(initial=0)))
        with self._lock:
            self.largest[path] = max(self.largest.get(path, 0.0), largest)


@dataclass(frozen=True)
class GgufPart(Part):
    """A tensor, or the three tensors of a quantized module, made from rows of GGUF tensors.

    Attributes:
        shape: shape of the weights before quantization.
        rows: source rows, in order.
        dtype: "float32", "float16" or "bfloat16": dtype of the weights, or of scales and biases.
        errors: collects the errors.
    """

    shape: tuple[int, ...]
    rows: tuple[AnyRows, ...]
    dtype: str
    errors: RoundingErrors

    @property
    def params(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def source_bytes(self) -> int:
        """Size of the source rows in bytes."""
        return sum(rows.nbytes for rows in self.rows)

    @property
    def kinds(self) -> list[str]:
        """The ggml types of the source rows, sorted."""
        return sorted({rows.tensor.kind for rows in self.rows})

    def _slabs(
        self, make: Callable[[AnyRows, int, int], np.ndarray], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[memoryview, int]]:
        """Call `make` for one slab of rows after another.

        Args:
            make: converts rows `start` to `stop` of `Rows`.
            pool: runs the calls.

        Yields:
            The bytes of each slab, and its size in the source.
        """

        def made(rows: AnyRows, start: int, stop: int) -> tuple[memoryview, int]:
            try:
                data = make(rows, start, stop)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{rows.tensor.where}: from row {rows.start + start}: {error}"
                ) from None
            used = (stop - start) * rows.tensor.row_bytes
            return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data, used

        calls = (
            partial(made, rows, start, min(rows.count, start + step))
            for rows in self.rows
            for step in [_step(rows)]
            for start in range(0, rows.count, step)
        )
        yield from ahead(pool, calls)


@dataclass(frozen=True)
class PlainTensor(GgufPart):
    """A weight or bias that is not quantized."""

    name: str

    @property
    def stored_as(self) -> str:
        """How it is stored, for messages."""
        return self.dtype

    def specs(self) -> list[TensorSpec]:
        """The tensor of shape `shape`."""
        return [TensorSpec(self.name, SAFETENSORS_NAMES[self.dtype], self.shape)]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The rows as numbers of `dtype`."""
        for data, used in self._slabs(self._floats, pool):
            yield self.name, data, used

    def _floats(self, rows: AnyRows, start: int, stop: int) -> np.ndarray:
        weights = gguf_blocks.values(rows.tensor.kind, rows.read(start, stop))
        stored = narrowed(weights, self.dtype, "weights")
        if self.dtype != "float32" and SAFETENSORS_NAMES[self.dtype] != rows.tensor.kind:
            self.errors.count(self.path, weights, widened(stored, self.dtype))
        return stored


@dataclass(frozen=True)
class AffineMatrix(GgufPart):
    """The `weight`, `scales` and `biases` of a module in MLX's affine format."""

    bits: int
    group: int

    @property
    def stored_as(self) -> str:
        """How it is stored, for messages."""
        return f"{self.bits}-bit codes in groups of {self.group}, {self.dtype} scales"

    @property
    def is_exact(self) -> bool:
        """Whether MLX computes exactly ggml's weights."""
        layouts = [gguf_blocks.AFFINE.get(kind) for kind in self.kinds]
        return all(a is not None and (a.half or self.dtype == "float32") for a in layouts)

    @property
    def affine(self) -> tuple[int, int]:
        """Bits and group size."""
        return self.bits, self.group

    def specs(self) -> list[TensorSpec]:
        """Packed weight, scales and biases; see `affine_specs`."""
        return affine_specs(self.path, self.shape, self.affine, self.dtype)

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """All codes, then all scales, then all biases."""
        for data, used in self._slabs(self._codes, pool):
            yield f"{self.path}.weight", data, used
        for n, name in enumerate(("scales", "biases")):
            for data, _ in self._slabs(partial(self._scales, n), pool):
                yield f"{self.path}.{name}", data, 0

    def _codes(self, rows: AnyRows, start: int, stop: int) -> np.ndarray:
        kind, raw = rows.tensor.kind, rows.read(start, stop)
        if kind not in gguf_blocks.AFFINE:
            weights = gguf_blocks.values(kind, raw)
            codes, found = gguf_blocks.quantize(weights, *self._grid(kind, raw), self.bits)
            self.errors.count(self.path, weights, found)
            return pack_codes(codes, self.bits)
        codes = gguf_blocks.codes(kind, raw)
        if not self.is_exact:
            weights = gguf_blocks.values(kind, raw)
            found = gguf_blocks.affine_values(codes, *self._grid(kind, raw))
            self.errors.count(self.path, weights, found)
        return pack_codes(codes, self.bits)

    def _scales(self, which: int, rows: AnyRows, start: int, stop: int) -> np.ndarray:
        found = self._grid(rows.tensor.kind, rows.read(start, stop))
        return narrowed(found[which], self.dtype, "scales")

    def _grid(self, kind: str, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scales and biases (rows, groups) of stored rows as float32, rounded to the dtype."""
        if kind in gguf_blocks.AFFINE:
            exact = gguf_blocks.scales(kind, raw, self.group)
        else:
            exact = gguf_blocks.grid(gguf_blocks.values(kind, raw), self.bits, self.group)
        stored = [narrowed(array, self.dtype, "scales") for array in exact]
        scales, biases = (widened(array, self.dtype) for array in stored)
        require_affine(scales, biases, self.bits, self.dtype, "scales")
        return scales, biases


def _step(rows: AnyRows) -> int:
    """Number of rows in a slab. If heads are reordered, a slab has whole heads only."""
    step = max(1, SLAB_WEIGHTS // rows.tensor.shape[-1])
    return max(rows.head, step - step % rows.head) if rows.head else step
