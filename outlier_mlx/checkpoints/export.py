"""Writing what tiers hold in the forms that other tools read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.checkpoints import open_overlay
from outlier_mlx.checkpoints.export_gguf import GgufTensors, gguf_tensors
from outlier_mlx.checkpoints.export_llamacpp import llamacpp_model
from outlier_mlx.checkpoints.export_mlx2 import check_mlx2, mlx2_pack
from outlier_mlx.checkpoints.export_packed import packed_tensors
from outlier_mlx.checkpoints.export_shared import (
    Origin,
    overlay_config,
    tier_manifest,
    write_alphas,
)
from outlier_mlx.checkpoints.export_transformers import TRANSFORMERS, hf_export
from outlier_mlx.checkpoints.export_v32 import v32_tensors
from outlier_mlx.checkpoints.gguf_encode import TERNARY
from outlier_mlx.checkpoints.hf_card import hf_card
from outlier_mlx.checkpoints.overlay import Overlay, check_base
from outlier_mlx.checkpoints.stored_model import StoredModel, open_stored
from outlier_mlx.checkpoints.tier import as_overlay, open_stored_tier, open_tier
from outlier_mlx.errors import OutlierError, did_you_mean
from outlier_mlx.models.config import is_overlay, raw_config
from outlier_mlx.storage.hub import Source, resolve
from outlier_mlx.storage.paths import files_below, named
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.assets import copy_assets, copy_legal, load_as_file
from outlier_mlx.writing.folders import check_free
from outlier_mlx.writing.model_folder import write_model
from outlier_mlx.writing.parts import Parts

__all__ = ["Exported", "export_tier"]


#: The format of ternary models; the others are of tiers.
MLX2 = "mlx2"
#: The format of a whole tier in one file.
GGUF = "gguf"
#: Formats of what an overlay has.
FORMATS: dict[str, Callable[[Overlay, Origin], Parts]] = {
    "overlay": v32_tensors,
    "packed": packed_tensors,
    "gguf-experts": gguf_tensors,
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: the folder.
        format: "overlay", "packed", "gguf", "gguf-experts", "transformers" or "mlx2".
        nbytes: bytes of all its files.
        base: the name of the base that readers need, if the export does not contain one.
        notes: sentences about what is not exactly as in the tier.
    """

    path: Path
    format: str
    nbytes: int
    base: str | None
    notes: tuple[str, ...] = ()


def export_tier(
    tier: str | Path,
    out: str | Path,
    format: str = "overlay",
    *,
    dtype: str = "float32",
    revision: str | None = None,
    force: bool = False,
    planned: Callable[[Parts], None] = lambda _: None,
    progress: Progress = no_progress,
    experts: str = TERNARY[0],
    opened: Callable[[Path], StoredModel] = open_stored,
) -> Exported:
    """Write a tier, or the experts of an overlay, in a form that other tools read.

    "gguf" is the whole tier, for llama.cpp, and "transformers" for transformers, whose class has
    it exactly in float32. All others are exact: experts, routers and alphas, and the base if the
    tier stores it unquantized; from int4 it could not be restored.

    Args:
        tier: a tier's folder or hub repository; or an overlay's, for the forms of experts alone.
        out: the folder to make.
        format: "overlay" (the V3.2 form), "packed" (five trits a byte, and `experts.bin`), "gguf"
            (`model.gguf`), "gguf-experts" (TQ1_0 tensors) or "transformers" (a checkpoint of its
            own classes); of a ternary model, "mlx2" (MLX's 2-bit codes).
        dtype: the dtype of weights of "transformers"; all but float32 round.
        revision: branch, tag or commit on the hub.
        force: replace `out` if it is an export or another folder that this project wrote.
        planned: called with what will be written, before it is.
        progress: called with bytes written so far, and in all.
        experts: how "gguf" stores experts: "tq2_0", "tq1_0" or "q4_0".
        opened: opens and checks a ternary model; `engine.loading.open_model` holds it against
            mlx-lm's own, too.

    Raises:
        OutlierError: no sound tier, something that the format cannot hold exactly, an output that
            exists, or a disk that is too small. Nothing is left behind.
    """
    known = (*FORMATS, GGUF, TRANSFORMERS, MLX2)
    if format not in known:
        hint = did_you_mean(format, known)
        raise OutlierError(f"format {format!r}: expected one of {', '.join(known)}{hint}")
    target = named(out)
    check_free(target, force=force, sources=[tier])
    source = resolve(tier, revision)
    if format == GGUF:
        content = _whole(source.folder, experts)
    elif format == TRANSFORMERS:
        content = _for_transformers(source, target.name, dtype)
    elif format == MLX2:
        content = _of_ternary(source, opened)
    else:
        content = _of_experts(source.folder, format)
    planned(content.tensors)

    def assets(folder: Path) -> None:
        if content.config is None:
            copy_legal([source.folder], folder)
            return
        if content.overlay is not None:
            write_alphas(content.overlay.alphas(), folder)
        copy_assets([source.folder], folder)
        content.beside(folder)

    written = write_model(
        target,
        content.tensors,
        content.config,
        source=source.name,
        inputs=[tier, source.folder],
        assets=assets,
        manifest={
            "format": format,
            "source": {"name": source.name, "revision": source.revision, "form": content.form},
        },
        card=content.card,
        force=force,
        progress=progress,
    )
    nbytes = sum(path.stat().st_size for path in files_below(written.path))
    return Exported(written.path, format, nbytes, content.base, content.notes)


