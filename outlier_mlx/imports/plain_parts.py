"""Unquantized experts: a matrix each on disk, one tensor in MLX."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.writing.parts import Chunk, Part
from outlier_mlx.writing.tensors import SAFETENSORS_NAMES, Plain
from outlier_mlx.writing.writer import TensorSpec


@dataclass(frozen=True)
class StackedPlain(Part):
    """One projection of a layer's experts, (experts, out, in), rounded to `dtype`."""

    tensors: tuple[TensorRef, ...]
    name: str
    dtype: str

    @property
    def params(self) -> int:
        """Elements of all matrices."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        """The matrices' size on disk."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def specs(self) -> list[TensorSpec]:
        """The one tensor."""
        shape = (len(self.tensors), *self.tensors[0].shape)
        return [TensorSpec(self.name, SAFETENSORS_NAMES[self.dtype], shape)]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The matrices' slabs, expert by expert."""
        for tensor in self.tensors:
            yield from Plain(self.path, self.kind, tensor, self.name, self.dtype).chunks(pool)
