"""Importing: models in the formats of other tools become plain MLX folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports.gguf_file import patterns
from outlier_mlx.imports.hf_names import holds_model
from outlier_mlx.imports.opened import Opened
from outlier_mlx.models.summary import SummaryRow
from outlier_mlx.storage.hub import CHECKPOINT_FILES, Source, resolve
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.card import Card, origin_of, plain
from outlier_mlx.writing.folders import check_free
from outlier_mlx.writing.model_folder import Written, write_model
from outlier_mlx.writing.parts import Parts

ScaleType = Literal["float32", "float16"]
#: How types of GGUF are stored that no affine group of MLX fits.
KQuants = Literal["8bit", "float16", "float32"]
#: How ternary experts of GGUF are stored.
TernaryFormat = Literal["tq1_0", "affine2"]


@dataclass(frozen=True)
class Imported(Written):
    """A model that was imported.

    Attributes:
        source_format: the format that the model came in.
        notes: what is not exact, or ignored by mlx-lm.
    """

    source_format: str
    notes: list[str]


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    dtype: ScaleType | None = None,
    bits: int | None = None,
    file: str | None = None,
    k_quants: KQuants | None = None,
    experts: TernaryFormat | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Imported:
    """Write a model of another format as an MLX folder that stock mlx-lm loads.

    Args:
        source: a folder, a `.gguf` file, or a hub repository.
        out: the folder to make.
        dtype: of the scales and biases; the default is the smallest that loses nothing.
        bits: 5 stores AWQ's 4-bit weights so that 16-bit scales lose nothing either.
        file: which `.gguf` of a folder or repository.
        k_quants: how a GGUF's Q2_K, Q3_K and Q6_K are stored: "8bit" (the default), "float16" or
            "float32".
        experts: how a GGUF's ternary experts are stored: "tq1_0" (the default) in this project's
            layers, "affine2" for stock mlx-lm.
        revision: the repository's revision on the hub.
        force: replace `out` if it is a model that this project wrote.
        progress: called with bytes of source read so far, and in all.

    Raises:
        OutlierError: the source is not sound or of no known format, the output exists, or the disk
            is too small. Nothing is left behind.
    """
    target = Path(out)
    check_free(target, force=force)
    found = _resolve(source, file, revision)
    gguf = {"k_quants": k_quants, "experts": experts}
    opened = _open(found, dtype, bits, file, {k: v for k, v in gguf.items() if v is not None})
    tensors = Parts(opened.parts)
    origin = {"name": found.name, "revision": found.revision, "form": opened.source_format}
    written = write_model(
        target,
        tensors,
        opened.config,
        source=found.name,
        assets=opened.assets,
        manifest={"source": origin | opened.details},
        card=lambda folder: _card(target.name, found, opened, tensors.rows).text(folder),
        force=force,
        progress=progress,
    )
    return Imported(**vars(written), source_format=opened.source_format, notes=opened.notes())


def _card(name: str, source: Source, opened: Opened, rows: Sequence[SummaryRow]) -> Card:
    program = "outlier-mlx generate" if "ternary_switch" in opened.config else "mlx_lm.generate"
    origin = origin_of("source", source)
    return Card(
        name=name,
        introduction="Imported by outlier-mlx for MLX from a model in"
        f" {plain(opened.source_format)}.",
        commands=[f'{program} --model {name} --prompt "Once upon a time"'],
        origins=[origin],
        based_on=[origin],
        relation="quantized",
        tags=["mlx"],
        rows=rows,
        changes=[*map(plain, opened.notes()), "`config.json` was written anew"],
    )


def _resolve(source: str | Path, file: str | None, revision: str | None) -> Source:
    """The source; of a `.gguf` file, `folder` is the file itself."""
    path = Path(source)
    if path.is_file():
        if revision is not None or file is not None:
            raise CheckpointError(f"{path}: a file has no revision, nor files in it")
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path}: a file; what is imported is a folder or a .gguf file")
        return Source(path, path.name)
    return resolve(source, revision, CHECKPOINT_FILES if file is None else patterns(file))


def _open(
    found: Source, dtype: ScaleType | None, bits: int | None, file: str | None, gguf: dict[str, Any]
) -> Opened:
    """Recognise what a source holds, by its files alone."""
    place = found.folder
    if place.is_file() or file is not None or _holds_gguf(place):
        if bits is not None:
            raise CheckpointError(f"{found.name}: --bits is for AWQ; GGUF has its own")
        from outlier_mlx.imports.gguf import open_gguf_model

        return open_gguf_model(place, file=file, dtype=dtype, **gguf)
    # Of a repository, GGUF files are fetched only when they are named.
    hint = "" if found.revision is None else "; name a GGUF file of a repository with --file"
    if any(place.glob("*.safetensors")):
        if not (place / "config.json").exists():
            raise CheckpointError(f"{found.name}: no config.json{hint}")
        if gguf:
            raise CheckpointError(f"{found.name}: --k-quants and --experts are for GGUF")
        from outlier_mlx.imports.awq import open_awq_model

        return open_awq_model(place, dtype=dtype, bits=bits)
    pickles = [path.name for pattern in ("*.bin", "*.pt") for path in place.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{found.name}: {min(pickles)}: pickled weights are not read; convert them to"
            " safetensors first"
        )
    raise CheckpointError(f"{found.name}: neither *.safetensors nor *.gguf here{hint}")


def _holds_gguf(folder: Path) -> bool:
    """Whether a folder holds GGUF, and no model in safetensors: those may be an adapter, say."""
    return any(folder.glob("*.gguf")) and not holds_model(folder)
