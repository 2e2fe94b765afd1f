"""What a merge did: `merge.json`."""

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
    """What a merge wrote.

    Attributes:
        path: the folder.
        recipe: what was asked for.
        mixture: the models.
        form: how the result is stored.
        seed: of random routers and noise.
        rows: parameters and bytes by kind of part, the total last.
        unquantized: matrices that no group size divides, by path.
        routers: the routers, and what was measured of them.
        notes: what is odd.
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
    """All figures, and the recipe without paths of this machine."""
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
    """Condition numbers of the layers' routers; None where they are infinite or mean nothing."""
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
