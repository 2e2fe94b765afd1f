"""Import models in the formats of other tools as plain MLX folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outlier_mlx.engine.loading import check_loads
from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports.hf_names import holds_model
from outlier_mlx.imports.opened import Opened
from outlier_mlx.models.config import is_ternary_model, raw_config
from outlier_mlx.models.description import is_overlay
from outlier_mlx.models.summary import SummaryRow
from outlier_mlx.models.tier_fields import MODEL_FILE, TERNARY_FILE
from outlier_mlx.storage.gguf_model import patterns
from outlier_mlx.storage.hub import CHECKPOINT_FILES, Source, resolve
from outlier_mlx.storage.paths import entries, named
from outlier_mlx.storage.shards import SHARDS
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.card import Card, in_shell, origin_of, plain, with_own_code
from outlier_mlx.writing.folders import check_free
from outlier_mlx.writing.licences import stated_licence
from outlier_mlx.writing.model_folder import Written, write_model
from outlier_mlx.writing.parts import Parts

ScaleType = Literal["float32", "float16"]
#: How to store GGUF types whose groups are smaller than MLX's smallest group.
KQuants = Literal["8bit", "float16", "float32"]
#: How to store ternary experts of GGUF.
TernaryFormat = Literal["tq1_0", "affine2"]


@dataclass(frozen=True)
class Imported(Written):
    """An imported model.

    Attributes:
        source_format: format of the source.
        notes: notes on what is not exact, or ignored by mlx-lm.
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
    strict: bool = False,
    revision: str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Imported:
    """Write a model of another format as an MLX folder.

    Stock mlx-lm loads it, unless it is ternary. What `export` wrote for transformers becomes the
    same tier again.

    Args:
        source: a folder, a `.gguf` file, or a hub repository.
        out: the folder to write.
        dtype: dtype of scales and biases; default: the smallest dtype that is exact.
        bits: 5 stores AWQ's 4-bit weights in 5 bits, which is exact with 16-bit scales.
        file: name of the `.gguf` file in a folder or repository.
        k_quants: how to store Q2_K, Q3_K and Q6_K of GGUF: "8bit" (default), "float16" or
            "float32".
        experts: how to store ternary weights of GGUF, experts or not: "tq1_0" (default) in this
            project's layers, "affine2" for stock mlx-lm.
        strict: refuse a ternary model with quantized matrices that are not ternary, which would
            otherwise stay as they are.
        revision: branch, tag or commit on the hub.
        force: replace `out` if it is a model that this project wrote.
        progress: progress callback (bytes of the source read, bytes in total). The total is None
            while ternary matrices are examined, before anything is written.

    Raises:
        OutlierError: the source is damaged or not supported, the output exists, or the disk is too
            small. No files are left behind.
    """
    target = named(out)
    check_free(target, force=force, sources=[source])
    found = _resolve(source, file, revision)
    gguf = {"k_quants": k_quants, "experts": experts}
    given = {k: v for k, v in gguf.items() if v is not None}

    def opened(*, quick: bool) -> Opened:
        return _open(found, dtype, bits, file, given, strict=strict, quick=quick, progress=progress)

    def written(model: Opened) -> Imported:
        inputs = [source, found.folder]
        return _write(target, found, model, inputs, force=force, progress=progress)

    first = opened(quick=True)
    try:
        return written(first)
    except CheckpointError:
        if not first.glanced:
            raise
    return written(opened(quick=False))


def _write(
    target: Path,
    found: Source,
    opened: Opened,
    inputs: list[str | Path],
    *,
    force: bool,
    progress: Progress,
) -> Imported:
    tensors = Parts(opened.parts)
    code = {"model_file": TERNARY_FILE} if is_ternary_model(opened.config) else {}
    licence = stated_licence(found.folder) if found.folder.is_dir() else None
    origin = {"name": found.name, "revision": found.revision, "form": opened.source_format}
    origin |= licence.as_json() if licence else {}
    written = write_model(
        target,
        tensors,
        opened.config | code,
        source=found.name,
        inputs=inputs,
        assets=opened.assets,
        manifest={"source": origin | opened.details} if opened.tier is None else opened.tier,
        manifest_name="checksums.json" if opened.tier is None else "tier.json",
        check=check_loads,
        card=lambda folder: _card(target.name, found, opened, tensors.rows).text(folder),
        force=force,
        progress=progress,
    )
    return Imported(**vars(written), source_format=opened.source_format, notes=opened.notes())


