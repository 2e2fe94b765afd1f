"""The result of a merge, its report `merge.json`, and its model card."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import outlier_mlx
from outlier_mlx.merge.merge_config import MergeConfig
from outlier_mlx.merge.model import Expert, Mixture
from outlier_mlx.merge.plan import StoredAs
from outlier_mlx.merge.routers import Routers
from outlier_mlx.merge.sources import Dense
from outlier_mlx.models.summary import SummaryRow
from outlier_mlx.writing.card import Card, in_shell, origin_of, plain


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        path: the written folder.
        merge_config: the merge configuration.
        mixture: the models.
        stored_as: how the result is stored.
        seed: seed of random routers and noise.
        rows: parameters and bytes by kind of part, the total last.
        unquantized: paths of matrices whose width no group size divides.
        routers: the routers and their measurements.
        notes: remarks for the user, such as choices that may not be intended.
    """

    path: Path
    merge_config: MergeConfig
    mixture: Mixture
    stored_as: StoredAs
    seed: int
    rows: list[SummaryRow]
    unquantized: list[str]
    routers: Routers
    notes: list[str]


def as_json(result: Merged) -> dict:
    """The content of `merge.json`: all figures, and the configuration without local paths."""
    mixture, merge_config = result.mixture, result.merge_config
    shared = mixture.shared
    routers = result.routers
    return {
        "producer": f"outlier-mlx {outlier_mlx.__version__}",
        "architecture": mixture.architecture,
        "gate_mode": merge_config.gate_mode,
        "no_positive": merge_config.no_positive,
        "experts_per_token": mixture.top_k,
        "seed": result.seed,
        "form": asdict(result.stored_as),
        "base": _named(mixture.base),
        "experts": [_expert(expert) for expert in mixture.experts],
        "shared_expert": _expert(shared) if shared else None,
        "parameters": asdict(mixture.parameters),
        "bytes": result.rows[-1].nbytes,
        "condition_numbers": conditions(result),
        "measured_on": routers.measured_on,
        "routing": [asdict(routing) for routing in routers.routing],
        "trained": [{"loss": f.loss, "accuracy": f.accuracy} for f in routers.fitted],
        "unquantized": result.unquantized,
        "notes": result.notes,
    }


def model_card(result: Merged, folder: Path) -> str:
    """The text of the card, once everything else is in the folder."""
    mixture, stored_as, name = result.mixture, result.stored_as, result.path.name
    base = origin_of("base", mixture.base.source)
    experts = [origin_of(f"expert {e.number}", e.model.source) for e in mixture.experts]
    if mixture.shared:
        experts.append(origin_of("shared expert", mixture.shared.model.source))
    changes = [
        "the experts are the feed-forward layers of the models named so; all else is the base's",
        f"the routers were made by outlier-mlx, `gate_mode: {result.merge_config.gate_mode}`;"
        " `merge.json` has the prompts and what was measured",
        f"matrices were quantized to {stored_as.bits} bits in groups of {stored_as.group_size} at"
        " most"
        if stored_as.bits
        else f"weights were converted to {stored_as.dtype}",
    ]
    # Stock mlx-lm does not renormalise the routing weights of a Qwen2-MoE.
    programs = ["outlier-mlx generate"]
    if mixture.architecture == "mixtral":
        programs.append("mlx_lm.generate")
    return Card(
        name=name,
        introduction=f"A {kind_of(mixture)}, merged by outlier-mlx from dense models.",
        commands=[
            f'{program} --model {in_shell(name)} --prompt "Once upon a time"'
            for program in programs
        ],
        after_commands="\n".join(f"- {plain(note)}" for note in result.notes),
        origins=[base, *experts],
        based_on=[base, *experts],
        relation="merge",
        tags=["mlx", "moe", "merge"],
        rows=result.rows,
        after_sizes=f"A token uses {mixture.parameters.active:,} of the parameters.",
        changes=changes,
    ).text(folder)


def kind_of(mixture: Mixture) -> str:
    """What a mixture is, as in "Mixtral of 4 experts, 2 a token"."""
    name = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2-MoE"}[mixture.architecture]
    number = len(mixture.experts)
    return f"{name} of {number} expert{'' if number == 1 else 's'}, {mixture.top_k} a token"


def conditions(result: Merged) -> list[float | None]:
    """Condition numbers of the layers' routers; None if infinite or if routers were trained."""
    found = result.routers.gates.condition_numbers
    trained = result.merge_config.gate_mode == "trained"
    return [None if trained or not math.isfinite(number) else number for number in found]


def _named(model: Dense) -> dict:
    return {"name": model.source.name, "revision": model.source.revision}


def _expert(expert: Expert) -> dict:
    config = expert.config
    return _named(expert.model) | {
        "positive_prompts": list(config.positive),
        "negative_prompts": list(config.negative),
        "texts": [path.name for path in config.texts],
        "held_out": list(config.held_out),
        "noise_scale": config.noise_scale,
        "residual_scale": config.residual_scale,
    }
