"""Which GGUF files make a model, and what they hold together."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.storage.gguf import GgufTensor, read_gguf
from outlier_mlx.storage.paths import inside, require_plain

# llama.cpp's `gguf-split` names the files of a model so, and counts from 1.
_SPLIT = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MAX_SPLITS = 1000


@dataclass(frozen=True)
class GgufModel:
    """The files of a model.

    Attributes:
        where: what messages call it.
        fields: the metadata of the first file.
        tensors: of all files, by name.
    """

    where: str
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_model(place: Path, file: str | None = None) -> GgufModel:
    """Read the metadata of a model.

    Args:
        place: a `.gguf` file, one of the files of a split model, or a folder.
        file: which file of a folder with several models; any of a split model's.

    Raises:
        CheckpointError: there is not exactly one model, a file of it is missing, or one is not
            sound.
    """
    if place.is_dir():
        paths = _splits(place, _only_model(place) if file is None else file)
    else:
        paths = _splits(place.parent, place.name)
    read = [read_gguf(path) for path in paths]
    tensors: dict[str, GgufTensor] = {}
    for part in read:
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{tensor.where}: is in {tensors[tensor.name].file.name}, too"
                )
            tensors[tensor.name] = tensor
    for number, part in enumerate(read):
        _check_split(part.fields, number, len(paths), len(tensors), part.path)
    return GgufModel(paths[0].name, read[0].fields, tensors)


def patterns(file: str) -> tuple[str, ...]:
    """What to fetch of a repository for a file: with it all files of a split model, and papers."""
    match = _SPLIT.fullmatch(file)
    names = file if match is None else f"{match[1]}-*-of-{match[3]}.gguf"
    return (names, "LICENSE*", "NOTICE*", "README.md")


def _only_model(folder: Path) -> str:
    """The file of the one model in a folder, or the first of its files."""
    names = sorted(path.name for path in folder.glob("*.gguf"))
    models: dict[str, str] = {}
    for name in names:
        match = _SPLIT.fullmatch(name)
        models.setdefault(name if match is None else f"{match[1]}-of-{match[3]}", name)
    if len(models) != 1:
        raise CheckpointError(
            f"{folder}: {len(models)} GGUF models"
            + (f"; name one with --file: {listed(models.values(), 8)}" if models else "")
        )
    return next(iter(models.values()))


def _splits(folder: Path, file: str) -> list[Path]:
    """A file, or all files of the split model that it is a part of."""
    match = _SPLIT.fullmatch(file)
    if match is None:
        return [inside(folder, file)]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count <= _MAX_SPLITS:
        raise CheckpointError(f"{file}: the name says that it is file {match[2]} of {count}")
    names = [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, count + 1)]
    for name in names:
        require_plain(name, folder.name)
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name}: missing; the model has {count} files")
    return [inside(folder, name) for name in names]


def _check_split(fields: dict[str, Any], number: int, count: int, tensors: int, path: Path) -> None:
    expected = {"split.no": number, "split.count": count, "split.tensors.count": tensors}
    for key, value in expected.items():
        # A model of one file need not say so, and some say that it has no splits.
        if key in fields and fields[key] != value and not (count == 1 and not fields[key]):
            raise CheckpointError(f"{path.name}: {key} is {fields[key]!r}, expected {value}")
        if key not in fields and count > 1:
            raise CheckpointError(f"{path.name}: no {key}; is it a file of a split model?")
