"""A rank's part of paged experts, read from the files of whole experts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from outlier_mlx.engine.distributed.cuts import Cut
from outlier_mlx.engine.paging.reading import Chunk
from outlier_mlx.engine.paging.reads import ExpertFiles, Piece
from outlier_mlx.storage.safetensors import NUMPY_DTYPES, TensorRef
from outlier_mlx.storage.tensors import row_ranges


@dataclass(frozen=True)
class ColumnsChunk(Chunk):
    """Columns of rows, which are read as a whole.

    Attributes:
        rows: number of rows.
        cut: which of their bytes are taken.
        row_nbytes: bytes of a whole row.
    """

    rows: int
    cut: Cut
    row_nbytes: int

    def read(self, scratch: memoryview) -> None:
        """Fill the buffer; see `Chunk.read`."""
        whole = memoryview(bytearray(self.rows * self.row_nbytes))
        Chunk(self.file, self.tensor, self.offset, whole).read(scratch)
        rows = np.frombuffer(whole, np.uint8).reshape(self.rows, -1)
        own = np.frombuffer(self.buffer, np.uint8).reshape(self.rows, -1)
        for run in self.cut.runs:
            own[:, run.at : run.at + run.count] = rows[:, run.start : run.stop]


class ExpertParts(ExpertFiles):
    """The same columns of each expert of a model in its files."""

    def __init__(self, tensors: Mapping[str, TensorRef], cuts: Mapping[str, Cut], **how: Any):
        """Open the files; see `ExpertFiles`.

        Args:
            tensors: those of the whole model.
            cuts: the parts of tensors, by their names.
            how: further arguments of `ExpertFiles`.
        """
        self._cuts = cuts
        super().__init__(tensors, **how)

    def _described(self) -> tuple[int, tuple[Piece, ...]]:
        experts, pieces = super()._described()
        stack = next(iter(self._stacks.values()))
        found = []
        for piece in pieces:
            cut = self._cuts.get(stack[piece.name].name)
            found.append(piece if cut is None else replace(piece, shape=cut.shape(piece.shape)))
        return experts, tuple(found)

    def _chunks(self, tensor: TensorRef, expert: int, buffer: memoryview) -> Iterator[Chunk]:
        cut = self._cuts.get(tensor.name)
        if cut is None:
            yield from super()._chunks(tensor, expert, buffer)
            return
        np.frombuffer(buffer, np.uint8)[:] = cut.fill
        itemsize, shape = NUMPY_DTYPES[tensor.dtype].itemsize, tensor.shape[1:]
        file = self._files[tensor.file]
        begin = tensor.offset + expert * prod(shape) * itemsize
        if cut.axis == -1 and len(shape) > 1:
            nbytes = shape[-1]  # packed rows are bytes
            for start, stop in row_ranges(shape[0], nbytes, self._chunk_bytes):
                part = buffer[start * cut.length : stop * cut.length]
                offset = begin + start * nbytes
                yield ColumnsChunk(file, tensor.name, offset, part, stop - start, cut, nbytes)
            return
        row = itemsize * (shape[-1] if cut.axis == -2 else 1)
        for run in cut.runs:
            part = buffer[run.at * row : (run.at + run.count) * row]
            yield from self._pieces_of(tensor, begin + run.start * row, part)