def _card(name: str, source: Source, opened: Opened, rows: Sequence[SummaryRow]) -> Card:
    own = "ternary_switch" in opened.config
    program = "outlier-mlx generate" if own else "mlx_lm.generate"
    commands, after = [f'{program} --model {in_shell(name)} --prompt "Once upon a time"'], ""
    changes = [*map(plain, opened.notes()), "`config.json` is new"]
    if opened.tier is not None:
        commands, after = with_own_code(name, MODEL_FILE)
    if is_ternary_model(opened.config):
        commands, after = with_own_code(name, TERNARY_FILE)
        count = len(opened.config["ternary"]["modules"])
        changes.insert(0, f"{count} ternary matrices are stored as rows of trits")
    origin = origin_of("source", source)
    return Card(
        name=name,
        introduction="Imported by outlier-mlx for MLX from a model in"
        f" {plain(opened.source_format)}.",
        commands=commands,
        after_commands=after,
        origins=[origin],
        based_on=[origin],
        relation="quantized",
        tags=["mlx"],
        rows=rows,
        changes=changes,
    )


def _resolve(source: str | Path, file: str | None, revision: str | None) -> Source:
    """Find the source; for a `.gguf` file, `folder` is the file itself."""
    path = Path(source)
    if path.is_file():
        if revision is not None or file is not None:
            raise CheckpointError(f"{path}: a file: --file and --revision are for folders")
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path}: expected a folder or a .gguf file")
        return Source(path, path.name)
    return resolve(source, revision, CHECKPOINT_FILES if file is None else patterns(file))


def _open(
    found: Source,
    dtype: ScaleType | None,
    bits: int | None,
    file: str | None,
    gguf: dict[str, Any],
    *,
    strict: bool,
    quick: bool,
    progress: Progress,
) -> Opened:
    """Detect the format from the names of the source's files, and open it."""
    place = found.folder
    if place.is_file() or file is not None or _holds_gguf(place):
        if bits is not None:
            raise CheckpointError(f"{found.name}: --bits is for AWQ, not for GGUF")
        from outlier_mlx.imports.gguf import open_gguf_model

        return open_gguf_model(
            place, file=file, dtype=dtype, strict=strict, quick=quick, progress=progress, **gguf
        )
    # GGUF files in a repository are downloaded only with --file.
    hint = "" if found.revision is None else "; name a GGUF file of a repository with --file"
    if entries(place, SHARDS):
        if not (place / "config.json").exists():
            raise CheckpointError(f"{found.name}: no config.json{hint}")
        if gguf:
            raise CheckpointError(f"{found.name}: --k-quants and --experts are for GGUF")
        return _open_folder(found, dtype, bits, strict=strict, quick=quick, progress=progress)
    pickles = [path.name for pattern in ("*.bin", "*.pt") for path in entries(place, pattern)]
    if pickles:
        raise CheckpointError(
            f"{found.name}: {min(pickles)}: pickled weights are not supported; convert them to"
            " safetensors first"
        )
    raise CheckpointError(f"{found.name}: no *.safetensors and no *.gguf files{hint}")


def _open_folder(
    found: Source,
    dtype: ScaleType | None,
    bits: int | None,
    *,
    strict: bool,
    quick: bool,
    progress: Progress,
) -> Opened:
    """Detect the format of safetensors from their config.json, and open it."""
    from outlier_mlx.imports.awq import open_awq_model
    from outlier_mlx.imports.ternary_folder import (
        holds_ternary_floats,
        is_ternary_source,
        open_ternary_folder,
    )
    from outlier_mlx.imports.transformers_folder import is_export, open_export

    place, raw = found.folder, raw_config(found.folder)
    if is_export(place):
        if dtype is not None or bits is not None or strict:
            raise CheckpointError(
                f"{found.name}: a tier for transformers, which becomes what it was: no --dtype,"
                " --bits or --strict"
            )
        return open_export(place, raw)
    if is_overlay(raw):
        raise CheckpointError(
            f"{found.name}: an overlay; `outlier-mlx convert` makes a tier from it"
        )
    if "ternary" in raw:
        raise CheckpointError(
            f"{found.name}: config.json has `ternary`: this is a model that outlier-mlx wrote;"
            " there is nothing to import"
        )
    if is_ternary_source(raw) or holds_ternary_floats(place, raw):
        if dtype is not None or bits is not None:
            raise CheckpointError(
                f"{found.name}: a ternary model, whose weights stay as they are: no --dtype or"
                " --bits"
            )
        return open_ternary_folder(place, raw, strict=strict, quick=quick, progress=progress)
    if strict:
        raise CheckpointError(f"{found.name}: --strict is for ternary models; this is none")
    return open_awq_model(place, dtype=dtype, bits=bits)


def _holds_gguf(folder: Path) -> bool:
    """Whether a folder has GGUF files, and no model in safetensors (adapters do not count)."""
    return bool(entries(folder, "*.gguf")) and not holds_model(folder)
