"""The result of a merge, and its report `merge.json`."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import outlier_mlx
from outlier_mlx.merge.model import Expert, Mixture
from outlier_mlx.merge.plan import Form
from outlier_mlx.merge.recipe import MergeRecipe
from outlier_mlx.merge.routers import Routers
from outlier_mlx.merge.sources import Dense
from outlier_mlx.models.summary import SummaryRow


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        path: the written folder.
        recipe: the merge recipe.
        mixture: the models.
        form: how the result is stored.
        seed: seed of random routers and noise.
        rows: parameters and bytes by kind of part, the total last.
        unquantized: paths of matrices whose width no group size divides.
        routers: the routers and their measurements.
        notes: remarks for the user, such as choices that may not be intended.
    """

    path: Path
    recipe: MergeRecipe
    mixture: Mixture
    form: Form
    seed: int
    rows: list[SummaryRow]
    unquantized: list[str]
    routers: Routers
    notes: list[str]


def as_json(result: Merged) -> dict:
    """The content of `merge.json`: all figures, and the recipe without local paths."""
    mixture, recipe = result.mixture, result.recipe
    shared = mixture.shared
    routers = result.routers
    return {
        "producer": f"outlier-mlx {outlier_mlx.__version__}",
        "architecture": mixture.architecture,
        "gate_mode": recipe.gate_mode,
        "no_positive": recipe.no_positive,
        "experts_per_token": mixture.top_k,
        "seed": result.seed,
        "form": asdict(result.form),
        "base": _named(mixture.base),
        "experts": [_expert(expert) for expert in mixture.experts],
        "shared_expert": _expert(shared) if shared else None,
        "parameters": {"total": mixture.total_params, "active": mixture.active_params},
        "bytes": result.rows[-1].nbytes,
        "condition_numbers": conditions(result),
        "measured_on": routers.measured_on,
        "routing": [asdict(routing) for routing in routers.routing],
        "trained": [{"loss": f.loss, "accuracy": f.accuracy} for f in routers.fitted],
        "unquantized": result.unquantized,
        "notes": result.notes,
    }


def conditions(result: Merged) -> list[float | None]:
    """Condition numbers of the layers' routers; None if infinite or if routers were trained."""
    found = result.routers.gates.condition_numbers
    trained = result.recipe.gate_mode == "trained"
    return [None if trained or not math.isfinite(number) else number for number in found]


def _named(model: Dense) -> dict:
    return {"name": model.source.name, "revision": model.source.revision}


def _expert(expert: Expert) -> dict:
    recipe = expert.recipe
    return _named(expert.model) | {
        "positive_prompts": list(recipe.positive),
        "negative_prompts": list(recipe.negative),
        "texts": [path.name for path in recipe.texts],
        "held_out": list(recipe.held_out),
        "noise_scale": recipe.noise_scale,
        "residual_scale": recipe.residual_scale,
    }
