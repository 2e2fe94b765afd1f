"""Held-out figures of a model in training: losses, use of experts, and how well they would page."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.train.experts import Mode
from outlier_mlx.train.forward import TrainedModel
from outlier_mlx.train.objectives import mean_loss, next_token


@dataclass(frozen=True)
class Use:
    """How the experts were used, of all of a text's windows.

    Attributes:
        load: for each layer, the share of tokens that used each expert.
        hit_rate: share of uses whose expert was among the latest half of the layer's experts; 1 if
            all are.
    """

    load: dict[int, list[float]]
    hit_rate: float


def loss_of(model: TrainedModel, windows: np.ndarray, mode: Mode, batch: int) -> float:
    """Mean next-token loss in nats on windows (n, length + 1).

    Experts that diverged may give none that is a number: it is infinite then, worse than any other.

    Raises:
        OutlierError: it is that of the base alone.
    """
    total = 0.0
    for tokens in _batches(windows, batch):
        hidden = model.hidden(tokens[:, :-1], mode)
        mean = mean_loss(hidden, model.head(mode.rounded), next_token, tokens[:, 1:])
        total += mean * len(tokens)
    if math.isfinite(total):
        return total / len(windows)
    if not mode.experts:
        raise OutlierError(
            f"the base's loss on held-out text is {total}: its numbers are damaged, or too large"
            " for its dtype, for which --dtype float32 has room"
        )
    return math.inf


def losses_of(
    model: TrainedModel, texts: Mapping[str, np.ndarray], mode: Mode, batch: int
) -> dict[str, float]:
    """`loss_of` several texts, by name."""
    return {name: loss_of(model, windows, mode, batch) for name, windows in texts.items()}


def perplexities(losses: Mapping[str, float]) -> dict[str, float]:
    """exp of losses, by name; at most 1e13, as JSON has no infinity, and no table 300 digits."""
    return {name: math.exp(min(loss, 30)) for name, loss in losses.items()}


def stage_record(
    title: str,
    planned: int,
    steps: int,
    seconds: float,
    before: Mapping[str, float],
    after: Mapping[str, float],
    kept: bool,
) -> dict[str, Any]:
    """What is told of a stage that trained: held-out losses become perplexities."""
    figures = {"before": perplexities(before), "after": perplexities(after)}
    made = {"steps": steps, "planned": planned, "seconds": seconds}
    return {"name": title} | made | {"kept": kept} | figures


def use_of(model: TrainedModel, windows: np.ndarray, mode: Mode, batch: int) -> Use:
    """Which experts windows (n, length + 1) use, and how often they were in a small cache.

    The cache is the layer's own, holds half of its experts, at least those of a token, and drops
    the one that was not used for longest; it begins empty with every window.
    """
    count = len(mode.experts)
    used: dict[int, np.ndarray] = {}
    hits = total = 0
    for tokens in _batches(windows, batch):
        chosen: dict[int, mx.array] = {}
        model_mode = replace(mode, watch=chosen.__setitem__, balance=0.0, stickiness=0.0)
        mx.eval(model.hidden(tokens[:, :-1], model_mode), chosen)
        for layer, indices in chosen.items():
            numbers = np.array(indices)
            found = np.bincount(numbers.reshape(-1), minlength=count)
            used[layer] = used.get(layer, np.zeros(count)) + found
            room = max(numbers.shape[-1], count // 2)
            for window in numbers:
                hits += hits_of(window, room)
                total += window.size
    tokens_seen = len(windows) * (windows.shape[1] - 1)
    load = {layer: (of / tokens_seen).tolist() for layer, of in used.items()}
    return Use(load, hits / total if total else 1.0)


def uses_of(
    model: TrainedModel, texts: Mapping[str, np.ndarray], mode: Mode, batch: int
) -> dict[str, Use]:
    """`use_of` several texts, by name; of none where there is one expert, and nothing to choose."""
    several = len(mode.experts) > 1
    return {name: use_of(model, w, mode, batch) for name, w in texts.items() if several}


def mean_hit_rate(uses: Mapping[str, Use], texts: Mapping[str, np.ndarray]) -> float:
    """The hit rate on several texts (n, length + 1), which count by their windows."""
    if not uses:
        return 1.0
    weights = [len(texts[name]) for name in uses]
    return float(np.average([use.hit_rate for use in uses.values()], weights=weights))


def hits_of(window: np.ndarray, room: int) -> int:
    """How many uses in a window (tokens, k) are of one of the `room` experts used latest before."""
    latest: list[int] = []
    hits = 0
    for token in window.tolist():
        for expert in token:
            with suppress(ValueError):
                latest.remove(expert)
                hits += 1
            latest.append(expert)
        del latest[:-room]
    return hits


def _batches(windows: np.ndarray, batch: int) -> Iterator[mx.array]:
    for start in range(0, len(windows), batch):
        yield mx.array(windows[start : start + batch])
