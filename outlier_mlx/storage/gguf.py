"""GGUF files read lazily: metadata and places of tensors, then any rows of any tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What ggml's types are, and how
large their blocks, is known to the package `gguf`, an optional dependency. Its `GGUFReader` is not
used: it makes two arrays for every string of a vocabulary (15 s and 560 MB for one of Qwen2, where
this takes half a second), and it trusts every number in the file.
"""

import io
import os
import stat
import struct
from bisect import bisect
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.safetensors import MAX_SIZE, ReadRange, TensorRef
from outlier_mlx.upstream import pip_install

# A tokenizer has half a million values in some 10 MB; a model some thousand tensors.
_MAX_ELEMENTS = 1_000_000
_MAX_ENTRIES = 100_000
_MAX_BYTES = 100_000_000
_MAX_DIMS = 4

# Types that the package does not have, or not yet: PrismML's are not in ggml.
_MORE_KINDS = {42: ("Q2_0", 64, 18), 142: ("PQ2_0", 128, 34), 143: ("PTQ1_0", 128, 28)}
_I2_S = 36  # of microsoft/BitNet; a number that ggml does not use any more
# The number of Q2_0 had another layout before: blocks of PQ2_0.
_Q2_0, _OLD_Q2_0 = "Q2_0", (128, 34)

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file; nothing of it is in memory until `read`.

    Attributes:
        name: its name.
        file: the file that holds it.
        kind: ggml's name of its type, as "Q4_K".
        shape: in NumPy's order, (..., out, in): the reverse of what the file says.
        offset: where its first byte is in the file.
        block: weights in a block of this type, which lie along `in`.
        block_bytes: bytes of a block.
        fetch: see `TensorRef`.
    """

    name: str
    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    block: int
    block_bytes: int
    fetch: ReadRange | None = field(default=None, compare=False, repr=False)

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return f"{self.file.name}: {self.name}"

    @property
    def rows(self) -> int:
        """Rows of weights; a vector is one."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.block * self.block_bytes

    @property
    def nbytes(self) -> int:
        """Its size on disk in bytes."""
        return self.rows * self.row_bytes

    def matrix(self, start: int, stop: int, name: str | None = None) -> "GgufTensor":
        """Rows `start` to `stop` of weights as a tensor (rows, in) of its own."""
        shape, offset = (stop - start, self.shape[-1]), self.offset + start * self.row_bytes
        return replace(self, name=name or self.name, shape=shape, offset=offset)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` as they are stored, (rows, row_bytes) uint8."""
        shape = (self.rows, self.row_bytes)
        stored = TensorRef(self.name, self.file, "U8", shape, self.offset, self.fetch)
        return stored.read(start, stop)


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file holds.

    Attributes:
        path: the file.
        fields: its metadata: int, float, bool, str, lists of str, and arrays of numbers.
        tensors: in the order of the file.
    """

    path: Path
    fields: dict[str, Any]
    tensors: list[GgufTensor]


def read_gguf(path: Path) -> Gguf:
    """Read a file's metadata and list of tensors.

    Raises:
        CheckpointError: the package `gguf` is missing, or this is no GGUF file of version 2 or 3
            that is little-endian and whole; no array is allocated that is larger than the file.
    """
    kinds = _kinds(path)
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path}: not a file")
            return _read(_Cursor(path, file, found.st_size), kinds)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def head_bytes(begin: bytes) -> int:
    """How much of a file `read_gguf` reads, given its first bytes; a guess if those are too few."""
    cursor = _Cursor(Path("GGUF"), io.BytesIO(begin), len(begin))
    try:
        _read_head(cursor)
    except _TooShort:
        return min(2 * len(begin) + 1, _MAX_BYTES)
    except CheckpointError:  # it will be refused when it is read
        return len(begin)
    return cursor.at


class _TooShort(CheckpointError):
    """The file ends within its metadata."""


def _kinds(path: Path) -> dict[int, tuple[str, int, int]]:
    """ggml's types by number: name, weights in a block, bytes of a block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise CheckpointError(
            f"{path.name}: reading GGUF needs the package gguf: {pip_install('outlier-mlx[gguf]')}"
        ) from error
    known = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    return known | _MORE_KINDS


class _Cursor:
    """A place in a file; every step is checked against the file's size."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.at = path, file, size, 0

    def bytes(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.size - self.at:
            raise _TooShort(f"{self.path.name}: the file ends within its metadata")
        if count > _MAX_BYTES - self.at:
            raise CheckpointError(f"{self.path.name}: more than {_MAX_BYTES} bytes of metadata")
        data = self.file.read(count)
        if len(data) < count:
            raise CheckpointError(f"{self.path.name}: the file ends within its metadata")
        self.at += count
        return data

    def number(self, code: str) -> int:
        """The next number, of a `struct` format."""
        return struct.unpack(code, self.bytes(struct.calcsize(code)))[0]

    def text(self) -> str:
        """The next string."""
        data = self.bytes(self.number("<Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path.name}: metadata that is not UTF-8") from None


#: A tensor's name, shape in NumPy's order, type and offset.
_Entry = tuple[str, tuple[int, ...], int, int]


def _read_head(cursor: _Cursor) -> tuple[dict[str, Any], list[_Entry]]:
    """The metadata, and the entry of each tensor."""
    name = cursor.path.name
    if cursor.bytes(4) != b"GGUF":
        raise CheckpointError(f"{name}: not a GGUF file")
    version = cursor.number("<I")
    if version and not version & 0xFFFF:
        raise CheckpointError(f"{name}: a big-endian GGUF file is not supported")
    if version not in (2, 3):
        raise CheckpointError(f"{name}: a GGUF file of version {version}, expected 2 or 3")
    tensors, entries = cursor.number("<Q"), cursor.number("<Q")
    if max(tensors, entries) > _MAX_ENTRIES:
        raise CheckpointError(f"{name}: {tensors} tensors and {entries} fields")
    return _fields(cursor, entries), [_info(cursor) for _ in range(tensors)]


def _read(cursor: _Cursor, kinds: dict[int, tuple[str, int, int]]) -> Gguf:
    fields, infos = _read_head(cursor)
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(f"{cursor.path.name}: general.alignment is {alignment!r}")
    begin = -(-cursor.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    ends = sorted({begin + info[3] for info in infos} | {cursor.size})
    for info in infos:
        room = ends[min(bisect(ends, begin + info[3]), len(ends) - 1)] - begin - info[3]
        tensor = _tensor(cursor, info, begin, kinds, room - room % alignment)
        if tensor.name in found:
            raise CheckpointError(f"{tensor.where}: two tensors have this name")
        found[tensor.name] = tensor
    return Gguf(cursor.path, fields, list(found.values()))


def _fields(cursor: _Cursor, entries: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    left = _MAX_ELEMENTS
    for _ in range(entries):
        key = cursor.text()
        kind, count = cursor.number("<I"), None
        if kind == _ARRAY:
            kind, count = cursor.number("<I"), cursor.number("<Q")
        left -= 1 if count is None else count
        if left < 0:
            raise CheckpointError(
                f"{cursor.path.name}: more than {_MAX_ELEMENTS} values of metadata"
            )
        if key in fields:
            raise CheckpointError(f"{cursor.path.name}: the field {key} appears twice")
        fields[key] = _value(cursor, kind, count)
    return fields


def _value(cursor: _Cursor, kind: int, count: int | None) -> Any:
    """One value, or an array of `count`."""
    if kind == _STRING:
        return cursor.text() if count is None else [cursor.text() for _ in range(count)]
    if kind not in _NUMBERS:
        raise CheckpointError(f"{cursor.path.name}: metadata of the unknown type {kind}")
    dtype = _NUMBERS[kind]
    data = cursor.bytes(dtype.itemsize * (1 if count is None else count))
    numbers: np.ndarray = np.frombuffer(data, dtype)
    if kind == _BOOL:  # any byte may stand there; NumPy would trust that it is 0 or 1
        numbers = numbers.view(np.uint8) != 0
    return numbers[0].item() if count is None else numbers


def _info(cursor: _Cursor) -> _Entry:
    name, rank = cursor.text(), cursor.number("<I")
    if not 1 <= rank <= _MAX_DIMS:
        raise CheckpointError(f"{cursor.path.name}: {name}: {rank} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(rank))[::-1]
    return name, shape, cursor.number("<I"), cursor.number("<Q")


def _tensor(
    cursor: _Cursor,
    info: _Entry,
    begin: int,
    kinds: dict[int, tuple[str, int, int]],
    room: int,
) -> GgufTensor:
    """A tensor, checked; `room` is the bytes to the next one, in whole steps of the alignment."""
    name, shape, number, offset = info
    place = f"{cursor.path.name}: {name}"
    if number == _I2_S:
        raise CheckpointError(
            f"{place}: type {number}, I2_S of microsoft/BitNet, is not supported; import the"
            " safetensors of this model"
        )
    if number not in kinds:
        raise CheckpointError(f"{place}: the unknown type {number}")
    kind, block, block_bytes = kinds[number]
    if 0 in shape or prod(shape) > MAX_SIZE:
        raise CheckpointError(f"{place}: shape {shape}")
    if shape[-1] % block:
        raise CheckpointError(
            f"{place}: rows of {shape[-1]}, which is not a multiple of {block}, the block of {kind}"
        )
    tensor = GgufTensor(name, cursor.path, kind, shape, begin + offset, block, block_bytes)
    if kind == _Q2_0 and tensor.nbytes > room and _is_old_q2_0(tensor, room):
        raise CheckpointError(
            f"{place}: type {number} in blocks of 128 weights, which Q2_0 had before it was added"
            " to llama.cpp; take the file of this model that is named PQ2_0 or g64"
        )
    if tensor.offset + tensor.nbytes > cursor.size:
        raise CheckpointError(f"{place}: the file ends within this tensor")
    return tensor


def _is_old_q2_0(tensor: GgufTensor, room: int) -> bool:
    """Whether blocks of the old layout fit where those of Q2_0 do not."""
    weights, nbytes = _OLD_Q2_0
    width = tensor.shape[-1]
    return width % weights == 0 and tensor.rows * (width // weights) * nbytes <= room
