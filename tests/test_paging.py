"""Paged experts: the same bits as with all experts in memory, whatever has a slot."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.paged import lookahead_of, store_of
from tests.metal import Metal

#: From two experts in each of three layers, or all six of one, to all.
SLOTS = (6, 7, 9, 12, 17, 18)


def paged(tier: Path, slots: int) -> Any:
    """A model with so many slots, also if all experts fit into them."""
    return load_model(tier, expert_memory=ExpertMemory(slots=slots), always_page=True)[0]


def logits(model: Any, tokens: int, more: int = 6) -> list[np.ndarray]:
    """Logits of a prompt and of some tokens that follow it."""
    cache = make_prompt_cache(model)
    x = mx.array([[7 * number % 200 + 5 for number in range(tokens)]])
    found = [model(x, cache=cache)]
    for _ in range(more):
        found.append(model(mx.argmax(found[-1][:, -1:], axis=-1), cache=cache))
    return [np.array(one) for one in found]


@pytest.mark.slow
@pytest.mark.parametrize("slots", SLOTS)
def test_the_same_logits_with_any_number_of_slots(demo: Path, slots: int) -> None:
    whole, model = load_model(demo)[0], paged(demo, slots)
    for tokens in (1, 2, 33, *([300] if slots in (6, 12) else [])):
        expected, found = logits(whole, tokens), logits(model, tokens)
        assert all(map(np.array_equal, found, expected)), tokens
    store = store_of(model)
    assert store is not None
    assert store.statistics.misses > 0


@pytest.mark.slow
@pytest.mark.parametrize("slots", [6, 9, 18])
def test_the_same_logits_from_the_kernels(demo: Path, metal: Metal, slots: int) -> None:
    whole, model = load_model(demo)[0], paged(demo, slots)
    lookahead = lookahead_of(model)
    assert lookahead is not None
    lookahead.probe.decide(False)  # it launches routers of its own
    for tokens in (1, 3, 13):
        metal.clear()
        expected = logits(whole, tokens, 2)
        launched = metal.names
        metal.clear()
        found = logits(model, tokens, 2)
        assert all(map(np.array_equal, found, expected)), tokens
        assert metal.names == launched
