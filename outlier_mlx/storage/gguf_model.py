"""Find the GGUF files of a model and read their metadata."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.storage.gguf import GgufTensor, read_gguf
from outlier_mlx.storage.paths import entries, inside, require_plain

# File names of llama.cpp's `gguf-split`, numbered from 1.
_SPLIT = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MAX_SPLITS = 1000


@dataclass(frozen=True)
class GgufModel:
    """The files of a model.

    Attributes:
        where: name of the first file, for messages.
        fields: metadata of the first file.
        tensors: tensors of all files, by name.
    """

    where: str
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def need(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        """A tensor of a model of this shape.

        Raises:
            CheckpointError: it is missing, or has another shape.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.where}: the tensor {name} {shape} is missing")
        if tensor.shape != shape:
            raise CheckpointError(f"{tensor.where}: shape {tensor.shape}, expected {shape}")
        return tensor


def read_model(place: Path, file: str | None = None) -> GgufModel:
    """Read the metadata of a model.

    Args:
        place: a `.gguf` file, one of the files of a split model, or a folder.
        file: file name in a folder with several models; for a split model, any of its files.

    Raises:
        CheckpointError: there is not exactly one model, or a file is missing or damaged.
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
                    f"{tensor.where}: duplicate tensor, also in {tensors[tensor.name].file.name}"
                )
            tensors[tensor.name] = tensor
    for number, part in enumerate(read):
        _check_split(part.fields, number, len(paths), len(tensors), part.path)
    return GgufModel(paths[0].name, read[0].fields, tensors)


def patterns(file: str) -> tuple[str, ...]:
    """Patterns of the files to download for a model: all its files, its licence and README."""
    match = _SPLIT.fullmatch(file)
    names = file if match is None else f"{match[1]}-*-of-{match[3]}.gguf"
    return (names, "LICENSE*", "NOTICE*", "README.md")


def _only_model(folder: Path) -> str:
    """The name of the only model in a folder, or of the first file if the model is split."""
    names = [path.name for path in entries(folder, "*.gguf")]
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
    """All files of the model that a file belongs to."""
    match = _SPLIT.fullmatch(file)
    if match is None:
        return [inside(folder, file)]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count <= _MAX_SPLITS:
        raise CheckpointError(f"{file}: the name says file {match[2]} of {count}")
    names = [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, count + 1)]
    for name in names:
        require_plain(name, folder.name)
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name}: missing; the model has {count} files")
    return [inside(folder, name) for name in names]


def _check_split(fields: dict[str, Any], number: int, count: int, tensors: int, path: Path) -> None:
    expected = {"split.no": number, "split.count": count, "split.tensors.count": tensors}
    for key, value in expected.items():
        # In a model of one file these fields may be missing or 0.
        if key in fields and fields[key] != value and not (count == 1 and not fields[key]):
            raise CheckpointError(f"{path.name}: {key} is {fields[key]!r}, expected {value}")
        if key not in fields and count > 1:
            raise CheckpointError(f"{path.name}: {key} is missing; is it a file of a split model?")