@dataclass(frozen=True)
class _Content:
    """What an export holds.

    Attributes:
        tensors: its tensors.
        config: its config.json; None if it has none, and no tokenizer.
        form: the form of its source.
        overlay: whose alphas are written to alpha.json, if they are.
        base: as in `Exported`.
        notes: as in `Exported`.
        beside: writes further small files.
        card: the text of its model card, if it has one.
    """

    tensors: Parts
    config: dict | None
    form: str
    overlay: Overlay | None = None
    base: str | None = None
    notes: tuple[str, ...] = ()
    beside: Callable[[Path], None] = lambda _: None
    card: Callable[[Path], str] | None = None


def _whole(folder: Path, experts: str) -> _Content:
    stored = open_stored_tier(folder)
    origin = _origin(folder, contains_base=True)
    model = llamacpp_model(stored, as_overlay(stored, folder), origin, experts)
    return _Content(model, None, "tier", notes=model.notes)


def _of_experts(folder: Path, format: str) -> _Content:
    """The experts of a tier or overlay, with the base if there is one in floats."""
    raw = raw_config(folder)
    if is_overlay(raw):
        overlay = open_overlay(folder)
        overlay.check()
        if overlay.base:
            check_base(overlay.base, overlay.config, folder.name)
        name = folder.resolve().name
        base = str(raw.get("base_model_name_or_path") or name)
        origin = Origin(name, None if overlay.base else base)
    else:
        overlay = open_tier(folder)
        origin = _origin(folder, contains_base=bool(overlay.base))
    tensors = FORMATS[format](overlay, origin)
    notes = tensors.notes if isinstance(tensors, GgufTensors) else ()
    config = overlay_config(overlay.config, origin)
    return _Content(tensors, config, overlay.form, overlay, origin.base, notes)


def _for_transformers(source: Source, name: str, dtype: str) -> _Content:
    export = hf_export(source.folder, source.name, dtype)

    def beside(folder: Path) -> None:
        load_as_file(folder)
        export.write_beside(folder)

    return _Content(
        export.tensors,
        export.config,
        "tier",
        beside=beside,
        card=lambda folder: hf_card(folder, name, source, export, dtype),
    )


def _of_ternary(source: Source, opened: Callable[[Path], StoredModel]) -> _Content:
    raw = raw_config(source.folder)
    check_mlx2(raw, source.folder)
    stored = opened(source.folder)
    assert stored.ternary is not None
    parts, config = mlx2_pack(stored.ternary, raw, source.name)
    return _Content(Parts(parts), config, "ternary rows")


def _origin(folder: Path, *, contains_base: bool) -> Origin:
    """What a tier's manifest says of its sources; an overlay may have been its own base."""
    manifest = tier_manifest(folder)
    model = _name(manifest.get("overlay")) or folder.resolve().name
    base = None if contains_base else _name(manifest.get("base")) or model
    return Origin(model, base)


def _name(source: object) -> str | None:
    name = source.get("name") if isinstance(source, dict) else None
    return name if isinstance(name, str) else None
