"""Which experts serve the tokens of a running tier, and where these experts were."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from outlier_mlx.engine.calls import watched_calls
from outlier_mlx.engine.paging.paged import store_of
from outlier_mlx.engine.paging.places import Place
from outlier_mlx.runtime.moe import OutlierMoE

#: Where an expert was; or that it was left out rather than read, or not needed: its weight is 0.
From = Place | Literal["skipped", "unused"]
#: The experts of a token in each MoE layer: number, weight times alpha, and where the expert was.
Served = list[list[tuple[int, float, From]]]


def moe_blocks(model: nn.Module) -> dict[int, OutlierMoE]:
    """The MoE blocks of a tier, by layer; of any other model, none."""
    layers = enumerate(getattr(model, "layers", ()))
    mlps = ((number, getattr(layer, "mlp", None)) for number, layer in layers)
    return {number: mlp for number, mlp in mlps if isinstance(mlp, OutlierMoE)}


@dataclass(frozen=True)
class RoutedExperts:
    """The experts that a tier has.

    Attributes:
        layers: numbers of the MoE layers, ascending.
        experts: experts of each of them.
        top_k: experts of a token in a layer.
        paged: whether they are read from disk when they are needed.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    paged: bool


def routed_experts(model: nn.Module) -> RoutedExperts | None:
    """The experts of a model; None if it is not a tier."""
    blocks = moe_blocks(model)
    if not blocks:
        return None
    first = next(iter(blocks.values()))
    paged = store_of(model) is not None
    return RoutedExperts(tuple(blocks), first.alpha.shape[0], first.top_k, paged)


@dataclass
class _Routing:
    """What a layer's router chose, both (batch, tokens, k); and where experts with weight were.

    Where `places` is None, all were in memory.
    """

    indices: mx.array
    weights: mx.array
    places: dict[int, Place] | None = None

    def at(self, row: int, position: int) -> list[tuple[int, float, From]]:
        found = []
        numbers = np.array(self.indices)[row, position].tolist()
        for number, weight in zip(
            numbers, np.array(self.weights)[row, position].tolist(), strict=True
        ):
            place: From = "memory" if self.places is None else self.places.get(number, "skipped")
            found.append((number, weight, place if weight else "unused"))
        return found


@dataclass
class Pass:
    """What the routers chose while a batch of tokens went through the layers together."""

    _routings: dict[int, _Routing] = field(default_factory=dict)

    def served(self, row: int, position: int = -1) -> Served:
        """The experts of one token.

        Waits until the pass is computed; only the thread that ran the model can ask.

        Args:
            row: of the batch.
            position: of the tokens that went through the layers together.
        """
        return [routing.at(row, position) for routing in self._routings.values()]


class ExpertRecorder:
    """Records which experts a tier uses, between `start` and `stop`. Nothing is computed for it.

    One thread uses it: the one that runs the model.

    Attributes:
        latest: the latest pass through the layers, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        """For a tier; any other model has nothing to record."""
        self.latest: Pass | None = None
        self._blocks = moe_blocks(model)
        self._store = store_of(model)
        self._layer = -1
        self._watching: ExitStack | None = None

    def start(self) -> None:
        """Record from now on."""
        if self._watching is not None:
            return
        self._watching = ExitStack()
        for number, block in self._blocks.items():
            told = partial(self._note, number)
            self._watching.enter_context(watched_calls(block, "route", told))
        if self._store is not None:
            self._store.watch = self._note_places

    def stop(self) -> None:
        """Record no longer, and forget what was recorded: the model is as it was."""
        if self._watching is not None:
            self._watching.close()
        if self._store is not None:
            self._store.watch = None
        self._watching = self.latest = None

    def _note(self, layer: int, _: tuple[Any, ...], routed: tuple[mx.array, mx.array]) -> None:
        if self.latest is None or layer <= self._layer:
            self.latest = Pass()
        self._layer = layer
        self.latest._routings[layer] = _Routing(*routed)

    def _note_places(self, layer: int, places: dict[int, Place]) -> None:
        if self.latest is not None and layer in self.latest._routings:
            self.latest._routings[layer].places = places
