"""What experts and routers begin as: the base's own neurons, and where the domains' tokens are."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from outlier_mlx.engine.calls import watched_calls
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.description import PROJECTIONS
from outlier_mlx.train.experts import Expert, ExpertBlock, LatentMatrix, Mode, TernaryMatrix
from outlier_mlx.train.forward import TrainedModel
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.trits import Method, relative_error, ternarise

# How far the logits of a router that is sure of a domain are from the others'.
_LOGITS = 4.0
# Ridge of the regression, relative to the mean square of the router's input.
_RIDGE = 1e-2
# Of the routers' rows that tell experts of one domain apart, relative to 1 / sqrt(hidden).
_SPREAD = 0.5


class Seen(NamedTuple):
    """What a layer's FFN saw, summed over tokens, float32; float64 would gain nothing.

    Attributes:
        squares: (hidden, hidden), of the inputs.
        sums: (domains, hidden), of each domain's inputs.
        neurons: (domains, width), squared activations of each domain.
    """

    squares: mx.array
    sums: mx.array
    neurons: mx.array


def first_latents(
    model: TrainedModel, settings: Settings, layer: int, expert: int, neurons: np.ndarray | None
) -> dict[str, mx.array]:
    """The weights that an expert of a layer begins with; `neurons` are those of all its experts."""
    block = model.blocks[layer]
    own = None if neurons is None else neurons[expert]
    hidden, seed = block.router.shape[1], (settings.seed, layer, expert)
    return latents(block.mlp, own, hidden, settings.expert_size or 0, seed)


def nothing_seen(block: ExpertBlock, domains: int) -> Seen:
    """What a layer's FFN saw before the first token."""
    hidden, width = block.router.shape[1], block.mlp.gate_proj.weight.shape[0]
    return Seen(*(mx.zeros(s) for s in ((hidden, hidden), (domains, hidden), (domains, width))))


def look(
    model: TrainedModel,
    domains: Sequence[np.ndarray],
    batch: int,
    seen: dict[int, Seen],
    done: int = 0,
) -> Iterator[dict[int, Seen]]:
    """Run the base on each domain's text, and sum up what its FFNs see.

    Args:
        model: without experts taking part.
        domains: windows (n, length) of each domain.
        batch: windows at a time.
        seen: for each layer with experts, what was seen in the batches that are done.
        done: number of these.

    Yields:
        After each batch, what was seen until then; `seen` itself is not changed.
    """

    def note(domain: int, layer: int, mlp: Any, x: mx.array) -> None:
        x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        gated = nn.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        squares, sums, neurons = seen[layer]
        seen[layer] = Seen(
            squares + x.T @ x,
            sums.at[domain].add(x.sum(axis=0)),
            neurons.at[domain].add(mx.square(gated).sum(axis=0)),
        )
        mx.eval(seen[layer])  # of all layers together, it would take far more than a training

    parts = [
        (domain, windows[start : start + batch, :-1])
        for domain, windows in enumerate(domains)
        for start in range(0, len(windows), batch)
    ]
    for domain, tokens in parts[done:]:
        seen = dict(seen)
        with _watched(model.blocks, partial(note, domain)):
            mx.eval(model.hidden(mx.array(tokens), Mode()))
        yield seen


@contextmanager
def _watched(blocks: dict[int, ExpertBlock], told: Any) -> Iterator[None]:
    def tell(layer: int, mlp: nn.Module, given: tuple[Any, ...], _: Any) -> None:
        told(layer, mlp, given[0])

    with ExitStack() as stack:
        for layer, block in blocks.items():
            called = partial(tell, layer, block.mlp)
            stack.enter_context(watched_calls(block.mlp, "__call__", called))
        yield


