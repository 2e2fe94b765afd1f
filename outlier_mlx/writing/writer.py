"""Writers of sharded safetensors. Every output shape is known before the first byte is written.

`ShardedWriter` takes the tensors' bytes in order: nothing has to be held back, memory stays at one
chunk, and the checksum is taken on the way. `PlacedWriter` takes them in any order, and over
several runs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from outlier_mlx.errors import OutlierError
from outlier_mlx.storage.output import flush, sync, write_json
from outlier_mlx.storage.safetensors import NUMPY_DTYPES
from outlier_mlx.storage.shards import INDEX_NAME

#: The shard size that mlx-lm writes, too.
MAX_SHARD_BYTES = 5 * 1000**3
# Large enough that hashing runs at full speed, small enough for a smooth bar.
_BLOCK = 4 << 20
# Bytes after which they are flushed to the disk, while more are written.
_FLUSHED = 64 << 20


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype and shape of a tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: its name, SHA-256 and size in bytes."""

    name: str
    sha256: str
    nbytes: int


def assign_shards(
    specs: Iterable[TensorSpec], max_bytes: int = MAX_SHARD_BYTES
) -> list[list[TensorSpec]]:
    """Divide tensors among files of at most `max_bytes`; a larger tensor gets its own file."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


class ShardedWriter:
    """Writes `model-XXXXX-of-XXXXX.safetensors` and their index into a folder.

    Use as a context manager; call `write` with the bytes of each tensor in the order of `specs`,
    in as many chunks as you like, then `finish`.

    Args:
        folder: an existing folder.
        specs: all tensors, in the order in which they will be written.
        max_shard_bytes: the size at which a new file begins.
    """

    def __init__(
        self, folder: Path, specs: list[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.folder = folder
        self._shards = assign_shards(specs, max_shard_bytes)
        self._pending = [(n, spec) for n, shard in enumerate(self._shards) for spec in shard]
        self._next = 0
        self._left = 0
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._written: list[WrittenFile] = []
        self._flushing = ThreadPoolExecutor(max_workers=1)
        self._flushed: Future[None] | None = None
        self._unflushed = 0

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flushing.shutdown(cancel_futures=True)
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, name: str, chunk: memoryview | bytes) -> None:
        """Append bytes to tensor `name`, which must be the current one or the next."""
        view = memoryview(chunk).cast("B")
        if self._left == 0:
            self._begin(name)
        _, spec = self._pending[self._next]
        if spec.name != name or view.nbytes > self._left:
            raise OutlierError(f"{name}: written out of order or too long ({spec.name} is open)")
        self._put(view)
        self._left -= view.nbytes
        if self._left == 0:
            self._next += 1

    def finish(self) -> list[WrittenFile]:
        """Close the last shard, write the index, and return all files with their checksums."""
        if self._left or self._next != len(self._pending):
            raise OutlierError(f"{self._pending[self._next][1].name}: not written to its end")
        self._end_shard()
        return [*self._written, _write_index(self.folder, self._shards)]

    def _begin(self, name: str) -> None:
        if self._next == len(self._pending):
            raise OutlierError(f"{name}: more tensors written than announced")
        number, spec = self._pending[self._next]
        if spec is self._shards[number][0]:
            self._end_shard()
            self._file = (self.folder / _shard_name(number, self._shards)).open("xb")
            self._hash = hashlib.sha256()
            self._put(_header(self._shards[number]))
        self._left = spec.nbytes

    def _end_shard(self) -> None:
        if self._file is None:
            return
        name = Path(self._file.name).name
        if self._flushed is not None:
            self._flushed.result()
            self._flushed = None
        nbytes = self._file.tell()
        self._file.close()
        self._file = None
        self._written.append(WrittenFile(name, self._hash.hexdigest(), nbytes))

    def _put(self, view: memoryview | bytes) -> None:
        assert self._file is not None
        self._hash.update(view)
        self._file.write(view)
        self._unflushed += len(view)
        if self._unflushed >= _FLUSHED and (self._flushed is None or self._flushed.done()):
            # So that there is little to wait for when all is written. An error must be raised
            # here: the system tells it only once.
            if self._flushed is not None:
                self._flushed.result()
            self._flushed = self._flushing.submit(os.fsync, self._file.fileno())
            self._unflushed = 0


class PlacedWriter:
    """Writes the files that `ShardedWriter` writes, with the bytes in any order.

    Files that an earlier run began are kept. Use as a context manager; call `write` with
    every byte of every tensor, then `finish`.

    Args:
        folder: an existing folder; of an earlier run only if its `specs` were the same.
        specs: all tensors, in the order in which they stand in the files.
        max_shard_bytes: the size at which a new file begins.
    """

    def __init__(
        self, folder: Path, specs: list[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.folder = folder
        self._shards = assign_shards(specs, max_shard_bytes)
        self._handles: list[int] = []
        self._headers = [_header(shard) for shard in self._shards]
        self._places: dict[str, tuple[int, int, int]] = {}  # shard, first byte, end
        for number, shard in enumerate(self._shards):
            end = len(self._headers[number])
            for spec in shard:
                self._places[spec.name] = (number, end, end + spec.nbytes)
                end += spec.nbytes
        #: Bytes of all shards together.
        self.nbytes = sum(len(header) for header in self._headers) + sum(s.nbytes for s in specs)

    def is_begun(self) -> bool:
        """Whether an earlier run made all files in their full length."""
        return all(
            path.is_file() and path.stat().st_size == nbytes for path, nbytes in self._files()
        )

    def _files(self) -> Iterator[tuple[Path, int]]:
        for number, shard in enumerate(self._shards):
            name = _shard_name(number, self._shards)
            yield self.folder / name, self._places[shard[-1].name][2]

    def __enter__(self) -> "PlacedWriter":
        try:
            for number, (path, nbytes) in enumerate(self._files()):
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                self._handles.append(handle)
                os.ftruncate(handle, nbytes)
                _write_at(handle, memoryview(self._headers[number]), 0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            os.close(self._handles.pop())

    def write(self, name: str, start: int, chunk: memoryview | bytes) -> None:
        """Write bytes of tensor `name` from its byte `start` on."""
        view = memoryview(chunk).cast("B")
        number, first, end = self._places[name]
        if start < 0 or first + start + view.nbytes > end:
            raise OutlierError(f"{name}: {view.nbytes} bytes at {start} are not within it")
        _write_at(self._handles[number], view, first + start)

    def sync(self) -> None:
        """Flush everything written so far to the disk, so that it survives a power failure."""
        for handle in self._handles:
            flush(handle)
        sync(self.folder)

    def finish(self, advance: Callable[[int], None] | None = None) -> list[WrittenFile]:
        """Read all files back for their checksums, write the index, and return them.

        Args:
            advance: called with the bytes of each block that was read.
        """
        written = []
        for number, handle in enumerate(self._handles):
            digest, nbytes = hashlib.sha256(), 0
            while block := os.pread(handle, _BLOCK, nbytes):
                digest.update(block)
                nbytes += len(block)
                if advance is not None:
                    advance(len(block))
            name = _shard_name(number, self._shards)
            written.append(WrittenFile(name, digest.hexdigest(), nbytes))
        return [*written, _write_index(self.folder, self._shards)]


def _write_at(handle: int, view: memoryview, offset: int) -> None:
    while view.nbytes:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def _shard_name(number: int, shards: list[list[TensorSpec]]) -> str:
    return f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"


def _write_index(folder: Path, shards: list[list[TensorSpec]]) -> WrittenFile:
    places = {
        spec.name: _shard_name(number, shards)
        for number, shard in enumerate(shards)
        for spec in shard
    }
    total = sum(spec.nbytes for shard in shards for spec in shard)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places})
    data = (folder / INDEX_NAME).read_bytes()
    return WrittenFile(INDEX_NAME, hashlib.sha256(data).hexdigest(), len(data))


def _header(specs: list[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
