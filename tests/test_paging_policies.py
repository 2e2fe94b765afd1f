"""Which expert is evicted: each policy against a slow model that goes through all slots."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx.engine.paging.policies import (
    POLICIES,
    Key,
    LeastLikely,
    LeastStale,
    Lfu,
    Lru,
    Policy,
)

LAYERS, EXPERTS = 4, 5


class Model:
    """Keeps the history, and looks through all of it for each eviction."""

    def __init__(self) -> None:
        self.events: dict[Key, int] = {}  # of experts with a slot: the last use or addition
        self.uses: dict[Key, list[int]] = {}  # the passes in which an expert was used
        self.count = self.number = 0
        self.layer = -1
        self.turns: dict[int, list[set[int]]] = {}  # what each layer's passes used
        self.repeats: list[tuple[int, int, float]] = []  # of each: used before, again, expected
        self.bonus: dict[int, float] = {}
        self.seen: set[Key] = set()

    def use(self, layer: int, experts: set[int]) -> None:
        self.number += layer <= self.layer
        self.layer = layer
        turns = self.turns.setdefault(layer, [])
        last = turns[-1] if turns else set()
        expected = sum(self.share((layer, expert)) for expert in sorted(last))
        self.repeats.append((len(last), len(last & experts), expected))
        self.bonus[layer] = self.learned()
        turns.append(experts)
        for key in sorted((layer, expert) for expert in experts):
            self.uses.setdefault(key, []).append(self.number)
            if key in self.events:
                self.event(key)

    def event(self, key: Key) -> None:
        self.count += 1
        self.events[key] = self.count
        self.seen.add(key)

    def victim(self, name: str, layer: int, held: set[Key]) -> Key | None:
        ranks: dict[str, Any] = {
            "lru": lambda key: self.events[key],
            "lfu": lambda key: (self.frequency(key), self.events[key]),
            "least-stale": lambda key: (key[0] > layer, self.events[key]),
            "least-likely": lambda key: (-self.wait(key, layer), -key[0], key[1]),
        }
        those = [key for key in self.events if key[0] != layer and key not in held]
        return min(those, key=ranks[name], default=None)

    def frequency(self, key: Key) -> Fraction:
        """With a half-life of one pass, exactly."""
        return sum((Fraction(2) ** number for number in self.uses.get(key, [])), Fraction(0))

    def share(self, key: Key) -> float:
        """Of its layer's turns, the latest counting twice the one before it."""
        turns = self.turns.get(key[0], [])
        used = sum(2**number for number, turn in enumerate(turns) if key[1] in turn)
        return used / (2 ** len(turns) - 1) if used else 0.0

    def learned(self) -> float:
        """With half of the weight for the latest turn of any layer."""
        seen = again = expected = 0.0
        for one in self.repeats:
            seen, again, expected = (
                old / 2 + new for old, new in zip((seen, again, expected), one, strict=True)
            )
        return max(0.0, (again - expected) / (seen - expected)) if seen > expected else 0.0

    def wait(self, key: Key, layer: int) -> float:
        """Passes until an expert is used, if its chance stays the same."""
        chance = self.chance(key)
        known = max({*self.turns, *(number for number, _ in self.seen)}) + 1
        passed = next(n for n in range(known + 1) if (layer + n) % known == key[0])
        return 1 / chance + passed / known if chance else math.inf

    def chance(self, key: Key) -> float:
        share = self.share(key)
        used = [*self.turns.get(key[0], []), set()]
        return share + (1 - share) * self.bonus[key[0]] if key[1] in used[-2:][0] else share


def made(name: str) -> Policy:
    """A policy that forgets so fast that its numbers are exact."""
    fast: dict[str, Policy] = {"lfu": Lfu(1), "least-likely": LeastLikely(1, 0.5)}
    return fast.get(name) or POLICIES[name]()


