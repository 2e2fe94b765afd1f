"""Recording which experts serve the tokens of a running tier, and where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.engine.experts import ExpertRecorder, RoutedExperts, moe_blocks, routed_experts
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.paged import skip_experts, statistics_of, store_of
from outlier_mlx.measure.expert_recorder import recording, trace_about
from outlier_mlx.storage.hub import Source
from tests.library import Library


def loaded(tier: Path, slots: int | None = None) -> Any:
    memory = None if slots is None else ExpertMemory(slots=slots)
    return outlier_mlx.load(tier, expert_memory=memory)[0]


def tokens(batch: int, length: int, first: int = 3) -> mx.array:
    return (mx.arange(batch * length) * 7 % 211 + first).reshape(batch, length)


@pytest.mark.parametrize("slots", [None, 7])
def test_what_the_routers_chose(demo: Path, slots: int | None) -> None:
    """As `routing --trace` records it, which asks each router again."""
    x = tokens(2, 5)
    model = loaded(demo)
    with recording(model) as other:
        expected = model(x)
    model = loaded(demo, slots)
    recorder = ExpertRecorder(model)
    recorder.start()
    assert mx.array_equal(model(x), expected), "recording changed what is computed"
    assert recorder.latest is not None
    found = [recorder.latest.served(row, n) for row in range(2) for n in range(5)]
    trace = other.trace(trace_about(Source(demo, "demo"), model, "x", 1))
    assert np.array_equal([[[e for e, _, _ in uses] for uses in t] for t in found], trace.experts)
    weights = [[[weight for _, weight, _ in uses] for uses in t] for t in found]
    assert np.allclose(weights, trace.weights, rtol=1e-3, atol=1e-7)


def test_a_whole_model_has_all_in_memory(demo: Path) -> None:
    model = loaded(demo)
    assert routed_experts(model) == RoutedExperts((1, 2, 3), 6, 2, paged=False)
    recorder = ExpertRecorder(model)
    recorder.start()
    model(tokens(1, 4))
    assert recorder.latest is not None
    places = {place for uses in recorder.latest.served(0) for _, _, place in uses}
    assert places == {"memory"}


def test_where_paged_experts_were(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store read is what was read from disk; the rest was in slots."""
    model = loaded(demo, 7)
    store = store_of(model)
    read: list[tuple[int, int, bool]] = []
    assert store is not None
    experts = routed_experts(model)
    assert experts is not None and experts.paged
    start = store._files.start

    def started(layer: int, expert: int, *given: Any, early: bool = False) -> Any:
        read.append((layer, expert, early))
        return start(layer, expert, *given, early=early)

    monkeypatch.setattr(store._files, "start", started)
    recorder = ExpertRecorder(model)
    recorder.start()
    early: set[tuple[int, int]] = set()
    for n in range(40):
        read.clear()
        before = statistics_of(model).misses  # type: ignore[union-attr]
        mx.eval(model(tokens(1, 1, first=3 + 5 * n)))
        assert recorder.latest is not None
        served = recorder.latest.served(0)
        uses = [
            (layer, expert, place)
            for layer, of_layer in zip(experts.layers, served, strict=True)
            for expert, _, place in of_layer
        ]
        missed = {(layer, expert) for layer, expert, place in uses if place == "disk"}
        assert missed == {(layer, expert) for layer, expert, early in read if not early}
        assert len(missed) == statistics_of(model).misses - before  # type: ignore[union-attr]
        early |= {(layer, expert) for layer, expert, early in read if early}
        assert {use[:2] for use in uses if use[2] == "early"} <= early
    recorder.stop()
    assert store.watch is None and recorder.latest is None


def test_experts_that_are_left_out(demo: Path) -> None:
    model = loaded(demo, 6)
    skip_experts(model, 0.6)
    recorder = ExpertRecorder(model)
    recorder.start()
    found: set[str] = set()
    for n in range(20):
        before = statistics_of(model).skipped  # type: ignore[union-attr]
        mx.eval(model(tokens(1, 1, first=3 + 5 * n)))
        assert recorder.latest is not None
        places = [place for uses in recorder.latest.served(0) for _, _, place in uses]
        assert places.count("skipped") == statistics_of(model).skipped - before  # type: ignore[union-attr]
        found |= set(places)
    assert {"skipped", "memory", "disk"} <= found


@pytest.mark.parametrize("slots", [None, 7])
def test_experts_that_are_not_needed(demo: Path, slots: int | None) -> None:
    model = loaded(demo, slots)
    for block in moe_blocks(model).values():
        block.alpha = mx.zeros(6)
    recorder = ExpertRecorder(model)
    recorder.start()
    model(tokens(1, 3))
    assert recorder.latest is not None
    assert {place for uses in recorder.latest.served(0) for _, _, place in uses} == {"unused"}


def test_only_the_latest_pass_is_kept(demo: Path) -> None:
    model = loaded(demo)
    recorder = ExpertRecorder(model)
    recorder.start()
    recorder.start()
    model(tokens(1, 9))
    first = recorder.latest
    model(tokens(3, 1))
    assert recorder.latest is not None and recorder.latest is not first
    assert len(recorder.latest.served(2)) == 3
    blocks = [type(layer.mlp) for layer in model.layers]
    recorder.stop()
    assert blocks != [type(layer.mlp) for layer in model.layers], "they are watched no longer"
    model(tokens(1, 1))
    assert recorder.latest is None


def test_other_models_have_none(library: Library) -> None:
    model = loaded(library.base().path)
    assert routed_experts(model) is None
    recorder = ExpertRecorder(model)
    recorder.start()
    model(tokens(1, 2))
    assert recorder.latest is None
