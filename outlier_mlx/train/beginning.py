"""The stage before all training: what the base makes of the texts, and what experts begin as.

On a large base it takes long. What the base makes of the texts is saved while it runs; after that,
each layer's experts are kept as soon as they are made.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from outlier_mlx.train.experts import Mode, empty_expert
from outlier_mlx.train.forward import TrainedModel
from outlier_mlx.train.initial import (
    Seen,
    chosen_neurons,
    first_latents,
    first_router,
    look,
    nothing_seen,
    rounded_expert,
)
from outlier_mlx.train.measures import loss_of, perplexities
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.state import Arrays, Fields, State, Work, are_figures, is_count
from outlier_mlx.train.texts import Corpora

#: Windows of each domain that are looked at, at most.
WINDOWS = 32
# The name under which is kept what the base makes of the texts.
_LOOK = "0 begin"


def begin(
    model: TrainedModel, corpora: Corpora, settings: Settings, work: Work, save_every: float
) -> State:
    """What all blocks begin as, and the record of this stage.

    Ended early, the same call goes on where it was, with the same result to the bit.

    Args:
        model: a base whose blocks have no experts yet.
        corpora: all texts.
        settings: resolved.
        work: where the state is kept.
        save_every: seconds after which it is saved.

    Returns:
        Arrays by names as those of `TrainedModel.numbers`: routers, alphas, codes and scales; and
        where experts are made from the FFN, "{layer}.neurons", (experts, expert_size) int32. The
        record has "losses", the base's on the held-out windows that decide, and "errors", the
        relative error of each way of rounding the experts.
    """
    arrays, record = _looked(model, corpora, settings, work, save_every)
    errors: list[dict[str, float]] = []
    for layer in model.blocks:
        stage = of_layer(layer)
        found = work.finished(stage, _experts(model, settings, layer), {"errors": _are_errors})
        if found is None:
            found = _rounded(model, settings, layer, arrays.get(f"{layer}.neurons"))
            work.finish(stage, *found)
        arrays |= found[0]
        errors += found[1]["errors"]
        # Experts that are still to be trained are silent until then.
        alpha = 0.0 if settings.trains_experts else settings.alpha
        arrays[f"{layer}.alpha"] = mx.full((len(arrays[f"{layer}.router"]),), alpha)
    means = {way: float(np.mean([error[way] for error in errors])) for way in errors[0]}
    losses = record["losses"]
    told = {"name": "begin", "steps": 0, "seconds": 0.0, "kept": True, "errors": means}
    return arrays, told | {"losses": losses, "before": perplexities(losses)}


def of_layer(layer: int) -> str:
    """The name under which a layer's first experts are kept."""
    return f"0 begin, layer {layer}"


def _looked(
    model: TrainedModel, corpora: Corpora, settings: Settings, work: Work, save_every: float
) -> State:
    """The first routers, the neurons of the first experts, and the base's held-out losses."""
    names = {corpus.name for corpus in corpora}
    like: Arrays = {}
    for layer, block in model.blocks.items():
        like[f"{layer}.router"] = block.router
        if settings.init == "ffn":
            shape = len(block.experts), settings.expert_size or 0
            like[f"{layer}.neurons"] = mx.zeros(shape, mx.int32)
    fields: Fields = {"losses": lambda of: are_figures(of) and of.keys() == names}
    if (found := work.finished(_LOOK, like, fields)) is not None:
        return found
    domains = [corpus.train[:WINDOWS] for corpus in corpora.domains]
    seen, losses = _seen(model, corpora, domains, settings.batch, work, save_every)
    sizes = np.array([windows[:, 1:].size for windows in domains], np.float64)
    arrays: Arrays = {}
    for layer, block in model.blocks.items():
        of, shares = seen.pop(layer), sizes / sizes.sum()
        router = first_router(of, shares, settings.experts_per_domain, (settings.seed, layer))
        arrays[f"{layer}.router"] = router
        if settings.init == "ffn":
            neurons = chosen_neurons(of, block.mlp.down_proj.weight, settings)
            arrays[f"{layer}.neurons"] = mx.array(neurons)
    record = {"losses": losses}
    work.finish(_LOOK, arrays, record)
    return arrays, record


def _seen(
    model: TrainedModel,
    corpora: Corpora,
    domains: Sequence[np.ndarray],
    batch: int,
    work: Work,
    save_every: float,
) -> tuple[dict[int, Seen], dict[str, float]]:
    """What each layer's FFN sees in the domains' windows, and the base's held-out losses."""
    seen = {layer: nothing_seen(block, len(domains)) for layer, block in model.blocks.items()}
    losses: dict[str, float] = {}
    done = 0
    running = work.running(
        _LOOK,
        {name: a.shape for name, a in _arrays(seen).items()},
        {"losses": are_figures, "batches": is_count},
    )
    if running is not None:
        arrays, record = running
        seen = {n: Seen(*(arrays[f"{n}.{leaf}"] for leaf in Seen._fields)) for n in seen}
        losses, done = record["losses"], record["batches"]
    # Replaced as a whole, so that what ends this early never finds a part of a batch in it.
    now = seen, done

    def state() -> State | None:
        return (_arrays(now[0]), {"losses": losses, "batches": now[1]}) if losses else None

    with work.saving(_LOOK, state, save_every) as stepped:
        for corpus in corpora:
            if corpus.name not in losses:
                losses[corpus.name] = loss_of(model, corpus.deciding, Mode(), batch)
                stepped()
        for found in look(model, domains, batch, seen, done):
            now = found, now[1] + 1
            stepped()
    return now[0], losses


def _arrays(seen: Mapping[int, Seen]) -> Arrays:
    return {f"{n}.{leaf}": a for n, of in seen.items() for leaf, a in of._asdict().items()}


def _experts(model: TrainedModel, settings: Settings, layer: int) -> Arrays:
    """Arrays like those of a layer's experts."""
    block = model.blocks[layer]
    empty = empty_expert(block.router.shape[1], settings.expert_size or 0)
    return dict(
        of for n in range(len(block.experts)) for of in empty.arrays(f"{layer}.experts.{n}").items()
    )


def _are_errors(value: object) -> bool:
    """Whether a value of a record has, of each expert, errors by the way of rounding."""
    if not isinstance(value, list) or not all(map(are_figures, value)) or not value:
        return False
    return all(of.keys() == {"lloyd", "absmean"} for of in value)


def _rounded(
    model: TrainedModel, settings: Settings, layer: int, neurons: mx.array | None
) -> State:
    """The codes and scales of a layer's experts, and the errors of each of them."""
    arrays: Arrays = {}
    errors = []
    of = None if neurons is None else np.array(neurons)
    for number in range(len(model.blocks[layer].experts)):
        weights = first_latents(model, settings, layer, number, of)
        expert, error = rounded_expert(weights, settings.scales)
        errors.append(error)
        arrays |= expert.arrays(f"{layer}.experts.{number}")
    return arrays, {"errors": errors}
