"""Parts that are made from one projection of a layer's experts."""

from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import mlx.core as mx
import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.runtime.affine2 import TRITS_PER_BYTE, affine_group, rows_to_affine2
from outlier_mlx.storage.rounding import narrowed
from outlier_mlx.storage.tensors import ExpertMatrix, PackedTrits, row_ranges
from outlier_mlx.ternary import TernaryError, pack_rows, row_bytes
from outlier_mlx.writing.float_parts import SLAB_BYTES, affine_specs, as_bytes
from outlier_mlx.writing.parts import Chunk, Part, ahead, by_tensor
from outlier_mlx.writing.writer import TensorSpec


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
        """Bytes that are read: one for each trit."""
        return self.params

    def of_expert(self, number: int) -> "FromExperts":
        """The part of one expert; its bytes are contiguous in each tensor of this part."""
        return replace(self, matrices=self.matrices[number : number + 1])

    @abstractmethod
    def code_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The bytes of the weights, which depend only on trits."""

    @abstractmethod
    def scale_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The bytes of the other tensors, which depend only on scales."""

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The bytes of the weights, then those of the other tensors."""
        yield from self.code_chunks(pool)
        yield from self.scale_chunks(pool)


@dataclass(frozen=True)
class TernaryExperts(FromExperts):
    """One projection of a layer's experts: `weight` (experts, out, row_bytes) and `scales`."""

    def specs(self) -> list[TensorSpec]:
        """Packed rows uint8, and a float32 scale for each row."""
        experts = len(self.matrices)
        out, width = self.matrices[0].trits.shape
        return [
            TensorSpec(f"{self.path}.weight", "U8", (experts, out, row_bytes(width))),
            TensorSpec(f"{self.path}.scales", "F32", (experts, out)),
        ]

    def code_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """Rows that the pool's threads pack."""
        for rows, trits in _packed_slabs(self.matrices, pool):
            yield f"{self.path}.weight", rows.data, trits

    def scale_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The float32 scales of the rows, expert by expert."""
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
    def affine(self) -> tuple[int, int]:
        """Bits and group size."""
        return 2, affine_group(self.matrices[0].trits.shape[1])

    def of_expert(self, number: int) -> "AffineExperts":
        """The part of one expert."""
        one = slice(number, number + 1)
        return replace(self, matrices=self.matrices[one], factors=self.factors[one])

    def specs(self) -> list[TensorSpec]:
        """Codes, scales and biases; see `affine_specs`."""
        shape = (len(self.matrices), *self.matrices[0].trits.shape)
        return affine_specs(self.path, shape, self.affine, self.dtype)

    def code_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """Codes slab by slab."""
        width = self.matrices[0].trits.shape[1]
        for rows, trits in _packed_slabs(self.matrices, pool):
            codes, _, _ = rows_to_affine2(mx.array(rows), mx.zeros(rows.shape[:1]), width)
            yield f"{self.path}.weight", as_bytes(codes), trits

    def scale_chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """All scales, then all biases."""
        groups = self.matrices[0].trits.shape[1] // self.affine[1]
        factors = self.factors or (1.0,) * len(self.matrices)
        for name, sign in (("scales", 1.0), ("biases", -1.0)):
            for matrix, factor in zip(self.matrices, factors, strict=True):
                product = matrix.row_scales().astype(np.float64) * (sign * factor)
                where = matrix.scale.where
                stored = narrowed(narrowed(product, "float32", where), self.dtype, where)
                yield f"{self.path}.{name}", np.repeat(stored, groups).data.cast("B"), 0


@dataclass(frozen=True)
class Stacked(Part):
    """One projection of a layer's experts as MLX has it, (experts, out, in), perhaps quantized.

    Attributes:
        members: one for each expert, all with the same names of tensors.
    """

    members: tuple[Part, ...]

    @property
    def affine(self) -> tuple[int, int] | None:
        """Bits and group size of each expert; None if not quantized."""
        return self.members[0].affine

    @property
    def params(self) -> int:
        """Weights of all experts."""
        return sum(member.params for member in self.members)

    @property
    def source_bytes(self) -> int:
        """Bytes that are read for all experts."""
        return sum(member.source_bytes for member in self.members)

    def specs(self) -> list[TensorSpec]:
        """The tensors of a member, with the experts as first axis."""
        count = len(self.members)
        return [
            TensorSpec(spec.name, spec.dtype, (count, *spec.shape))
            for spec in self.members[0].specs()
        ]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """Weights expert by expert, then the scales and biases, which are kept until then."""
        return by_tensor(chunk for member in self.members for chunk in member.chunks(pool))


def _packed_slabs(
    matrices: tuple[ExpertMatrix, ...], pool: ThreadPoolExecutor
) -> Iterator[tuple[np.ndarray, int]]:
    """Packed rows (rows, row_bytes) in order, and the number of trits in them."""
    yield from ahead(
        pool,
        (
            partial(_pack_slab, matrix, start, stop)
            for matrix in matrices
            for out, width in [matrix.trits.shape]
            # Where rows share bytes, every fifth begins with one.
            for start, stop in row_ranges(out, width, SLAB_BYTES, TRITS_PER_BYTE)
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
