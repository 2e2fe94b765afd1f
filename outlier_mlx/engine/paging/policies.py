"""Which expert leaves its slot when another one needs it.

A policy knows experts by (layer, expert), and never sees slots or bytes. The store of a running
model and the replay of a recorded trace use the same classes, and call them in the same order:

1. A layer of a pass needs some experts: `use`, once, with all of them, resident or not.
2. For each that is missing, in ascending order: if no slot is free, `evict`; then `add`, before it
   is read. If it cannot be read: `remove`.
3. An expert that is read early, before its layer is in hand, is also evicted for and added, but not
   used.

A pass is one run through the layers: a decoded token, a batch of them or a chunk of a prompt.
Policies see where one begins: layers ascend within a pass.

No call goes through all slots, but at most through the layers, and the experts of one of them. Only
LFU tidies up now and then.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Container, Iterable
from heapq import heapify, heappop, heappush
from math import inf, log2
from typing import Protocol

#: A layer's number and an expert's.
Key = tuple[int, int]


class Policy(Protocol):
    """Keeps account of the experts that have a slot, and names the one to go."""

    def use(self, layer: int, experts: Iterable[int]) -> None:
        """Note that a layer of the present pass needs these experts, in any order."""

    def add(self, layer: int, expert: int) -> None:
        """Note that an expert, which had none, was given a slot."""

    def remove(self, layer: int, expert: int) -> None:
        """Note that an expert lost its slot for another reason than `evict`.

        Raises:
            KeyError: it had none.
        """

    def evict(self, layer: int, held: Container[Key] = ()) -> Key | None:
        """Choose an expert to lose its slot, and forget that it had one.

        Args:
            layer: the layer in hand, or that an expert is read early for; none of its experts is
                chosen. -1 if there is none.
            held: further experts that are not chosen, such as those that are being read.

        Returns:
            The expert, or None if all may not go.
        """


class Lru:
    """The expert that was used, or given a slot, the longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()  # the next to go comes first

    def use(self, layer: int, experts: Iterable[int]) -> None:
        """See `Policy`."""
        for key in ((layer, expert) for expert in sorted(experts)):
            if key in self._order:
                self._order.move_to_end(key)

    def add(self, layer: int, expert: int) -> None:
        """See `Policy`."""
        self._order[layer, expert] = None

    def remove(self, layer: int, expert: int) -> None:
        """See `Policy`."""
        del self._order[layer, expert]

    def evict(self, layer: int, held: Container[Key] = ()) -> Key | None:
        """See `Policy`."""
        key = next((key for key in self._order if key[0] != layer and key not in held), None)
        if key is not None:
            del self._order[key]
        return key


class Lfu:
    """The expert that was used least often, where a use counts half after `half_life` passes.

    Uses are counted whether an expert has a slot or not. Of experts that were used equally often,
    the one used or given a slot the longest ago goes.
    """

    def __init__(self, half_life: float = 64.0) -> None:
        """Count a use as half a use after `half_life` passes."""
        self._half_life = half_life
        self._pass, self._layer = 0, -1
        self._events = 0
        # log2 of the sum over an expert's uses of 2^(number of the pass / half-life). Time passing
        # takes the same from all, so the order changes only by uses.
        self._uses: dict[Key, float] = {}
        self._rank: dict[Key, tuple[float, int]] = {}  # of experts with a slot: uses, last event
        # May have outdated ranks: those are passed over, and dropped when they are too many.
        self._heap: list[tuple[tuple[float, int], Key]] = []

    def use(self, layer: int, experts: Iterable[int]) -> None:
        """See `Policy`."""
        if layer <= self._layer:
            self._pass += 1
        self._layer = layer
        now = self._pass / self._half_life
        for key in ((layer, expert) for expert in sorted(experts)):
            before = self._uses.get(key)
            # log2(2^before + 2^now), and now is never less.
            self._uses[key] = now if before is None else now + log2(1 + 2 ** (before - now))
            if key in self._rank:
                self._put(key)

    def add(self, layer: int, expert: int) -> None:
        """See `Policy`."""
        self._put((layer, expert))

    def remove(self, layer: int, expert: int) -> None:
        """See `Policy`."""
        del self._rank[layer, expert]

    def evict(self, layer: int, held: Container[Key] = ()) -> Key | None:
        """See `Policy`."""
        kept = []
        found = None
        while self._heap and found is None:
            rank, key = entry = heappop(self._heap)
            if self._rank.get(key) != rank:
                continue
            if key[0] == layer or key in held:
                kept.append(entry)
            else:
                found = key
                del self._rank[key]
        for entry in kept:
            heappush(self._heap, entry)
        return found

    def _put(self, key: Key) -> None:
        self._events += 1
        rank = self._uses.get(key, float("-inf")), self._events
        self._rank[key] = rank
        heappush(self._heap, (rank, key))
        if len(self._heap) > 4 * len(self._rank) + 64:
            self._heap = [(rank, key) for key, rank in self._rank.items()]
            heapify(self._heap)


