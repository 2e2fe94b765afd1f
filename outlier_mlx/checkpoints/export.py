"""Writing what tiers hold in the forms that other tools read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from outlier_mlx import __version__
from outlier_mlx.checkpoints.export_gguf import GgufExport
from outlier_mlx.checkpoints.export_packed import PackedExport
from outlier_mlx.checkpoints.export_shared import Origin
from outlier_mlx.checkpoints.export_v32 import V32Export
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.checkpoints.tier import open_tier
from outlier_mlx.errors import OutlierError, did_you_mean
from outlier_mlx.storage.hub import resolve
from outlier_mlx.storage.output import write_json
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import read_json
from outlier_mlx.terminal import Progress
from outlier_mlx.writing.assets import copy_assets
from outlier_mlx.writing.folders import check_free, check_space, whole_folder

__all__ = ["Exported", "export_tier"]


class _Export(Protocol):
    @property
    def nbytes(self) -> int: ...

    def write(self, folder: Path, advance: Callable[[int], None]) -> None: ...


#: Says that a folder is an export, which `force` may replace.
MANIFEST = "export.json"
FORMATS: dict[str, Callable[[Overlay, Origin], _Export]] = {
    "overlay": V32Export,
    "packed": PackedExport,
    "gguf": GgufExport,
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: the folder.
        format: "overlay", "packed" or "gguf".
        nbytes: bytes of all its files.
        base: the name of the base that readers need, if the export does not contain one.
    """

    path: Path
    format: str
    nbytes: int
    base: str | None


def export_tier(
    tier: str | Path,
    out: str | Path,
    format: str = "overlay",
    *,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a tier's experts, routers and alphas in a form that other tools read, exactly.

    The base is written along if the tier stores it unquantized; what int4 has left of it is not
    the base that overlays are for.

    Args:
        tier: a tier's folder or hub repository.
        out: the folder to make.
        format: "overlay" (the V3.2 form), "packed" (five trits a byte, and `experts.bin`) or
            "gguf" (TQ1_0 tensors).
        revision: branch, tag or commit on the hub.
        force: replace `out` if it is an export or another folder that this project wrote.
        progress: called with bytes written so far, and in all.

    Raises:
        OutlierError: no sound tier, something that the format cannot hold exactly, an output that
            exists, or a disk that is too small. Nothing is left behind.
    """
    if format not in FORMATS:
        hint = did_you_mean(format, FORMATS)
        raise OutlierError(f"format {format!r}: expected one of {', '.join(FORMATS)}{hint}")
    folder = resolve(tier, revision).folder
    target = Path(out)
    check_free(target, force=force)
    overlay = open_tier(folder)
    origin = _origin(folder, contains_base=bool(overlay.base))
    export = FORMATS[format](overlay, origin)
    total, done = export.nbytes, 0
    check_space(target, total, "the export")

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    try:
        with whole_folder(target, force=force) as part:
            export.write(part, advance)
            copy_assets([folder], part)
            write_json(part / MANIFEST, {"producer": f"outlier-mlx {__version__}", "form": format})
            nbytes = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    except OSError as error:
        raise OutlierError(f"{target}: cannot write: {error.strerror or error}") from error
    return Exported(target, format, nbytes, origin.base)


def _origin(folder: Path, *, contains_base: bool) -> Origin:
    """What a tier's manifest says of its sources; an overlay may have been its own base."""
    manifest = {}
    if (folder / "tier.json").exists():
        manifest = read_json(inside(folder, "tier.json"))
    model = _name(manifest.get("overlay")) or folder.resolve().name
    base = None if contains_base else _name(manifest.get("base")) or model
    return Origin(model, base)


def _name(source: object) -> str | None:
    name = source.get("name") if isinstance(source, dict) else None
    return name if isinstance(name, str) else None