keys = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
step = st.one_of(
    st.tuples(st.just("use"), st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1))),
    st.tuples(st.just("add"), keys, st.none()),
    st.tuples(st.just("remove"), keys, st.none()),
    st.tuples(st.just("evict"), st.integers(-1, LAYERS - 1), st.sets(keys, max_size=6)),
)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=200, deadline=None)
@given(steps=st.lists(step, max_size=50))
def test_a_policy_evicts_what_a_search_through_all_slots_finds(name: str, steps: list) -> None:
    policy, model = made(name), Model()
    for what, where, more in steps:
        if what == "use":
            policy.use(where, more)
            model.use(where, more)
        elif what == "add" and where not in model.events:
            policy.add(*where)
            model.event(where)
        elif what == "remove" and where in model.events:
            policy.remove(*where)
            del model.events[where]
        elif what == "evict":
            expected = model.victim(name, where, more)
            assert policy.evict(where, more) == expected
            model.events.pop(expected, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", POLICIES)
def test_the_layer_in_hand_and_what_is_held_stay(name: str) -> None:
    policy = made(name)
    for key in [(0, 0), (1, 0), (2, 0)]:
        policy.add(*key)
    assert policy.evict(1, {(0, 0), (2, 0)}) is None
    assert policy.evict(1, {(0, 0)}) == (2, 0)
    assert policy.evict(1) == (0, 0)
    assert policy.evict(1) is None
    assert policy.evict(-1) == (1, 0)


@pytest.mark.parametrize("name", POLICIES)
def test_removing_what_has_no_slot_is_an_error(name: str) -> None:
    policy = made(name)
    policy.add(0, 0)
    policy.remove(0, 0)
    with pytest.raises(KeyError):
        policy.remove(0, 0)


def full() -> list[Policy]:
    """LRU and two others, after a pass over four layers of one expert each."""
    policies: list[Policy] = [Lru(), LeastStale(), LeastLikely()]
    for policy in policies:
        for layer in range(LAYERS):
            policy.use(layer, [0])
            policy.add(layer, 0)
    return policies


def test_what_this_pass_comes_to_stays() -> None:
    """In the next pass at layer 2, LRU takes layer 3, which comes next; least-stale takes 0, and
    least-likely 1, which comes last."""
    policies = full()
    for policy in policies:
        for layer in range(3):
            policy.use(layer, [0] if layer < 2 else [1])
    assert [policy.evict(2) for policy in policies] == [(3, 0), (0, 0), (1, 0)]


@pytest.mark.parametrize(("length", "last"), [(1, (0, 0)), (8, (0, 1))])
def test_least_likely_learns_whether_tokens_keep_their_experts(length: int, last: Key) -> None:
    """Expert 0 is the favourite, but the last token used 1. That stays where experts are kept."""
    policy, random = LeastLikely(), np.random.default_rng(0)
    for expert in range(4):
        policy.add(0, expert)
    for favour in random.random(500) < 0.6:
        chosen = 0 if favour else int(random.integers(1, 4))
        for _ in range(length):
            policy.use(0, [chosen])
    policy.use(0, [0])
    policy.use(0, [1])
    assert [policy.evict(1) for _ in range(4)][-1] == last


def test_lfu_forgets() -> None:
    """What was used eight times long ago goes before what was used three times of late."""
    policy = Lfu(half_life=4)
    policy.add(0, 0)
    policy.add(0, 1)
    for _ in range(8):
        policy.use(0, [0])
    for number in range(40):
        policy.use(0, [1] if number % 16 == 0 else [])
    assert policy.evict(1) == (0, 0)


def test_lfu_remembers_what_lost_its_slot() -> None:
    policy = Lfu()
    for number in range(3):
        policy.use(0, [0])
        policy.use(1, [number])
    policy.add(1, 2)
    policy.add(0, 0)
    assert policy.evict(2) == (1, 2)


def test_a_long_run_of_lfu_neither_grows_nor_fails() -> None:
    """Sums of powers of two would have overflowed after a thousand half-lives."""
    policy = Lfu(half_life=1)
    policy.add(0, 0)
    policy.add(0, 1)
    for number in range(5000):
        policy.use(0, [number % 2])
    assert len(policy._heap) <= 4 * 2 + 65
    assert policy.evict(1) == (0, 0)
