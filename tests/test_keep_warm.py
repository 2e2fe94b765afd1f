"""Keeping the GPU warm while experts are read: tiny operations meanwhile, and the same text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.paging import keep_warm as warming
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.keep_warm import Tick, keep_warm
from outlier_mlx.engine.paging.paged import store_of
from outlier_mlx.engine.paging.reading import Chunk
from tests.program import run


def test_without_a_gpu_or_paging_it_does_nothing(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(demo, expert_memory=ExpertMemory(slots=9))
    store = store_of(model)
    assert store is not None and not keep_warm(model) and store.meanwhile is None
    monkeypatch.setattr(warming, "use_metal", lambda: True)
    assert not keep_warm(load_model(demo)[0])
    assert keep_warm(model) and isinstance(store.meanwhile, Tick)


def test_something_tiny_is_done_while_experts_are_read(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = mx.array([[5, 6, 7]])
    expected = np.array(load_model(demo)[0](tokens))
    monkeypatch.setattr(warming, "use_metal", lambda: True)
    ticks: list[float] = []
    tick = Tick.__call__

    def counted(self: Tick) -> None:
        ticks.append(time.monotonic())
        tick(self)

    monkeypatch.setattr(Tick, "__call__", counted)
    read = Chunk.read

    def slow(self: Chunk, scratch: Any) -> Any:
        time.sleep(0.01)
        return read(self, scratch)

    monkeypatch.setattr(Chunk, "read", slow)
    model, _ = load_model(demo, expert_memory=ExpertMemory(slots=9))
    assert np.array_equal(np.array(model(tokens)), expected) and not ticks
    assert keep_warm(model)
    store = store_of(model)
    assert store is not None
    store.shrink(8)
    assert np.array_equal(np.array(model(tokens)), expected)
    assert len(ticks) >= 3


def test_the_option_changes_no_text(demo: Path) -> None:
    command = ("generate", demo, "-p", "How do I find Vega?", "-m", 8, "--quiet")
    paged = run(*command, "--expert-memory", "50%", "--keep-warm")
    assert paged.out == run(*command).out and paged.err == ""
