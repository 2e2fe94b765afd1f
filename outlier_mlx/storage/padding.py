"""Experts that are written wider than they are, for formats that cut rows into blocks or groups.

Zeros change nothing: where rows of the gate and of `up` are 0, so is silu(0) * 0, and what `down`
adds for these columns.
"""

from dataclasses import dataclass

import numpy as np

from outlier_mlx.storage.tensors import Derived, ExpertMatrix, Trits


@dataclass(frozen=True)
class PaddedTrits:
    """A matrix of trits with zeros at its right and below it."""

    trits: Trits
    shape: tuple[int, int]

    @property
    def where(self) -> str:
        """File and key."""
        return self.trits.where

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.trits.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as int8 (rows, in)."""
        stop = self.shape[0] if stop is None else stop
        own, width = self.trits.shape
        rows = np.zeros((0, width), np.int8)
        if start < own:
            rows = self.trits.read(start, min(stop, own))
        return np.pad(rows, ((0, stop - start - len(rows)), (0, self.shape[1] - width)))


@dataclass(frozen=True)
class _PaddedScales(Derived):
    """The scales of a matrix' rows, which may be one for all, and zeros after them."""

    own: int
    rows: int

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Scales `start` to `stop`."""
        values = np.broadcast_to(self.tensor.read_float32().reshape(-1), (self.own,))
        return np.pad(values, (0, self.rows - self.own))[start:stop]


def padded(matrix: ExpertMatrix, shape: tuple[int, int]) -> ExpertMatrix:
    """A matrix widened by zeros to a shape that is at least its own."""
    own = tuple(matrix.trits.shape)
    if own == shape:
        return matrix
    scales = _PaddedScales(matrix.scale, own[0], shape[0])
    return ExpertMatrix(PaddedTrits(matrix.trits, shape), scales)


def padding_note(own: int, width: int, more: str = "") -> list[str]:
    """What is said of experts that are written wider than they are, if they are."""
    said = f"experts are {width} wide instead of {own}: the rest is zeros{more}"
    return [] if own == width else [said]


def whole_blocks(own: int, block: int) -> int:
    """The least width of whole blocks that is at least `own`."""
    return -(-own // block) * block
