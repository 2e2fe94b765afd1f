"""Safetensors files in plain NumPy, bfloat16 included, for tests to read, write and damage.

Layout (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": np.uint16,
    "F32": np.float32,
    "F64": np.float64,
}


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even: uint16 bits. np.nan stays NaN."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Widen uint16 bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Stored:
    """One tensor as a file holds it; `dtype` is the safetensors name, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> np.ndarray:
        """The values; bfloat16 comes back as float32."""
        values = np.frombuffer(self.data, _NUMPY[self.dtype]).reshape(self.shape)
        return from_bfloat16(values) if self.dtype == "BF16" else values


def stored(array: Any, dtype: str | None = None) -> Stored:
    """`array` rounded to the safetensors `dtype` (default: the array's own)."""
    array = np.asarray(array)
    if dtype is None:
        dtype = next(name for name, kind in _NUMPY.items() if np.dtype(kind) == array.dtype)
    values = to_bfloat16(array) if dtype == "BF16" else array.astype(_NUMPY[dtype])
    return Stored(dtype, array.shape, values.tobytes())


def rounded(array: Any, dtype: str) -> np.ndarray:
    """The float32 values that are left after storing `array` as "F32", "F16" or "BF16"."""
    return stored(np.asarray(array, np.float32), dtype).array().astype(np.float32)


def read_stored(path: Path) -> dict[str, Stored]:
    """Every tensor of one safetensors file, in the order of the header."""
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    header.pop("__metadata__", None)
    data = blob[8 + length :]
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The same as NumPy arrays, bfloat16 widened to float32."""
    return {name: tensor.array() for name, tensor in read_stored(path).items()}


def write_stored(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a safetensors file with the tensors in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(tensor.data for tensor in tensors.values())


def write_shards(folder: Path, tensors: Mapping[str, Stored], count: int = 1) -> None:
    """Write a model's files: tensors dealt out in turn, and an index when there are several."""
    if count == 1:
        write_stored(folder / "model.safetensors", tensors)
        return
    weight_map: dict[str, str] = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        keys = list(tensors)[i::count]
        write_stored(folder / name, {key: tensors[key] for key in keys})
        weight_map |= dict.fromkeys(keys, name)
    total = sum(len(tensor.data) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
