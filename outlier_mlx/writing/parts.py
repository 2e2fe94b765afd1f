"""Parts: what the tensors of a model on disk are made of, and how they are written."""

import os
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

import mlx.core as mx

from outlier_mlx.models.summary import SummaryRow, summarize
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.writer import ShardedWriter, TensorSpec, WrittenFile

#: Name of the tensor, its next bytes, and how many bytes of source they used up.
Chunk = tuple[str, memoryview, int]

# Slabs read ahead: enough that no thread waits while one slab is hashed and written.
AHEAD = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Part(ABC):
    """The tensors of one module of a new model.

    Attributes:
        path: the module it belongs to, as in "model.layers.0.self_attn.q_proj".
        kind: the line of the summary that counts it.
    """

    path: str
    kind: str

    @property
    @abstractmethod
    def params(self) -> int:
        """Parameters of the model in this part."""

    @property
    @abstractmethod
    def source_bytes(self) -> int:
        """Bytes that will be read to make it."""

    @property
    def affine(self) -> tuple[int, int] | None:
        """Bits and group size, if it is stored in MLX's affine format."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on disk."""
        return sum(spec.nbytes for spec in self.specs())

    @abstractmethod
    def specs(self) -> list[TensorSpec]:
        """The tensors it writes, in order."""

    @abstractmethod
    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The bytes of those tensors, in order."""


@dataclass(frozen=True)
class Parts:
    """The tensors of a new model folder, made from local sources.

    Attributes:
        parts: in the order in which they are written.
        what: how messages call what takes room on the disk.
    """

    parts: Sequence[Part]
    what: str = "the model"

    #: Whether the next run can resume what an unfinished one has written.
    keep: ClassVar[bool] = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.parts)

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(part.source_bytes for part in self.parts)

    @property
    def specs(self) -> list[TensorSpec]:
        """All tensors, in order."""
        return [spec for part in self.parts for spec in part.specs()]

    @property
    def rows(self) -> list[SummaryRow]:
        """Parameters and bytes by kind of part, the total last."""
        return summarize((part.kind, part.params, part.nbytes) for part in self.parts)

    def room(self, target: Path) -> int:
        """Bytes that the disk needs for writing them into the folder `target`."""
        return self.nbytes

    def write(self, folder: Path, progress: Progress = no_progress) -> list[WrittenFile]:
        """Write them into files of a folder.

        Args:
            folder: an existing folder.
            progress: called with bytes of source read so far, and in all.

        Returns:
            The files whose checksums were taken on the way.
        """
        return self.write_shards(folder, Tally(self.source_bytes, progress))

    def write_shards(self, folder: Path, tally: "Tally") -> list[WrittenFile]:
        """Write the shards of a folder and their index; one part is open at a time."""
        if not self.parts:
            return []
        with (
            ShardedWriter(folder, self.specs) as writer,
            # Left early (an error, Ctrl-C), the pools drop what they have not begun.
            reading_pool() as pool,
            # A thread of its own hashes and writes: the pool goes on with the next part meanwhile.
            reading_pool(threads=1) as writing,
            small_cache(),
        ):

            def write(name: str, chunk: memoryview, used: int) -> int:
                writer.write(name, chunk)
                return used

            chunks = (partial(write, *c) for part in self.parts for c in part.chunks(pool))
            for used in ahead(writing, chunks):
                tally.add(used)
            return writer.finish()


@dataclass
class Tally:
    """Counts bytes, and calls a progress callback with the sum and `total`."""

    total: int
    progress: Progress
    done: int = 0

    def add(self, nbytes: int) -> None:
        """Count bytes."""
        self.done += nbytes
        if nbytes:
            self.progress(self.done, self.total)


def quantization(parts: Iterable[Part], default: tuple[int, int] | None = None) -> dict:
    """The field `quantization` of the config.json of these parts; empty if none is quantized.

    Args:
        parts: the parts of the model.
        default: bits and group size of modules that are not listed; by default the most common.
    """
    stored = {part.path: part.affine for part in parts if part.affine is not None}
    if not stored:
        return {}
    usual = default or Counter(stored.values()).most_common(1)[0][0]

    def spelled(affine: tuple[int, int]) -> dict:
        return {"group_size": affine[1], "bits": affine[0], "mode": "affine"}

    others = {path: spelled(affine) for path, affine in stored.items() if affine != usual}
    return {"quantization": spelled(usual) | others}


def by_tensor(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Order chunks by tensor. The first tensor's are not held back; the others should be small."""
    first, others = "", defaultdict[str, list[memoryview]](list)
    for name, chunk, used in chunks:
        first = first or name
        if name == first:
            yield name, chunk, used
        else:
            others[name].append(chunk)
    for name, held in others.items():
        for chunk in held:
            yield name, chunk, 0


def ahead(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of calls, in order; the pool computes up to `AHEAD` of them in advance."""
    waiting: deque[Future[T]] = deque()
    for call in calls:
        waiting.append(pool.submit(call))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class reading_pool:
    """Threads for `Part.chunks` or `ShardedWriter.write`: by default as many as cores."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or os.cpu_count() or 1

    def __enter__(self) -> ThreadPoolExecutor:
        self._pool = ThreadPoolExecutor(max_workers=self._threads)
        return self._pool

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class small_cache:
    """Stops MLX from keeping freed buffers: slabs differ in size, so few could be used again."""

    def __enter__(self) -> None:
        self._limit = mx.set_cache_limit(0)

    def __exit__(self, *_: object) -> None:
        mx.set_cache_limit(self._limit)