class LeastStale:
    """First what the present pass has gone by: the layers below are needed last.

    Among the experts of layers below the layer in hand, and if there is none among those of layers
    above, the one that was used, or given a slot, the longest ago goes. After the policy of the
    same name in SpecMD (arXiv 2602.03921).
    """

    def __init__(self) -> None:
        self._events = 0
        # Of each layer, the last event of experts with a slot; the next to go comes first.
        self._layers: defaultdict[int, OrderedDict[int, int]] = defaultdict(OrderedDict)

    def use(self, layer: int, experts: Iterable[int]) -> None:
        """See `Policy`."""
        resident = self._layers[layer]
        for expert in sorted(experts):
            if expert in resident:
                self._events += 1
                resident[expert] = self._events
                resident.move_to_end(expert)

    def add(self, layer: int, expert: int) -> None:
        """See `Policy`."""
        self._events += 1
        self._layers[layer][expert] = self._events

    def remove(self, layer: int, expert: int) -> None:
        """See `Policy`."""
        del self._layers[layer][expert]

    def evict(self, layer: int, held: Container[Key] = ()) -> Key | None:
        """See `Policy`."""
        first = []
        for number, resident in self._layers.items():
            if number == layer:
                continue
            expert = next((expert for expert in resident if (number, expert) not in held), None)
            if expert is not None:
                first.append((number > layer, resident[expert], (number, expert)))
        if not first:
            return None
        *_, key = min(first)
        self.remove(*key)
        return key


class LeastLikely:
    """The expert that is likely to be needed last; what is likely is learned from what is used.

    A layer's turns are the passes in which it was used. An expert's chance p to be used in one is

        f            the share of its layer's turns in which it was used; a turn counts half after
                     `half_life` turns
        f + (1-f)b   if it was used in the last of them

    where b is learned from all layers: of the experts used in a turn, r are used in the next one,
    and f would have said m; b is (r - m) / (1 - m), or 0. If p is the same in all turns, 1/p of
    them are needed on average, and the first one comes when d layers have passed: the expert goes
    for which 1/p + d / (number of layers) is largest. Of equal ones, the layer with the largest
    number goes first, and of its experts the one with the lowest.

    Where routing has favourites, this is near to LFU; where tokens keep their neighbours' experts,
    to least-stale.
    """

    def __init__(self, half_life: float = 32.0, memory: float = 0.999) -> None:
        """Count turns half after `half_life`; in b, a use counts `memory` times the next one."""
        self._decay, self._memory = 2 ** (-1 / half_life), memory
        self._layers: defaultdict[int, _Turns] = defaultdict(_Turns)
        # Sums over the experts of all turns: how many, r and m.
        self._seen = self._again = self._expected = 0.0

    def use(self, layer: int, experts: Iterable[int]) -> None:
        """See `Policy`."""
        of, used = self._layers[layer], set(experts)
        self._seen = self._memory * self._seen + len(of.last)
        self._again = self._memory * self._again + len(of.last & used)
        expected = sum(of.share(expert, self._decay) for expert in sorted(of.last))
        self._expected = self._memory * self._expected + expected
        rest = self._seen - self._expected
        of.bonus = max(0.0, (self._again - self._expected) / rest) if rest > 0 else 0.0
        of.turn(used, self._decay)

    def add(self, layer: int, expert: int) -> None:
        """See `Policy`."""
        of = self._layers[layer]
        of.resident.add(expert)
        of.least = None

    def remove(self, layer: int, expert: int) -> None:
        """See `Policy`."""
        of = self._layers[layer]
        of.resident.remove(expert)
        of.least = None

    def evict(self, layer: int, held: Container[Key] = ()) -> Key | None:
        """See `Policy`."""
        first = []
        layers = max(self._layers, default=0) + 1
        for number, of in self._layers.items():
            if number == layer or not of.resident:
                continue
            if of.least is None:
                of.least = of.find(of.resident, self._decay)
            least: tuple[float, int] | None = of.least
            if (number, of.least[1]) in held:
                free = [expert for expert in of.resident if (number, expert) not in held]
                least = of.find(free, self._decay) if free else None
            if least is not None:
                chance, expert = least
                away = (number - layer) % layers / layers
                wait = 1 / chance + away if chance else inf
                first.append((-wait, -number, expert))
        if not first:
            return None
        _, number, expert = min(first)
        self.remove(-number, expert)
        return -number, expert


class _Turns:
    """The turns of one layer, for `LeastLikely`."""

    def __init__(self) -> None:
        self.turns = 0.0  # how many, decayed
        self.number = 0
        # Of each expert, the turns in which it was used, decayed up to the number of a turn.
        self.uses: dict[int, tuple[float, int]] = {}
        self.last: set[int] = set()
        self.bonus = 0.0
        self.resident: set[int] = set()
        # Chance and number of the resident expert that is to go first. Chances change by turns.
        self.least: tuple[float, int] | None = None

    def turn(self, used: set[int], decay: float) -> None:
        """Count a turn."""
        self.number += 1
        self.turns = decay * self.turns + 1
        for expert in used:
            before, number = self.uses.get(expert, (0.0, self.number))
            self.uses[expert] = 1 + before * decay ** (self.number - number), self.number
        self.last, self.least = used, None

    def share(self, expert: int, decay: float) -> float:
        """The share of turns in which an expert was used."""
        uses, number = self.uses.get(expert, (0.0, self.number))
        return uses * decay ** (self.number - number) / self.turns if uses else 0.0

    def find(self, experts: Iterable[int], decay: float) -> tuple[float, int]:
        """Chance and number of the expert with the least chance."""
        chances = []
        for expert in experts:
            share = self.share(expert, decay)
            share += (1 - share) * self.bonus if expert in self.last else 0.0
            chances.append((share, expert))
        return min(chances)


#: All policies by their names in commands and reports.
POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "least-stale": LeastStale,
    "least-likely": LeastLikely,
}
#: The policy of a running model: see the table in `docs/memory.md`.
DEFAULT_POLICY = "least-likely"
