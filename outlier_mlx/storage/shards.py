"""A folder of safetensors shards: which tensor is where, checked against the index."""

import os
from collections.abc import Iterator
from pathlib import Path

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import TensorRef, read_header, read_json

INDEX_NAME = "model.safetensors.index.json"


def read_shards(
    folder: Path, *, required: bool = True, pattern: str = "*.safetensors"
) -> dict[str, TensorRef]:
    """All tensors of the `*.safetensors` directly in a folder, from their headers.

    Args:
        folder: where to look.
        required: whether there must be one.
        pattern: of the files' names.

    Raises:
        CheckpointError: there is none, one is damaged, a key is in two of them, or the index file
            names other files or tensors than there are.
    """
    names = sorted(path.name for path in folder.glob(pattern))
    if not names and required:
        raise CheckpointError(f"{folder}: no {pattern} file")
    tensors: dict[str, TensorRef] = {}
    for name in names:
        for key, tensor in read_header(inside(folder, name)).items():
            if key in tensors:
                first = tensors[key].file.name
                raise CheckpointError(f"{folder.name}: {key} is in {first} and in {name}")
            tensors[key] = tensor
    if (folder / INDEX_NAME).exists():
        _check_index(folder, tensors)
    return tensors


def _check_index(folder: Path, tensors: dict[str, TensorRef]) -> None:
    listed = read_json(inside(folder, INDEX_NAME)).get("weight_map")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{INDEX_NAME}: no weight_map")
    for key, name in listed.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{INDEX_NAME}: {key}: a file name was expected")
        file = inside(folder, name)
        if key not in tensors or tensors[key].file != file:
            raise CheckpointError(f"{INDEX_NAME}: {key} is not in {name}")


def find_files(folder: Path, name: str) -> Iterator[Path]:
    """Every file called `name` at or below a folder, in path order; links to folders are left."""
    found = []
    for place, _, files in os.walk(folder):
        if name in files:
            relative = os.path.relpath(os.path.join(place, name), folder)  # noqa: PTH118
            found.append(relative)
    for relative in sorted(found, key=lambda name: Path(name).parts):
        yield inside(folder, relative)
