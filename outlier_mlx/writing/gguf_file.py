"""GGUF files, version 3, written tensor by tensor: every size is known before the first byte.

Little-endian: "GGUF", u32 version, u64 tensors, u64 fields; the fields; for each tensor its name,
dimensions (the last axis first), type and offset; then, from a multiple of 32 on, the data, each
tensor's at a multiple of 32. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.writing.parts import Tally
from outlier_mlx.writing.writer import WrittenFile

#: Number, weights of a block and bytes of a block of the types that are written (`ggml.h`).
KINDS: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
}
#: What a field can hold: int is written as uint32, float as float32, a list as an array of texts,
#: and a NumPy array (int32, float32 or bool) as an array of its type.
Field = str | bool | int | float | list[str] | np.ndarray

_ALIGNMENT = 32
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ARRAYS = {np.dtype("<i4"): 5, np.dtype("<f4"): _FLOAT32, np.dtype("?"): _BOOL}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write.

    Attributes:
        name: its name.
        kind: one of `KINDS`.
        shape: in NumPy's order, (..., out, in); blocks lie along `in`.
        slabs: yields its bytes, some rows at a time.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slabs: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        _, block, size = KINDS[self.kind]
        assert self.shape[-1] % block == 0, (self.name, self.kind, self.shape)
        return prod(self.shape) // block * size


def write_gguf(
    path: Path, fields: Mapping[str, Field], tensors: Sequence[GgufTensor], tally: Tally
) -> WrittenFile:
    """Write a new file; its checksum is taken on the way.

    Args:
        path: a file that does not exist.
        fields: its metadata.
        tensors: in the order of the file.
        tally: counts the bytes of tensors.

    Raises:
        OutlierError: a tensor yields more or fewer bytes than its shape takes.
    """
    digest = hashlib.sha256()
    with path.open("xb") as file:

        def put(data: bytes | memoryview) -> int:
            digest.update(data)
            return file.write(data)

        for piece in _header(fields, tensors):
            put(piece)
        put(bytes(-file.tell() % _ALIGNMENT))
        for tensor in tensors:
            done = 0
            for slab in tensor.slabs():
                count = put(np.ascontiguousarray(slab).reshape(-1).view(np.uint8).data)
                done += count
                tally.add(count)
            if done != tensor.nbytes:
                raise OutlierError(f"{tensor.name}: {done} bytes, expected {tensor.nbytes}")
            put(bytes(-done % _ALIGNMENT))
        return WrittenFile(path.name, digest.hexdigest(), file.tell())


def _header(fields: Mapping[str, Field], tensors: Sequence[GgufTensor]) -> Iterator[bytes]:
    yield b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, value in fields.items():
        yield _text(key)
        yield from _field(value)
    offset = 0
    for tensor in tensors:
        kind, _, _ = KINDS[tensor.kind]
        dims = tensor.shape[::-1]
        yield _text(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        yield struct.pack("<IQ", kind, offset)
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _field(value: Field) -> Iterator[bytes]:
    if isinstance(value, str):
        yield struct.pack("<I", _STRING) + _text(value)
    elif isinstance(value, bool):
        yield struct.pack("<I?", _BOOL, value)
    elif isinstance(value, int):
        yield struct.pack("<II", _UINT32, value)
    elif isinstance(value, float):
        yield struct.pack("<If", _FLOAT32, value)
    elif isinstance(value, list):
        yield struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_texts(value))
    else:
        yield struct.pack("<IIQ", _ARRAY, _ARRAYS[value.dtype], len(value)) + value.tobytes()


def _texts(texts: Iterable[str]) -> Iterator[bytes]:
    return map(_text, texts)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
