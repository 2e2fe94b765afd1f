"""Replays of a trace: which experts would have been in memory, had there been so many slots.

The policies are those of a running model, called in the same order. Two more know the future:
Belady's, which evicts what is needed last, is the most that any policy reaches; and look-ahead that
is never wrong.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

import numpy as np

from outlier_mlx.engine.paging.policies import Key, Policy
from outlier_mlx.measure.expert_trace import About, Trace

LookAhead = Literal["off", "recorded", "perfect"]
#: Name of the bound in reports.
BELADY = "belady"
#: For each pass and MoE layer, the experts that it needs, ascending.
Needs = list[list[tuple[int, ...]]]
#: For each pass and MoE layer, the experts that are read early, if there are any such.
Guesses = list[list[tuple[int, ...]] | None]
# Pairs of token and expert, for each expert of a layer, from which on a pass is taken for a prompt.
_PROMPT_PAIRS = 4


@dataclass(frozen=True)
class Counts:
    """What a replay counted, all (passes, layers).

    Attributes:
        needed: experts that were needed.
        missed: of those, how many were not in memory, and not being read early.
        early: experts that were read early for this layer, needed or not.
        useful: of those, how many were needed.
    """

    needed: np.ndarray
    missed: np.ndarray
    early: np.ndarray
    useful: np.ndarray

    def hit_rate(self, which: np.ndarray) -> float | None:
        """Share of the needed experts that were not missed, in these passes; None: none needed."""
        needed, missed = int(self.needed[which].sum()), int(self.missed[which].sum())
        return (needed - missed) / needed if needed else None


def least_slots(about: About) -> int:
    """The least number of slots: k a layer, and room for all experts of a layer."""
    return max(about.top_k * len(about.layers), about.experts)


def budget_slots(about: About, percent: int) -> int:
    """Slots of a budget in percent of all experts; never less than `least_slots`."""
    return max(least_slots(about), len(about.layers) * about.experts * percent // 100)


def needs_of(trace: Trace) -> Needs:
    """The experts that each pass needs; those whose weight is exactly 0 are not."""
    return _per_pass(trace.experts, trace.weights != 0, trace.passes)


def guesses_of(trace: Trace, look_ahead: LookAhead) -> Guesses:
    """The experts that are read early, when the MoE layer before theirs is in hand.

    For a prompt these are all of a layer, as on a GPU (a CPU reads fewer), but for those of which a
    weight was exactly 0, as their alpha is 0. For other passes, it depends on the look-ahead.

    Raises:
        ValueError: the trace holds nothing that was foreseen.
    """
    about = trace.about
    layer = np.arange(len(about.layers))[:, None]
    idle = np.zeros((len(layer), about.experts), bool)
    np.logical_or.at(idle, (layer, trace.experts), trace.weights == 0)
    whole = [tuple(np.flatnonzero(~row).tolist()) for row in idle]
    others: Guesses = [None] * len(trace.passes)
    if look_ahead == "perfect":
        others = list(needs_of(trace))
    elif look_ahead == "recorded":
        if trace.foreseen is None:
            raise ValueError("the trace holds nothing that was foreseen")
        others = list(_per_pass(trace.foreseen, ~idle[layer, trace.foreseen], trace.passes))
    prompts = trace.passes * about.top_k >= _PROMPT_PAIRS * about.experts
    return [whole if prompt else o for prompt, o in zip(prompts.tolist(), others, strict=True)]


def _per_pass(chosen: np.ndarray, wanted: np.ndarray, passes: np.ndarray) -> Needs:
    """The different experts of each pass and layer, ascending.

    Args:
        chosen: (tokens, layers, k), numbers of experts.
        wanted: (tokens, layers, k), which of them count.
        passes: (passes,), tokens of each.
    """
    ends = np.cumsum(passes, dtype=np.int64)
    kept: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal ones are one object
    found = []
    for start, end in zip(ends - passes, ends, strict=True):
        of_pass = []
        for layer in range(chosen.shape[1]):
            some = chosen[start:end, layer][wanted[start:end, layer]].tolist()
            experts = tuple(sorted(set(some)))
            of_pass.append(kept.setdefault(experts, experts))
        found.append(of_pass)
    return found


class _OfLayer:
    """All experts of a layer."""

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and key[0] == self._layer


def replay(
    needs: Needs,
    slots: int,
    policy: Policy,
    guesses: Guesses | None = None,
    layers: Sequence[int] | None = None,
) -> Counts:
    """Run a policy over a trace, with all slots empty at first.

    Args:
        needs: what each pass needs.
        slots: number of slots; at least as many as `least_slots` says.
        policy: a new one.
        guesses: what each pass reads early, in place of no expert of the layer in hand; None:
            nothing.
        layers: the numbers by which the policy knows the layers; default: from 0 on.
    """
    shape = len(needs), len(needs[0])
    names = range(shape[1]) if layers is None else layers
    missed, early, useful = (np.zeros(shape, np.uint16) for _ in range(3))
    resident: set[Key] = set()

    def read(key: Key, held: Container[Key]) -> bool:
        if len(resident) == slots:
            victim = policy.evict(key[0], held)
            if victim is None:
                return False
            resident.discard(victim)
        policy.add(*key)
        resident.add(key)
        return True

    for number, of_pass in enumerate(needs):
        guessed = None if guesses is None else guesses[number]
        for at, experts in enumerate(of_pass):
            layer, above = names[at], at + 1
            policy.use(layer, experts)
            for expert in experts:
                if (layer, expert) not in resident:
                    read((layer, expert), ())
                    missed[number, at] += 1
            for expert in guessed[above] if guessed and above < shape[1] else ():
                key = names[above], expert
                if key not in resident:
                    if not read(key, _OfLayer(layer)):
                        break
                    early[number, above] += 1
                    useful[number, above] += expert in of_pass[above]
    return Counts(sizes_of(needs), missed, early, useful)


def sizes_of(needs: Needs) -> np.ndarray:
    """How many experts are needed, (passes, layers) uint16."""
    return np.array([[len(experts) for experts in of_pass] for of_pass in needs], np.uint16)


def replay_belady(needs: Needs, slots: int) -> Counts:
    """The fewest misses that are possible: what is needed last, or never again, is evicted.

    It may evict experts of the layer in hand, which a running model never does, so that no policy
    can be better. L. A. Belady, "A study of replacement algorithms for a virtual-storage computer",
    IBM Systems Journal 5 (1966).
    """
    layers = len(needs[0])
    after = _next_uses(needs)
    missed = np.zeros((len(needs), layers), np.uint16)
    resident: dict[Key, int] = {}  # when it is needed next
    heap: list[tuple[int, Key]] = []  # the last comes first; also outdated times
    for number, of_pass in enumerate(needs):
        for layer, experts in enumerate(of_pass):
            now = number * layers + layer
            for expert in experts:
                key = layer, expert
                if key not in resident:
                    missed[number, layer] += 1
                    if len(resident) == slots:
                        _evict_last(heap, resident, now)
                    resident[key] = now
            for expert, then in zip(experts, next(after), strict=True):
                resident[layer, expert] = then
                heappush(heap, (-then, (layer, expert)))
    none = np.zeros_like(missed)
    return Counts(sizes_of(needs), missed, none, none)


def _evict_last(heap: list[tuple[int, Key]], resident: dict[Key, int], now: int) -> None:
    """Evict what is needed last. What is needed now is never that, if slots suffice for it."""
    while True:
        then, key = heappop(heap)
        if resident.get(key) == -then:
            del resident[key]
            return


def _next_uses(needs: Needs) -> Iterator[list[int]]:
    """For each layer of each pass, when each of its experts is needed again."""
    layers = len(needs[0])
    never = len(needs) * layers
    following: dict[Key, int] = {}
    found = []
    for number in range(len(needs) - 1, -1, -1):
        for layer in range(layers - 1, -1, -1):
            experts = needs[number][layer]
            found.append([following.get((layer, expert), never) for expert in experts])
            for expert in experts:
                following[layer, expert] = number * layers + layer
    return reversed(found)