def first_router(
    seen: Seen, shares: np.ndarray, per_domain: int, seed: tuple[int, ...]
) -> mx.array:
    """A router that sends each domain's tokens to its experts.

    Ridge regression from the router's input to the domain. The experts of a domain differ by
    random rows.

    Args:
        seen: of the layer.
        shares: (domains,) float64, of all tokens that were seen.
        per_domain: experts of a domain.
        seed: of the random rows.

    Returns:
        (domains * per_domain, hidden) float32.
    """
    squares = np.array(seen.squares, np.float64)
    hidden = len(squares)
    # A layer whose norm is zero sees nothing; its router is zero, whatever little the ridge is.
    squares += np.eye(hidden) * max(_RIDGE * np.trace(squares) / hidden, 1e-30)
    # Of the token's own domain 1, of all others 0, less the mean.
    wanted = np.array(seen.sums, np.float64)
    wanted -= wanted.sum(axis=0) * shares[:, None]
    rows = _LOGITS * np.linalg.solve(squares, wanted.T).T
    rows = np.repeat(rows, per_domain, axis=0)
    if per_domain > 1:
        noise = np.random.default_rng(seed).normal(size=rows.shape)
        rows += _SPREAD * hidden**-0.5 * noise
    return mx.array(rows.astype(np.float32))


def chosen_neurons(seen: Seen, down: mx.array, settings: Settings) -> np.ndarray:
    """The neurons of the base's FFN that each expert begins with.

    Those that matter most for a domain, by the size of their part of the output; the experts of a
    domain take turns in choosing.

    Args:
        seen: of the layer.
        down: (hidden, width), the matrix after the neurons.
        settings: for the sizes.

    Returns:
        (experts, expert_size) int32, ascending.
    """
    size, turns = settings.expert_size or 0, settings.experts_per_domain
    lengths = mx.sqrt(mx.square(down.astype(mx.float32)).sum(axis=0))
    matter = np.array(mx.sqrt(seen.neurons) * lengths)
    experts = []
    for of_domain in matter:
        order = np.argsort(-of_domain, kind="stable")
        for turn in range(turns):
            own = order[turn::turns][:size]
            others = order[~np.isin(order, own)][: size - len(own)]
            experts.append(np.sort(np.concatenate([own, others])))
    return np.stack(experts).astype(np.int32)


def latents(
    mlp: Any, neurons: np.ndarray | None, hidden: int, size: int, seed: tuple[int, ...]
) -> dict[str, mx.array]:
    """The weights that an expert begins with.

    Args:
        mlp: the base's FFN.
        neurons: (size,), those of its neurons that are taken; None: random weights, and an output
            of zero.
        hidden: hidden size.
        size: width of the expert.
        seed: of random weights.

    Returns:
        Weights by the names of `PROJECTIONS`, float32: (size, hidden), and (hidden, size) of
        "down".

    Raises:
        CheckpointError: there is no such neuron; MLX would read beyond the matrix.
    """
    if neurons is not None:
        width = mlp.gate_proj.weight.shape[0]
        if neurons.min() < 0 or neurons.max() >= width:
            raise CheckpointError(f"the work folder has neurons that the base's {width} are not")
        taken = mx.array(neurons)
        gate, up = (mlp[f"{name}_proj"].weight[taken] for name in ("gate", "up"))
        found = {"gate": gate, "up": up, "down": mlp.down_proj.weight[:, taken]}
        return {name: weight.astype(mx.float32) for name, weight in found.items()}
    rng = np.random.default_rng(seed)
    made = {
        name: mx.array((rng.normal(size=(size, hidden)) * hidden**-0.5).astype(np.float32))
        for name in ("gate", "up")
    }
    return made | {"down": mx.zeros((hidden, size))}


def rounded_expert(weights: dict[str, mx.array], method: Method) -> tuple[Expert, dict[str, float]]:
    """An expert of rounded weights, and the relative error of each way of rounding."""
    ways: tuple[Method, ...] = ("lloyd", "absmean")
    matrices: dict[str, TernaryMatrix | LatentMatrix] = {}
    left: dict[str, float] = dict.fromkeys(ways, 0.0)
    total = 0.0
    for name in PROJECTIONS:
        weight = weights[name]
        square = float(mx.square(weight).sum())
        total += square
        for way in ways:
            trits, scales = ternarise(weight, way)
            left[way] += relative_error(weight, trits, scales) ** 2 * square
            if way == method:
                matrices[name] = TernaryMatrix(
                    np.array(trits.astype(mx.int8)), np.array(scales[:, 0])
                )
    errors = {way: (of / total) ** 0.5 if total else 0.0 for way, of in left.items()}
    return Expert(matrices), errors
