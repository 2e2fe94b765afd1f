"""When the system is short of memory, slots are given back: the same text, and no failure."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.paged import store_of
from outlier_mlx.engine.paging.pressure import LOOK_EVERY, WAIT_AFTER, Pressure
from outlier_mlx.engine.paging.store import ExpertStore
from tests.memory import at_rest


def paged(tier: Path, slots: int) -> tuple[Any, ExpertStore]:
    model = load_model(tier, expert_memory=ExpertMemory(slots=slots))[0]
    store = store_of(model)
    assert store is not None
    return model, store


def decode(model: Any, tokens: int = 12) -> Iterator[np.ndarray]:
    """Logits of a prompt and of tokens that follow it."""
    cache = make_prompt_cache(model)
    found = model(mx.array([[7 * n % 200 + 5 for n in range(20)]]), cache=cache)
    for _ in range(tokens):
        yield np.array(found)
        found = model(mx.argmax(found[:, -1:], axis=-1), cache=cache)


class Clock:
    """A clock that is set, and a system that is short of memory or not."""

    def __init__(self) -> None:
        self.now, self.short, self.looked = 0.0, False, 0

    def __call__(self) -> float:
        return self.now

    def pressed(self) -> bool:
        self.looked += 1
        return self.short


def test_the_rule() -> None:
    clock = Clock()
    rule = Pressure(8, clock.pressed, clock)
    assert rule.fewer(100) is None and rule.fewer(100) is None and clock.looked == 1
    clock.now, clock.short = LOOK_EVERY, True
    with pytest.warns(UserWarning, match="short of memory: 75 of 100 experts stay"):
        assert rule.fewer(100) == 75
    clock.now += LOOK_EVERY
    assert rule.fewer(75) is None  # the system needs time to notice
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        for slots, left in ((75, 56), (10, 8), (8, None)):
            clock.now += WAIT_AFTER
            assert rule.fewer(slots) == left


def test_the_same_text_with_fewer_slots(demo: Path) -> None:
    expected = list(decode(load_model(demo)[0]))
    model, store = paged(demo, 16)
    assert store.pressure is not None and store.pressure.least == 6
    clock = Clock()
    store.pressure = Pressure(6, clock.pressed, clock)
    left = []
    with pytest.warns(UserWarning, match="12 of 16 experts"):
        for number, logits in enumerate(decode(model)):
            assert np.array_equal(logits, expected[number]), number
            clock.now, clock.short = clock.now + WAIT_AFTER, number >= 3
            left.append(store.pool.slots)
    assert left[:5] == [16, 16, 16, 16, 12] and left[5:8] == [9, 6, 6]


def test_memory_goes_down_and_has_no_peak(demo: Path) -> None:
    model, store = paged(demo, 16)
    for _ in decode(model, 2):
        pass
    before, slot = at_rest(), _nbytes(store) / 16
    store.shrink(6)
    assert mx.get_peak_memory() <= before + slot
    assert mx.get_active_memory() <= before - 9.9 * slot
    assert _nbytes(store) == 6 * slot


def _nbytes(store: ExpertStore) -> int:
    return sum(array.nbytes for arrays in store.pool.arrays.values() for array in arrays)


def test_a_shrink_while_experts_are_being_read(demo: Path) -> None:
    expected = list(decode(load_model(demo)[0], 3))
    model, store = paged(demo, 14)
    for number, logits in enumerate(decode(model, 3)):
        assert np.array_equal(logits, expected[number])
        store.read_early(store.layers[0], range(6), store.layers[1])
        store.shrink(12 - number)


def test_ctrl_c_in_between_leaves_a_usable_store(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(decode(load_model(demo)[0], 2))
    model, store = paged(demo, 14)
    evaluate, calls = mx.eval, []

    def interrupted(*arrays: Any) -> None:
        calls.append(arrays)
        if len(calls) == 1:
            raise KeyboardInterrupt
        evaluate(*arrays)

    store.outputs._kept.clear()
    monkeypatch.setattr(mx, "eval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.shrink(7)
    monkeypatch.undo()
    assert store.pool.slots == 7
    assert all(map(np.array_equal, decode(model, 2), expected))
