"""What the launches of each layer are made from: in which slots its experts are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from outlier_mlx.engine.paging.policies import Key


@dataclass
class _Layer:
    """What is known of a layer."""

    needable: frozenset[int]
    alpha: mx.array | None = None
    table: mx.array | None = None  # None: something has changed
    resident: bool = False


class Tables:
    """The slots of the experts of all MoE layers, as launches read them.

    Args:
        layers: numbers of the MoE layers.
        experts: experts of each of them.
        equal: for experts that are equal to others, the first of these; one slot has them all.
    """

    def __init__(self, layers: Iterable[int], experts: int, equal: Mapping[Key, Key]) -> None:
        self._layers = {layer: _Layer(frozenset(range(experts))) for layer in layers}
        self._experts, self._equal = experts, equal
        self._slots: dict[Key, int] = {}  # of equal experts, by the first
        self._sharing: dict[Key, set[int]] = {}  # other layers that have an equal expert
        for (layer, _), first in equal.items():
            self._sharing.setdefault(first, set()).add(layer)
        self._complete: bool | None = None  # None: something has changed

    def put(self, key: Key, slot: int) -> None:
        """Note that an expert, of equal ones the first, is in a slot."""
        self._slots[key] = slot
        self._moved(key)

    def remove(self, key: Key) -> None:
        """Note that an expert, of equal ones the first, is in its slot no longer."""
        del self._slots[key]
        self._moved(key)

    def clear(self) -> None:
        """Note that nothing is in a slot."""
        self._slots.clear()
        for layer in self._layers:
            self._changed(layer)

    def needable(self, layer: int) -> frozenset[int]:
        """The experts of a layer that can have another weight than 0."""
        return self._layers[layer].needable

    def use_alphas(self, layer: int, alpha: mx.array | None) -> None:
        """Take note of a layer's factors (experts,) of weights, of which some may be 0."""
        state = self._layers[layer]
        if alpha is None or alpha is state.alpha:
            return
        values: Any = alpha.tolist()
        used = (number for number, value in enumerate(values) if value != 0)
        state.alpha, state.needable = alpha, frozenset(used)
        self._changed(layer)

    def of(self, layer: int) -> mx.array:
        """The slot of each expert of a layer, (experts,) uint32, evaluated.

        If an expert is in none, it is that of another one.
        """
        state = self._layers[layer]
        if state.table is None:
            keys = [(layer, expert) for expert in range(self._experts)]
            slots = [self._slots.get(self._equal.get(key, key)) for key in keys]
            state.resident = all(slots[expert] is not None for expert in state.needable)
            spare = next((slot for slot in slots if slot is not None), 0)
            state.table = mx.array([spare if s is None else s for s in slots], mx.uint32)
        return state.table

    def resident(self, layer: int) -> bool:
        """Whether all experts that a layer can need are in slots, whatever its routing is."""
        self.of(layer)
        return self._layers[layer].resident

    @property
    def complete(self) -> bool:
        """Whether all layers are resident, so that nothing will be read."""
        if self._complete is None:
            self._complete = all(map(self.resident, self._layers))
        return self._complete

    def _moved(self, key: Key) -> None:
        for layer in (key[0], *self._sharing.get(key, ())):
            self._changed(layer)

    def _changed(self, layer: int) -> None:
        self._layers[layer].table = self._complete = None
