"""Importing: models in the formats of other tools, streamed into plain MLX folders."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.imports.opened import Opened
from outlier_mlx.storage.folders import check_free
from outlier_mlx.storage.hub import CHECKPOINT_FILES, Source, resolve
from outlier_mlx.storage.model_folder import write_model
from outlier_mlx.storage.parts import Part, Progress
from outlier_mlx.tiers.summary import SummaryRow, summarize

ScaleType = Literal["float32", "float16"]


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes:
        path: the folder.
        form: the format that the model came in.
        rows: parameters and bytes by kind of part, the total last.
        notes: what is not exact, or not honoured by mlx-lm.
        tokenizer: whether a tokenizer came along.
    """

    path: Path
    form: str
    rows: list[SummaryRow]
    notes: list[str]
    tokenizer: bool


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    dtype: ScaleType | None = None,
    bits: int | None = None,
    file: str | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Write a model of another format as an MLX folder that stock mlx-lm loads.

    Args:
        source: a folder, a `.gguf` file, or a hub repository.
        out: the folder to make.
        dtype: of the scales and biases; the default is the smallest that loses nothing.
        bits: 5 stores AWQ's 4-bit weights so that 16-bit scales lose nothing either.
        file: which `.gguf` of a folder or repository.
        revision: the repository's revision on the hub.
        force: replace `out` if it is a model that this project wrote.
        progress: called while it runs.

    Raises:
        OutlierError: the source is not sound or of no known format, the output exists, or the disk
            is too small. Nothing is left behind.
    """
    target = Path(out)
    check_free(target, force=force)
    found = _resolve(source, file, revision)
    opened = _open(found, dtype=dtype, bits=bits, file=file)
    written: list[str] = []

    def assets(folder: Path) -> list[str]:
        written.extend(opened.assets(folder))
        return written

    origin = {"name": found.name, "revision": found.revision, "form": opened.form}
    path = write_model(
        target,
        opened.parts,
        opened.config,
        source=origin | opened.details,
        assets=assets,
        force=force,
        progress=progress,
    )
    tokenizer = "tokenizer_config.json" in written or "tokenizer.json" in written
    if not tokenizer:
        warnings.warn(
            f"{found.name}: no tokenizer beside it; the model has none",
            CheckpointWarning,
            stacklevel=2,
        )
    return Imported(path, opened.form, summary(opened.parts), opened.notes(), tokenizer)


def summary(parts: Sequence[Part]) -> list[SummaryRow]:
    """Parameters and bytes by kind of part, the total last."""
    return summarize((part.kind, part.params, part.nbytes) for part in parts)


def _resolve(source: str | Path, file: str | None, revision: str | None) -> Source:
    """The source; of a `.gguf` file, `folder` is the file itself."""
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        if revision is not None or file is not None:
            raise CheckpointError(f"{path}: a file has no revision, nor files in it")
        return Source(path, path.name)
    patterns = CHECKPOINT_FILES if file is None else (file, "*.json", "LICENSE*")
    return resolve(source, revision, patterns)


def _open(found: Source, *, dtype: ScaleType | None, bits: int | None, file: str | None) -> Opened:
    """Recognise what a source holds, by its files alone."""
    place = found.folder
    if place.is_file() or file is not None or _holds_gguf_only(place):
        if bits is not None:
            raise CheckpointError(f"{found.name}: --bits is for AWQ; GGUF keeps its own")
        from outlier_mlx.imports.gguf import open_gguf_model

        return open_gguf_model(place, file=file, dtype=dtype)
    if any(place.glob("*.safetensors")):
        from outlier_mlx.imports.awq import open_awq_model

        return open_awq_model(place, dtype=dtype, bits=bits)
    pickles = [path.name for pattern in ("*.bin", "*.pt") for path in place.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{found.name}: {min(pickles)}: pickled weights are not read; convert them to"
            " safetensors first"
        )
    raise CheckpointError(
        f"{found.name}: neither *.safetensors nor *.gguf here"
        + ("" if found.revision is None else "; name a GGUF file of a repository with --file")
    )


def _holds_gguf_only(folder: Path) -> bool:
    return any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))
