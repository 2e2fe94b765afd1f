"""MLX's limits follow the plan: its cache, its memory limit, and what mlx-lm wires. No GPU here."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.generate  # noqa: F401
import pytest

from outlier_mlx.engine import machine
from outlier_mlx.engine.buffers import MAX_MB
from outlier_mlx.engine.limits import keep_to
from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.machine import UNLIMITED, Budget
from outlier_mlx.engine.needs import Use
from outlier_mlx.engine.plan import Plan, plan
from tests.plain_models import SIZES, make_model, write_model

LIMIT = 12 << 30
MODULE = sys.modules["mlx_lm.generate"]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """What MLX is told, on a Mac that gives the GPU 12 GiB."""
    told: dict[str, list[int]] = {}

    def fake(name: str) -> Any:
        def tell(nbytes: int) -> int:
            told.setdefault(name, []).append(nbytes)
            return LIMIT

        return tell

    for name in ("set_cache_limit", "set_memory_limit", "set_wired_limit"):
        monkeypatch.setattr(mx, name, fake(name))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    recommended = {"max_recommended_working_set_size": LIMIT}
    monkeypatch.setattr(mx, "device_info", lambda: recommended)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)
    monkeypatch.delenv(MAX_MB, raising=False)
    for name in ("mlx_lm.utils", "mlx_lm.generate"):
        wiring = "maybe_set_recommended_wired_limit"
        monkeypatch.setattr(sys.modules[name], wiring, getattr(sys.modules[name], wiring))
    return told


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    folder = write_model(tmp_path / "model", SIZES | {"model_type": "llama"})
    return plan(folder, Use(100), available=Budget(LIMIT, "this Mac's GPU"))


def test_mlx_lm_wires_what_is_planned(planned: Plan, limits: dict[str, list[int]]) -> None:
    keep_to(planned)
    model = make_model(SIZES | {"model_type": "llama"})
    with MODULE.wired_limit(model):
        assert limits["set_wired_limit"] == [planned.needed]
    assert limits["set_wired_limit"] == [planned.needed, LIMIT]
    keep_to(replace(planned, weights=replace(planned.weights, nbytes=2 * LIMIT)))
    with MODULE.wired_limit(model):
        assert limits["set_wired_limit"][-1] == LIMIT


def test_loading_any_model_keeps_to_its_plan(
    tmp_path: Path, limits: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free", lambda: None)
    folder = write_model(tmp_path / "plain", SIZES | {"model_type": "llama"})
    model, _ = load_model(folder)
    planned = plan(folder, available=Budget(LIMIT, "this Mac's GPU"))
    with MODULE.wired_limit(model):
        assert limits["set_wired_limit"] == [planned.needed]
    assert limits["set_cache_limit"][0] < LIMIT


def test_a_second_model_leaves_the_first_one_wired(
    planned: Plan, limits: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "get_active_memory", lambda: 12345)
    keep_to(planned)
    with MODULE.wired_limit(make_model(SIZES | {"model_type": "llama"})):
        assert limits["set_wired_limit"] == [planned.needed + 12345]


def test_mlx_keeps_what_the_plan_leaves(planned: Plan, limits: dict[str, list[int]]) -> None:
    keep_to(planned)
    rest = LIMIT - LIMIT // 32 - planned.needed + planned.mlx_cache.nbytes
    assert limits["set_cache_limit"] == [rest] and "set_memory_limit" not in limits
    for tight in (replace(planned, slots=10), replace(planned, available=Budget(UNLIMITED, "x"))):
        keep_to(tight)
        assert limits["set_cache_limit"][-1] == planned.mlx_cache.nbytes
    # What is loaded as a whole has the usual limit again.
    assert limits["set_memory_limit"] == [planned.needed, LIMIT]


def test_on_a_cpu_nothing_is_set(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "set_cache_limit", None)
    monkeypatch.setattr(mx, "set_wired_limit", None)
    before = MODULE.maybe_set_recommended_wired_limit
    keep_to(planned)
    assert MODULE.maybe_set_recommended_wired_limit is before
