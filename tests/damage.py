"""Changing a checkpoint folder on disk: one thing wrong at a time, for tests of what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tensor_file import Stored, read_stored, stored, write_stored

REMOVE: Any = object()
INDEX = "model.safetensors.index.json"


def edit_json(path: Path, **changes: Any) -> None:
    """Set top-level fields of a JSON object; REMOVE as a value takes the field out."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in value.items() if v is not REMOVE}, indent=2))


def edit_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json; REMOVE as a value takes the field out."""
    edit_json(folder / "config.json", **changes)


def find_tensor(folder: Path, key: str) -> tuple[Path, Stored]:
    """The file that holds a tensor, and the tensor."""
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = read_stored(path)
        if key in tensors:
            return path, tensors[key]
    raise KeyError(f"{key} is in no safetensors file of {folder}")


def drop_tensor(folder: Path, key: str) -> None:
    """Take a tensor out of its file, and out of the index if there is one."""
    path, _ = find_tensor(folder, key)
    _rewrite(path, lambda tensors: tensors.pop(key))
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        del weight_map[key]
        edit_json(folder / INDEX, weight_map=weight_map)


def replace_tensor(folder: Path, key: str, value: Any, dtype: str | None = None) -> None:
    """Put other values, of any shape, in a tensor's place; its dtype stays unless given."""
    path, old = find_tensor(folder, key)
    new = stored(value, dtype or old.dtype)
    _rewrite(path, lambda tensors: tensors.update({key: new}))


def add_tensor(
    folder: Path, key: str, value: Any, dtype: str | None = None, file: str | None = None
) -> None:
    """Add a tensor to a file (default: the first); the index, if any, is told unless it knows."""
    path = folder / file if file else sorted(folder.glob("*.safetensors"))[0]
    new = stored(value, dtype)
    _rewrite(path, lambda tensors: tensors.update({key: new}))
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map={key: path.name} | weight_map)


def rename_tensor(folder: Path, key: str, new_key: str) -> None:
    """Give a tensor another name in the same file, and in the index."""
    path, tensor = find_tensor(folder, key)
    drop_tensor(folder, key)
    add_tensor(folder, new_key, tensor.array(), tensor.dtype, path.relative_to(folder).as_posix())


def truncate(path: Path, n: int) -> None:
    """Cut the last n bytes off a file."""
    path.write_bytes(path.read_bytes()[:-n])


def corrupt_header(path: Path, header: bytes = b"not JSON") -> None:
    """Put something else in the place of a safetensors header, of the length it says."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def _rewrite(path: Path, change: Callable[[dict[str, Stored]], Any]) -> None:
    tensors = read_stored(path)
    change(tensors)
    write_stored(path, tensors)
