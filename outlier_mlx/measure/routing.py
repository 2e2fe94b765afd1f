"""Routing: which experts serve the tokens of a text, layer by layer."""

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from outlier_mlx.engine.calls import Told, watched_calls
from outlier_mlx.engine.experts import moe_blocks as blocks_of
from outlier_mlx.engine.prompts import check_tokens
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.pictures import SUFFIXES, heat_map
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.terminal import Progress, no_progress, print_columns, stdout

#: What the command writes; the files of an earlier run are removed when it is replaced.
FILES = ("routing.json", *(f"routing{suffix}" for suffix in SUFFIXES))


@dataclass(frozen=True)
class LayerRouting:
    """How one layer routed a text.

    Attributes:
        layer: number of the layer.
        tokens: number of tokens.
        share: for each expert, the share of tokens that it served; the sum is the top k.
        weight: for each expert, its mean routing weight for the tokens it served, without alpha.
        together: (experts, experts), the share of tokens that both served; the diagonal is `share`.
    """

    layer: int
    tokens: int
    share: list[float]
    weight: list[float]
    together: list[list[float]]

    @property
    def entropy(self) -> float:
        """Entropy of the shares in bits; log2 of the number of experts if all are equal."""
        total = sum(self.share)
        parts = [share / total for share in self.share if share > 0]
        return -sum(part * math.log2(part) for part in parts)

    def as_json(self) -> dict:
        """All figures as JSON values."""
        first = {"layer": self.layer, "tokens": self.tokens, "entropy_bits": self.entropy}
        return first | asdict(self)


def moe_blocks(model: nn.Module) -> dict[int, OutlierMoE]:
    """The MoE blocks of a tier, by layer.

    Raises:
        OutlierError: the model has none.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise OutlierError("the model has no layer with routed experts")
    return blocks


def observe_routing(
    model: nn.Module, texts: list[list[int]], progress: Progress = no_progress
) -> list[LayerRouting]:
    """Run a tier over windows of tokens and count what its routers choose.

    Args:
        model: a tier that `outlier_mlx.load` returns.
        texts: windows of tokens.
        progress: called with tokens read so far, and in all.

    Raises:
        OutlierError: the model has no Outlier MoE layer, or no row for a token.
    """
    layers = moe_blocks(model)
    check_tokens(model, chain.from_iterable(texts), "the text")
    seen: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {number: [] for number in layers}
    with ExitStack() as watching:
        for number, block in layers.items():
            watching.enter_context(watched_calls(block, "__call__", _noting(block, seen[number])))
        done, total = 0, sum(map(len, texts))
        for tokens in texts:
            mx.eval(model(mx.array([tokens])))
            done += len(tokens)
            progress(done, total)
    return [_count(number, layers[number], found) for number, found in seen.items()]


def _noting(block: OutlierMoE, found: list[tuple[np.ndarray, np.ndarray]]) -> Told:
    """A callback that collects a block's experts and their weights, (tokens, k) each."""

    def note(given: tuple[Any, ...], _: mx.array) -> None:
        indices, weights = block.route(given[0])
        k = indices.shape[-1]
        found.append((np.array(indices).reshape(-1, k), np.array(weights).reshape(-1, k)))

    return note


def _count(
    layer: int, block: OutlierMoE, found: list[tuple[np.ndarray, np.ndarray]]
) -> LayerRouting:
    experts = block.alpha.shape[0]
    indices = np.concatenate([chosen for chosen, _ in found])  # (tokens, k)
    weights = np.concatenate([weight for _, weight in found])
    served = np.zeros((len(indices), experts))
    np.put_along_axis(served, indices.astype(np.intp), 1.0, axis=1)
    total = np.zeros(experts)
    np.add.at(total, indices, weights)
    counts = served.sum(axis=0)
    return LayerRouting(
        layer=layer,
        tokens=len(indices),
        share=(counts / len(indices)).tolist(),
        weight=(total / np.maximum(counts, 1)).tolist(),
        together=(served.T @ served / len(indices)).tolist(),
    )


def draw(layers: list[LayerRouting], path: Path) -> None:
    """Draw a heat map of the share of tokens that each expert of each layer served.

    Args:
        layers: the layers of one model, so all have equally many experts.
        path: the picture to write; its suffix is the format.

    Raises:
        OutlierError: matplotlib is not installed, or the file's suffix is not that of a picture.
    """
    shares = 100 * np.array([layer.share for layer in layers])  # (layers, experts)
    heat_map(
        path,
        shares,
        [str(layer.layer) for layer in layers],
        ("expert", "layer", "tokens served, %"),
    )


def print_routing(layers: list[LayerRouting]) -> None:
    """Print the experts' shares on stdout, a row per layer."""
    rows = [
        (str(layer.layer), f"{layer.entropy:.2f}", *(f"{100 * share:.0f}" for share in layer.share))
        for layer in layers
    ]
    print_columns(
        stdout(),
        ["layer", "entropy,\nbits", *map(str, range(len(layers[0].share)))],
        rows,
        title=f"Share of {layers[0].tokens} tokens that each expert serves, %",
        fixed=2,
        left=0,
    )
