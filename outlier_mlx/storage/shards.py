"""A folder of safetensors shards: which tensor is where, checked against the index."""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.paths import entries, files_below, inside
from outlier_mlx.storage.safetensors import TensorRef, read_header
from outlier_mlx.storage.texts import read_json

INDEX_NAME = "model.safetensors.index.json"
SHARDS = "*.safetensors"
MODEL_SHARDS = "model*.safetensors"


def choose_shards(names: Iterable[str], indexed: Iterable[str] = ()) -> list[str]:
    """Which of a folder's files hold the model.

    Those that its index lists, and `model*.safetensors`, as mlx-lm reads them; where there are
    neither, all safetensors. Some folders have the same weights under other names beside these,
    such as Mistral's `consolidated.safetensors`.

    Args:
        names: names of the files in the folder.
        indexed: files that the index lists.
    """
    every = sorted(name for name in names if fnmatch(name, SHARDS))
    listed = set(indexed)
    usual = [name for name in every if name in listed or fnmatch(name, MODEL_SHARDS)]
    return usual or every


def read_shards(
    folder: Path, *, required: bool = True, every: bool = False
) -> dict[str, TensorRef]:
    """All tensors of the model in a folder, from the headers of its `*.safetensors`.

    Args:
        folder: where to look; folders in it are left alone.
        required: whether there must be a file.
        every: read all safetensors there, rather than those that `choose_shards` chooses.

    Raises:
        CheckpointError: there is none, one is damaged, a key is in two of them, or the index file
            names other files or tensors than there are.
    """
    index = _read_index(folder)
    names = [path.name for path in entries(folder, SHARDS)]
    if not names and required:
        raise CheckpointError(f"{folder}: no {SHARDS} file")
    if not every:
        names = choose_shards(names, index.values())
    tensors: dict[str, TensorRef] = {}
    for name in names:
        for key, tensor in read_header(inside(folder, name)).items():
            if key in tensors:
                first = tensors[key].file.name
                raise CheckpointError(f"{folder.name}: {key} is in {first} and in {name}")
            tensors[key] = tensor
    files = {name: inside(folder, name) for name in set(index.values())}
    for key, name in index.items():
        if key not in tensors or tensors[key].file != files[name]:
            raise CheckpointError(f"{INDEX_NAME}: {key} is not in {name}")
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the folder's index; empty if there is none."""
    if not (folder / INDEX_NAME).exists():
        return {}
    listed = read_json(inside(folder, INDEX_NAME)).get("weight_map")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{INDEX_NAME}: no weight_map")
    for key, name in listed.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{INDEX_NAME}: {key}: a file name was expected")
    return listed


def find_files(folder: Path, name: str) -> Iterator[Path]:
    """Every file called `name` at or below a folder, in path order; links to folders are left."""
    for path in files_below(folder, name):
        yield inside(folder, path.relative_to(folder).as_posix())
