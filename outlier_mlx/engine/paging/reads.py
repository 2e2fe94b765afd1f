"""Where a model's experts are in its files, and how they get into memory.

The files stay open while the model lives, so that nobody can put other bytes in their place
unnoticed. Reads go straight into the buffers in which experts are used. Nothing is mapped, and no
read-ahead is asked for: `docs/memory.md` has measurements.
"""

import re
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from outlier_mlx.engine.machine import free
from outlier_mlx.engine.paging.equal import equal_experts
from outlier_mlx.engine.paging.policies import Key
from outlier_mlx.engine.paging.reading import ALIGNMENT, Chunk, OpenFile, Readers, Reading
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.safetensors import NUMPY_DTYPES, TensorRef, read_header

THREADS = 4
CHUNK_BYTES = 4 << 20

_EXPERTS = re.compile(
    r".*\blayers\.(\d+)\.\w+\.switch_mlp\.((?:gate|up|down)_proj\.(?:weight|scales|biases))"
)
_ORDER = [
    f"{projection}_proj.{name}"
    for projection in ("gate", "up", "down")
    for name in ("weight", "scales", "biases")
]


@dataclass(frozen=True)
class Piece:
    """One array of an expert, the same for all of them.

    Attributes:
        name: "gate_proj.weight", for example.
        dtype: as safetensors spells it: "U8".
        shape: without the axis of experts.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


def beyond_the_cache(nbytes: int, taken: int) -> bool:
    """Whether experts are read past the page cache: where it has no room for all of them.

    Args:
        nbytes: bytes of all experts in the files.
        taken: memory that the model will take.
    """
    if sys.platform != "linux":  # it was not measured on macOS
        return False
    found = free()
    return found is not None and nbytes > found.nbytes - taken


class ExpertFiles:
    """The experts of a model in its files.

    Attributes:
        layers: numbers of the layers that have experts, in order.
        experts: experts in each of them.
        pieces: what an expert consists of: gate, up and down, of each weight, then scales.
        nbytes: bytes of an expert.
        read_bytes: bytes that were asked for so far.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorRef],
        *,
        direct: bool = False,
        threads: int = THREADS,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Open the files of a model's experts.

        Args:
            tensors: those of the model; those that are no experts are left alone.
            direct: read past the page cache, where the system can.
            threads: reads at a time, at most.
            chunk_bytes: bytes of a read, at most.

        Raises:
            CheckpointError: there are no experts, they differ in shape, or a file is not the one
                whose header was read.
            OutlierError: a file cannot be opened.
        """
        self._stacks: dict[int, dict[str, TensorRef]] = {}
        for tensor in tensors.values():
            if found := _EXPERTS.fullmatch(tensor.name):
                self._stacks.setdefault(int(found[1]), {})[found[2]] = tensor
        self.layers = tuple(sorted(self._stacks))
        self.experts, self.pieces = self._described()
        self.nbytes = sum(piece.nbytes for piece in self.pieces)
        self._files: dict[Path, OpenFile] = {}
        for stack in self._stacks.values():
            for tensor in stack.values():
                if tensor.file not in self._files:
                    self._files[tensor.file] = OpenFile(tensor.file, direct)
        self._check_headers()
        self._threads, self._chunk_bytes = threads, chunk_bytes
        self._readers = self._new_readers()
        self.read_bytes = 0

    def start(
        self, layer: int, expert: int, buffers: Sequence[memoryview], *, early: bool = False
    ) -> Reading:
        """Begin to read an expert.

        Args:
            layer: number of its layer.
            expert: its number.
            buffers: writable bytes, one buffer for each of `pieces`, of just their sizes.
            early: it may be needed later; whatever is needed now is read first.

        Returns:
            What to wait for. Until it is `done`, nothing else may use the buffers, also if waiting
            failed or was interrupted.
        """
        chunks: list[Chunk] = []
        for piece, buffer in zip(self.pieces, buffers, strict=True):
            if buffer.nbytes != piece.nbytes:
                raise ValueError(f"{piece.name}: {buffer.nbytes} bytes, expected {piece.nbytes}")
            chunks += self._chunks(self._stacks[layer][piece.name], expert, buffer)
        self.read_bytes += self.nbytes
        if self._readers.closed:  # reads that do not end keep their threads
            self._readers = self._new_readers()
        return self._readers.start(chunks, early=early)

    def _chunks(self, tensor: TensorRef, expert: int, buffer: memoryview) -> Iterable[Chunk]:
        """What is to be read of an expert's array into its buffer."""
        return self._pieces_of(tensor, tensor.offset + expert * buffer.nbytes, buffer)

    def _pieces_of(self, tensor: TensorRef, begin: int, buffer: memoryview) -> Iterable[Chunk]:
        """Bytes of a file from `begin` on, in chunks."""
        for at in range(0, buffer.nbytes, self._chunk_bytes):
            part = buffer[at : at + self._chunk_bytes]
            yield Chunk(self._files[tensor.file], tensor.name, begin + at, part)

    def read(self, layer: int, expert: int, buffers: Sequence[memoryview]) -> None:
        """Read an expert; see `start`, and `Reading.wait` for errors."""
        self.start(layer, expert, buffers).wait()

    @cached_property
    def equal(self) -> Mapping[Key, Key]:
        """Of experts whose bytes are those of an earlier one: the first of these.

        Raises:
            CheckpointError: a file became shorter.
            OutlierError: a file cannot be read.
        """
        names = [piece.name for piece in self.pieces]
        return equal_experts(
            {layer: [stack[name] for name in names] for layer, stack in self._stacks.items()}
        )

    def close(self) -> None:
        """Stop reading; the files are closed when nothing uses them any more."""
        self._finalizer()

    def _new_readers(self) -> Readers:
        readers = Readers(self._threads, self._chunk_bytes + 2 * ALIGNMENT)
        self._finalizer = weakref.finalize(self, readers.close)
        return readers

    def _described(self) -> tuple[int, tuple[Piece, ...]]:
        """Experts of a layer, and their pieces, which must be the same in all layers."""
        found = {
            tuple((name, stack[name].dtype, stack[name].shape) for name in sorted(stack))
            for stack in self._stacks.values()
        }
        if not found:
            raise CheckpointError("the model has no experts")
        arrays = found.pop()
        counts = {shape[:1] for _, _, shape in arrays}
        if found or len(counts) > 1 or () in counts:
            raise CheckpointError("the model's experts are not of one shape")
        pieces = [Piece(name, dtype, shape[1:]) for name, dtype, shape in arrays]
        pieces.sort(key=lambda piece: _ORDER.index(piece.name))
        return arrays[0][2][0], tuple(pieces)

    def _check_headers(self) -> None:
        """Check that what was opened is what was described."""
        for path, file in self._files.items():
            now = read_header(path)
            file.check()
            for stack in self._stacks.values():
                for tensor in stack.values():
                    if tensor.file == path and now.get(tensor.name) != tensor:
                        raise CheckpointError(f"{path}: {tensor.name}: changed while it was opened")
