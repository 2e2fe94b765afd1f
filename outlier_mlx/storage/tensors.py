"""Tensors that are somewhere on disk: what parts and overlays are made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.safetensors import TensorRef


class FloatTensor(Protocol):
    """A tensor of floats somewhere on disk, or made from what is there."""

    @property
    def dtype(self) -> str:
        """The safetensors dtype of what is stored, for example "F16"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def where(self) -> str:
        """File and key, for messages."""

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the first axis as float32."""


@dataclass(frozen=True)
class Derived:
    """Base of a `FloatTensor` whose rows are made from another's, in its shape."""

    tensor: FloatTensor

    @property
    def dtype(self) -> str:
        """The dtype of what is stored."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, unchanged."""
        return self.tensor.shape

    @property
    def where(self) -> str:
        """File and key."""
        return self.tensor.where


@dataclass(frozen=True)
class Stored(Derived):
    """Weights or scales that are read out of a tensor in another format."""

    tensor: TensorRef

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.tensor.nbytes


class Trits(Protocol):
    """A matrix of trits somewhere on disk, read by rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""

    @property
    def where(self) -> str:
        """File and key, for messages."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as int8 (rows, in); values are checked by who packs them."""


@runtime_checkable
class PackedTrits(Trits, Protocol):
    """Trits that are stored five a byte, so that packed rows need no unpacking."""

    def read_rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as `ternary.pack_rows` packs them, (rows, row_bytes) uint8, checked."""


@dataclass(frozen=True)
class ExpertMatrix:
    """One projection of one expert: W = scale * trits."""

    trits: Trits
    scale: FloatTensor

    def row_scales(self) -> np.ndarray:
        """One scale a row, (out,) float32; a scale for the whole matrix is repeated.

        Raises:
            CheckpointError: a scale is NaN, infinite or negative.
        """
        values = self.scale.read_float32().reshape(-1)
        if not np.isfinite(values).all() or (values < 0).any():
            bad = values[~(values >= 0) | ~np.isfinite(values)][0]
            raise CheckpointError(
                f"{self.scale.where}: scale {bad}, expected a finite number of 0 or more"
            )
        return np.broadcast_to(values, (self.trits.shape[0],)).copy()


def row_ranges(
    rows: int, row_size: int, slab: int = 1 << 20, multiple: int = 1
) -> Iterator[tuple[int, int]]:
    """Row numbers (start, stop) that cut a matrix into slabs.

    Args:
        rows: number of rows of the matrix.
        row_size: bytes or elements of a row.
        slab: bytes or elements that a slab has about, and at most where rows are not longer.
        multiple: each slab but the last has this many rows, or a multiple of it.
    """
    step = max(1, slab // max(1, row_size * multiple)) * multiple
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
