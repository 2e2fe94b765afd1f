"""Parts: what a model on disk consists of, and how their bytes stream into its files."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from outlier_mlx.terminal import Progress
from outlier_mlx.writing.writer import ShardedWriter, TensorSpec, WrittenFile

#: Name of the tensor, its next bytes, and how many bytes of source they used up.
Chunk = tuple[str, memoryview, int]

# Slabs read ahead: enough that no thread waits while one slab is hashed and written.
AHEAD = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Part(ABC):
    """Something that a model on disk stores.

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
    def nbytes(self) -> int:
        """Bytes that it takes on disk."""
        return sum(spec.nbytes for spec in self.specs())

    @abstractmethod
    def specs(self) -> list[TensorSpec]:
        """The tensors it writes, in order."""

    @abstractmethod
    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The bytes of those tensors, in order."""


def write_parts(
    parts: Sequence[Part], folder: Path, progress: Progress | None = None
) -> list[WrittenFile]:
    """Stream parts into the shards of a folder, and their index; one part is open at a time.

    Args:
        parts: in the order in which they are written.
        folder: an existing folder.
        progress: called with bytes of source read so far, and in all.
    """
    specs = [spec for part in parts for spec in part.specs()]
    total, done = sum(part.source_bytes for part in parts), 0
    with (
        ShardedWriter(folder, specs) as writer,
        # Left early (an error, Ctrl-C), the pool drops what it has not begun.
        reading_pool() as pool,
        small_cache(),
    ):
        for part in parts:
            for name, chunk, used in part.chunks(pool):
                writer.write(name, chunk)
                done += used
                if progress is not None and used:
                    progress(done, total)
        return writer.finish()


def ahead(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The calls' results in order; the pool works ahead of whoever takes them."""
    waiting: deque[Future[T]] = deque()
    for call in calls:
        waiting.append(pool.submit(call))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_text(folder: Path, name: str, text: str) -> WrittenFile:
    """Write a small file; what a manifest says of it."""
    (folder / name).write_text(text, encoding="utf-8")
    return described(folder, name)


def write_json(folder: Path, name: str, value: dict) -> WrittenFile:
    """Write a JSON object as people can read it."""
    return write_text(folder, name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def described(folder: Path, name: str) -> WrittenFile:
    """What a manifest says of a small file that is there."""
    data = (folder / name).read_bytes()
    return WrittenFile(name, hashlib.sha256(data).hexdigest(), len(data))


def listing(files: Sequence[WrittenFile]) -> dict[str, dict]:
    """The list of files in a manifest: SHA-256 and size by name."""
    return {
        file.name: {"sha256": file.sha256, "bytes": file.nbytes}
        for file in sorted(files, key=lambda file: file.name)
    }


class reading_pool:
    """Threads for `Part.chunks`, as many as cores."""

    def __enter__(self) -> ThreadPoolExecutor:
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        return self._pool

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class small_cache:
    """MLX keeps freed buffers for reuse; while slabs of all sizes pass, that is only memory."""

    def __enter__(self) -> None:
        self._limit = mx.set_cache_limit(0)

    def __exit__(self, *_: object) -> None:
        mx.set_cache_limit(self._limit)
