"""Parts of stored tensors along one axis: what a rank reads of them, and the shape that it gets."""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import mlx.core as mx
import numpy as np

from outlier_mlx.storage.safetensors import NUMPY_DTYPES, TensorRef
from outlier_mlx.storage.tensors import row_ranges

# Bytes of whole rows that are read at a time, where a part of each of them is wanted.
_SLAB = 4 << 20


@dataclass(frozen=True)
class Run:
    """Places `start` to `stop` of a stored axis, which come to the place `at` of a rank's axis."""

    start: int
    stop: int
    at: int = 0

    @property
    def count(self) -> int:
        """Number of places."""
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """A part of a tensor along one axis.

    Attributes:
        axis: -1 or -2: the last axis, or the one before.
        runs: what is taken, in the order of the result.
        length: length of the axis in the result.
        fill: value of what no run covers.
    """

    axis: int
    runs: tuple[Run, ...]
    length: int
    fill: int = 0

    @classmethod
    def span(cls, axis: int, start: int, stop: int) -> "Cut":
        """One run, and nothing else."""
        return cls(axis, (Run(start, stop),), stop - start)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part."""
        shape = list(stored)
        shape[self.axis] = self.length
        return tuple(shape)

    def read(self, tensor: TensorRef) -> mx.array:
        """Read this part of a tensor; of other rows, nothing is read.

        Raises:
            CheckpointError: the file became shorter since its header was read.
            OutlierError: it cannot be read.
        """
        part = np.full(self.shape(tensor.shape), self.fill, NUMPY_DTYPES[tensor.dtype])
        if self.axis == -1 and len(tensor.shape) > 1:
            self._read_columns(tensor, part)
        else:
            self._read_rows(tensor, part)
        array = mx.array(part)
        return array.view(mx.bfloat16) if tensor.dtype == "BF16" else array

    def of(self, array: mx.array) -> mx.array:
        """This part of an array, which is read as a whole for it."""
        size = array.shape[self.axis]
        index = np.full(self.length, size)
        for run in self.runs:
            index[run.at : run.at + run.count] = np.arange(run.start, run.stop)
        filling = mx.full(Cut(self.axis, (), 1).shape(array.shape), self.fill, array.dtype)
        whole = mx.concatenate([array, filling], axis=self.axis)
        return mx.take(whole, mx.array(index), axis=self.axis)

    def _read_rows(self, tensor: TensorRef, part: np.ndarray) -> None:
        if len(tensor.shape) == 1:
            stored, parts = replace(tensor, shape=(*tensor.shape, 1)), part[None, :, None]
        elif self.axis == -1:
            raise ValueError("columns are not rows")
        else:
            *lead, rows, columns = tensor.shape
            stored = replace(tensor, shape=(prod(lead) * rows, columns))
            parts = part.reshape(-1, self.length, columns)
        rows = tensor.shape[self.axis]
        for number, own in enumerate(parts):
            for run in self.runs:
                begin = number * rows
                own[run.at : run.at + run.count] = stored.read(begin + run.start, begin + run.stop)

    def _read_columns(self, tensor: TensorRef, part: np.ndarray) -> None:
        columns = tensor.shape[-1]
        stored = replace(tensor, shape=(prod(tensor.shape[:-1]), columns))
        flat = part.reshape(-1, self.length)
        nbytes = columns * NUMPY_DTYPES[tensor.dtype].itemsize
        for start, stop in row_ranges(len(flat), nbytes, _SLAB):
            rows = stored.read(start, stop)
            for run in self.runs:
                flat[start:stop, run.at : run.at + run.count] = rows[:, run.start : run.stop]


def spans(total: int, parts: int, unit: int = 1) -> list[tuple[int, int]]:
    """Boundaries (start, stop) of parts of a length, as equal as multiples of a unit can be.

    Where there are fewer units than parts, the unit does not count.

    Args:
        total: the length, at least `parts`.
        parts: their number.
        unit: what all boundaries but the last are multiples of.
    """
    unit = unit if total // unit >= parts else 1
    units = -(-total // unit)
    ends = [min(total, (part * units // parts) * unit) for part in range(parts + 1)]
    return list(pairwise(ends))
