"""Converting: an overlay and its base become a tier."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from outlier_mlx.checkpoints.base import join, open_base
from outlier_mlx.engine.loading import check_loads
from outlier_mlx.storage.hub import Source
from outlier_mlx.storage.paths import named
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.tiers.card import model_card
from outlier_mlx.tiers.plan import Plan, make_plan
from outlier_mlx.tiers.portable import make_portable_plan
from outlier_mlx.tiers.presets import Recipe
from outlier_mlx.tiers.sources import Sources, open_sources
from outlier_mlx.writing.assets import copy_assets
from outlier_mlx.writing.folders import check_free
from outlier_mlx.writing.licences import stated_licence
from outlier_mlx.writing.model_folder import Written, write_model


@dataclass(frozen=True)
class Report(Written):
    """A tier that was written.

    Attributes:
        form: the overlay's form on disk.
        recipe: the recipe, its dtype settled.
        unquantized: matrices that no group size divides.
        notes: see `Plan`.
    """

    form: str
    recipe: Recipe
    unquantized: list[str]
    notes: list[str]


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
    planned: Callable[[Plan], None] = lambda _: None,
    progress: Progress = no_progress,
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
            same call resumes from there.
        planned: called with what will be written, before it is.
        progress: called with bytes of source read so far, and in all.

    Raises:
        OutlierError: the input is not valid, the output exists, or the disk is too small. Nothing
            is left behind, but for `stream`.
    """
    recipe = recipe or Recipe()
    target = named(out) if out is not None else _default_out(overlay, recipe)
    given = [overlay, base, None if alpha == "original" else alpha]
    check_free(target, force=force, sources=given)
    revisions = {"revision": revision, "base_revision": base_revision}
    with open_sources(overlay, base, target, **revisions, stream=stream, force=force) as sources:
        model = join(sources.opened, open_base(sources.base.folder) if sources.base else None)
        plan = (make_portable_plan if recipe.portable else make_plan)(model, recipe, alpha)
        planned(plan)
        written = write_model(
            target,
            sources.tensors(plan),
            plan.config,
            source=sources.overlay.name,
            inputs=[*given, *(source.folder for source in sources.by_role.values())],
            assets=partial(copy_assets, [source.folder for source in sources.by_role.values()]),
            manifest=_manifest(plan, alpha, sources),
            manifest_name="tier.json",
            card=lambda folder: model_card(folder, target.name),
            check=check_loads,
            force=force,
            progress=progress,
        )
    return Report(
        **vars(written),
        form=sources.opened.form,
        recipe=plan.recipe,
        unquantized=plan.unquantized,
        notes=plan.notes,
    )


def _default_out(overlay: str | Path, recipe: Recipe) -> Path:
    folder = Path(overlay)
    name = folder.resolve().name if folder.is_dir() else folder.name
    return Path(f"{name}-{recipe.name}")


def _manifest(plan: Plan, alpha: str | Path | None, sources: Sources) -> dict:
    stored = {"name": plan.recipe.name, **asdict(plan.recipe)}
    if alpha is not None:
        stored["alpha"] = Path(alpha).name
    return {
        "overlay": _cited(sources.overlay) | {"form": sources.opened.form},
        "base": _cited(sources.base) if sources.base else None,
        "recipe": stored,
    } | ({"notes": plan.notes} if plan.notes else {})


def _cited(source: Source) -> dict:
    """A source without a path of this machine; with the licence, if its card states one."""
    licence = stated_licence(source.folder)
    cited = {"name": source.name, "revision": source.revision}
    return cited | (licence.as_json() if licence else {})
