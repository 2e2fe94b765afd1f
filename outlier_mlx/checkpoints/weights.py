"""Experts' matrices that are not stored as int8 trits with a scale.

Nothing is read until rows are asked for; then every value is checked.
"""

from dataclasses import dataclass

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef
from outlier_mlx.storage.tensors import ExpertMatrix, FloatTensor, Stored, Trits, row_ranges

_WIDE_INTEGERS = ("I16", "I32", "I64")


@dataclass(frozen=True)
class WideTrits(Stored):
    """Trits in a dtype other than int8: a float or a wider integer."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as int8 (rows, in).

        Raises:
            CheckpointError: a value is not exactly -1, 0 or 1.
        """
        values = _read_exactly(self.tensor, start, stop)
        wrong = (values != 0) & (np.abs(values) != 1)
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            raise CheckpointError(
                f"{self.where}: {values[row, column]} at row {start + row}, column {column}:"
                " trits are -1, 0 or 1"
            )
        return values.astype(np.int8)


@dataclass(frozen=True)
class UnscaledTrits(Stored):
    """The signs of float weights that hold one magnitude, and zeros, in each row."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows as int8 (rows, in).

        Raises:
            CheckpointError: a row holds more than one magnitude.
        """
        values = _read_exactly(self.tensor, start, stop)
        sizes = np.abs(values)
        wrong = (values != 0) & (sizes != sizes.max(axis=1, keepdims=True, initial=0))
        if wrong.any():
            row = int(np.argwhere(wrong)[0, 0])
            raise CheckpointError(
                f"{self.where}: has no scale, and row {start + row} holds weights of more than one"
                " magnitude: not ternary weights"
            )
        return np.sign(values).astype(np.int8)


@dataclass(frozen=True)
class Magnitudes(Stored):
    """The scale of `UnscaledTrits`: the magnitude of each row; 0 for a row of zeros."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, 1)."""
        return (self.tensor.shape[0], 1)

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Magnitudes of rows `start` to `stop`, (rows, 1)."""
        rows, width = self.tensor.shape
        stop = rows if stop is None else min(stop, rows)
        sizes = np.empty((stop - start, 1), np.float32)
        for first, last in row_ranges(stop - start, width):
            values = self.tensor.read_float32(start + first, start + last)
            np.abs(values).max(axis=1, keepdims=True, initial=0, out=sizes[first:last])
        return sizes


def ternary_matrix(trits: Trits, scale: FloatTensor | None) -> ExpertMatrix | None:
    """An expert's matrix from its trits and scale; None if a scale is needed and missing.

    Trits may be stored in a float or any signed integer dtype. A float `*_proj.weight` needs no
    scale if each of its rows holds one magnitude.

    Raises:
        CheckpointError: the dtype cannot hold trits, or the tensor is not a matrix.
    """
    if not isinstance(trits, TensorRef):
        return ExpertMatrix(trits, scale) if scale is not None else None
    if len(trits.shape) != 2:
        raise CheckpointError(f"{trits.where}: shape {trits.shape}, expected a matrix (out, in)")
    if trits.dtype in FLOAT_DTYPES and scale is None and trits.name.endswith("_proj.weight"):
        return ExpertMatrix(UnscaledTrits(trits), Magnitudes(trits))
    if trits.dtype not in ("I8", *_WIDE_INTEGERS, *FLOAT_DTYPES):
        raise CheckpointError(f"{trits.where}: dtype {trits.dtype}, trits are I8")
    if scale is None:
        return None
    return ExpertMatrix(trits if trits.dtype == "I8" else WideTrits(trits), scale)


def _read_exactly(tensor: TensorRef, start: int, stop: int | None) -> np.ndarray:
    """Rows in a dtype that NumPy can calculate with and that holds every value exactly."""
    return (tensor.read_float32 if tensor.dtype == "BF16" else tensor.read)(start, stop)
