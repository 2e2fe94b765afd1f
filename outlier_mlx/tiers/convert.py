"""Converting: an overlay and its base, streamed tensor by tensor into a tier."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import outlier_mlx
from outlier_mlx.checkpoints.base import join, open_base
from outlier_mlx.errors import CheckpointWarning, OutlierError
from outlier_mlx.models.summary import SummaryRow
from outlier_mlx.storage.hub import Source
from outlier_mlx.terminal import Progress
from outlier_mlx.tiers.card import write_card
from outlier_mlx.tiers.plan import FORMAT_VERSION, Plan, make_plan
from outlier_mlx.tiers.portable import make_portable_plan
from outlier_mlx.tiers.presets import Recipe
from outlier_mlx.tiers.sources import open_sources
from outlier_mlx.tiers.stream import Sources
from outlier_mlx.writing.assets import copy_assets, is_legal
from outlier_mlx.writing.bundle import bundle
from outlier_mlx.writing.folders import check_free, whole_folder
from outlier_mlx.writing.licences import stated_licence
from outlier_mlx.writing.parts import described, listing, write_json, write_text
from outlier_mlx.writing.writer import WrittenFile


@dataclass(frozen=True)
class Report:
    """What a conversion wrote.

    Attributes:
        path: the tier.
        form: the overlay's form on disk.
        recipe: the recipe, its dtype settled.
        rows: parameters and bytes by kind of part, the total last.
        unquantized: matrices that no group size divides.
        tokenizer: whether a tokenizer came along.
    """

    path: Path
    form: str
    recipe: Recipe
    rows: list[SummaryRow]
    unquantized: list[str]
    tokenizer: bool


def convert_tier(
    overlay: str | Path,
    base: str | Path | None = None,
    out: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    alpha: str | Path | None = None,
    force: bool = False,
    revision: str | None = None,
    base_revision: str | None = None,
    stream: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert an overlay into a tier.

    Args:
        overlay: the overlay's folder or hub repository.
        base: the base model's folder or repository; None where the overlay contains it.
        out: the folder to make; by default NAME-RECIPE in the current folder.
        recipe: how to store it; the default recipe is "q4".
        alpha: a file of alphas (JSON, or V3.3's `.pt`) that wins over the overlay's own, or
            "original" for those that its `alpha_overlay.pt` replaced.
        force: replace `out` if it exists.
        revision: the overlay's revision on the hub.
        base_revision: the base's revision on the hub.
        stream: fetch the files of a repository one at a time, and delete each when it was used. A
            run that is interrupted leaves what it has in a hidden folder beside `out`, and the
            same call goes on from there.
        progress: called with bytes of source read so far, and in all.

    Raises:
        OutlierError: the input is not sound, the output exists, or the disk is too small. Nothing
            is left behind, but for `stream`.
    """
    recipe = recipe or Recipe()
    target = Path(out) if out is not None else _default_out(overlay, recipe)
    revisions = {"revision": revision, "base_revision": base_revision}
    with open_sources(overlay, base, target, **revisions, stream=stream, force=force) as sources:
        opened = sources.opened
        model = join(opened, open_base(sources.base.folder) if sources.base else None)
        planned = make_portable_plan if recipe.portable else make_plan
        plan = planned(model, recipe, alpha)
        check_free(target, force=force)
        sources.check_space(plan, target)
        try:
            with whole_folder(target, force=force, keep=sources.keep) as folder:
                files = sources.write(plan, folder, progress)
                assets = copy_assets(sources.folders, folder)
                tokenizer = "tokenizer_config.json" in assets or "tokenizer.json" in assets
                files += [write_json(folder, "config.json", plan.config)]
                if "model_file" in plan.config:
                    files += [write_text(folder, "outlier_moe.py", bundle())]
                files += [described(folder, name) for name in assets if not is_legal(name)]
                manifest = _manifest(plan, opened.form, alpha, sources, files)
                write_json(folder, "tier.json", manifest)
                write_card(folder, target.name)
        except OSError as error:
            raise OutlierError(f"{target}: cannot write: {error.strerror or error}") from error
    if not tokenizer:
        warnings.warn(
            f"{sources.overlay.name}: no tokenizer beside the overlay or base; the tier has none",
            CheckpointWarning,
            stacklevel=2,
        )
    return Report(target, opened.form, plan.recipe, plan.rows(), plan.unquantized, tokenizer)


def _default_out(overlay: str | Path, recipe: Recipe) -> Path:
    folder = Path(overlay)
    name = folder.resolve().name if folder.is_dir() else folder.name
    return Path(f"{name}-{recipe.name}")


def _manifest(
    plan: Plan,
    form: str,
    alpha: str | Path | None,
    sources: Sources,
    files: list[WrittenFile],
) -> dict:
    recipe = plan.recipe
    stored = {
        "name": recipe.name,
        "base_bits": recipe.base_bits,
        "group_size": recipe.group_size,
        "experts": recipe.experts,
        "dtype": recipe.dtype,
        "portable": recipe.portable,
        "mixed": recipe.mixed,
    }
    return {
        "format_version": FORMAT_VERSION,
        "producer": f"outlier-mlx {outlier_mlx.__version__}",
        "overlay": _cited(sources.overlay) | {"form": form},
        "base": _cited(sources.base) if sources.base else None,
        "recipe": stored | ({"alpha": Path(alpha).name} if alpha is not None else {}),
        "files": listing(files),
    }


def _cited(source: Source) -> dict:
    """A source without a path of this machine; with the licence, if its card states one."""
    licence = stated_licence(source.folder)
    cited = {"name": source.name, "revision": source.revision}
    return cited | (licence.as_json() if licence else {})
