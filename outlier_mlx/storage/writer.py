"""A streaming writer of sharded safetensors: header first, then the tensors' bytes in order.

Every output shape is known before the first byte is written, so nothing has to be held back:
memory stays at one chunk, and the checksum is taken on the way.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from outlier_mlx.errors import OutlierError
from outlier_mlx.storage.safetensors import NUMPY_DTYPES

#: The shard size that mlx-lm writes, too.
MAX_SHARD_BYTES = 5 * 1000**3


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
    """A finished file: what a manifest says of it."""

    name: str
    sha256: str
    nbytes: int


def assign_shards(
    specs: Iterable[TensorSpec], max_bytes: int = MAX_SHARD_BYTES
) -> list[list[TensorSpec]]:
    """Cut tensors into files of at most `max_bytes`; a larger tensor stands alone."""
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

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(self, *_: object) -> None:
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
        index = {
            "metadata": {"total_size": sum(spec.nbytes for _, spec in self._pending)},
            "weight_map": {spec.name: self._shard_name(number) for number, spec in self._pending},
        }
        text = json.dumps(index, indent=2).encode() + b"\n"
        name = "model.safetensors.index.json"
        (self.folder / name).write_bytes(text)
        return [*self._written, WrittenFile(name, hashlib.sha256(text).hexdigest(), len(text))]

    def _begin(self, name: str) -> None:
        if self._next == len(self._pending):
            raise OutlierError(f"{name}: more tensors written than announced")
        number, spec = self._pending[self._next]
        if spec is self._shards[number][0]:
            self._end_shard()
            self._file = (self.folder / self._shard_name(number)).open("xb")
            self._hash = hashlib.sha256()
            self._put(_header(self._shards[number]))
        self._left = spec.nbytes

    def _end_shard(self) -> None:
        if self._file is None:
            return
        name = Path(self._file.name).name
        nbytes = self._file.tell()
        self._file.close()
        self._file = None
        self._written.append(WrittenFile(name, self._hash.hexdigest(), nbytes))

    def _put(self, view: memoryview | bytes) -> None:
        assert self._file is not None
        self._hash.update(view)
        self._file.write(view)

    def _shard_name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"


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
