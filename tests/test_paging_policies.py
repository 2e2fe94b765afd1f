"""Which expert is evicted: each policy against a slow model that goes through all slots."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx.engine.paging.policies import POLICIES, Key, LeastStale, Lfu, Lru, Policy

LAYERS, EXPERTS = 4, 5


class Model:
    """Keeps the history, and looks through all of it for each eviction."""

    def __init__(self) -> None:
        self.events: dict[Key, int] = {}  # of experts with a slot: the last use or addition
        self.uses: dict[Key, list[int]] = {}  # the passes in which an expert was used
        self.count = self.number = 0
        self.layer = -1

    def use(self, layer: int, experts: set[int]) -> None:
        self.number += layer <= self.layer
        self.layer = layer
        for key in sorted((layer, expert) for expert in experts):
            self.uses.setdefault(key, []).append(self.number)
            if key in self.events:
                self.event(key)

    def event(self, key: Key) -> None:
        self.count += 1
        self.events[key] = self.count

    def victim(self, name: str, layer: int, held: set[Key]) -> Key | None:
        ranks: dict[str, Any] = {
            "lru": lambda key: self.events[key],
            "lfu": lambda key: (self.frequency(key), self.events[key]),
            "least-stale": lambda key: (key[0] > layer, self.events[key]),
        }
        those = [key for key in self.events if key[0] != layer and key not in held]
        return min(those, key=ranks[name], default=None)

    def frequency(self, key: Key) -> Fraction:
        """With a half-life of one pass, exactly."""
        return sum((Fraction(2) ** number for number in self.uses.get(key, [])), Fraction(0))


def made(name: str) -> Policy:
    return Lfu(half_life=1) if name == "lfu" else POLICIES[name]()


keys = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
step = st.one_of(
    st.tuples(st.just("use"), st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1))),
    st.tuples(st.just("add"), keys, st.none()),
    st.tuples(st.just("remove"), keys, st.none()),
    st.tuples(st.just("evict"), st.integers(-1, LAYERS - 1), st.sets(keys, max_size=6)),
)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=200, deadline=None)
@given(steps=st.lists(step, max_size=80))
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
    """LRU and least-stale, after a pass over four layers of one expert each."""
    policies: list[Policy] = [Lru(), LeastStale()]
    for policy in policies:
        for layer in range(LAYERS):
            policy.use(layer, [0])
            policy.add(layer, 0)
    return policies


def test_least_stale_keeps_what_this_pass_comes_to() -> None:
    """In the next pass at layer 2: LRU takes layer 3, which comes next; least-stale takes 0."""
    lru, least_stale = full()
    for policy in (lru, least_stale):
        for layer in range(3):
            policy.use(layer, [0] if layer < 2 else [1])
    assert (lru.evict(2), least_stale.evict(2)) == ((3, 0), (0, 0))


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
