"""Guessing the next MoE layer's experts, and deciding whether that pays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.lookahead import Lookahead, Probe, next_router
from outlier_mlx.engine.paging.paged import lookahead_of, statistics_of
from tests.metal import Metal

HIDDEN, EXPERTS = 64, 6


def decoder_layer(seed: int, norm: Any = None) -> nn.Module:
    """What `next_router` looks at, with random weights."""
    draw = np.random.default_rng(seed)
    layer, block = nn.Module(), nn.Module()
    layer.post_attention_layernorm = norm or nn.RMSNorm(HIDDEN, 1e-6)
    layer.post_attention_layernorm.weight = mx.array(draw.uniform(0.2, 3, HIDDEN).astype("f4"))
    block.switch_mlp, block.gate = nn.Module(), nn.Module()
    block.gate.weight = mx.array(draw.standard_normal((EXPERTS, HIDDEN)).astype("f4"))
    layer.mlp = block
    return layer


def test_next_router_gives_the_logits_of_the_next_layer_for_the_same_residual() -> None:
    below, above = decoder_layer(1), decoder_layer(2)
    residual = mx.array(np.random.default_rng(3).standard_normal((5, HIDDEN)).astype("f4"))
    router = next_router(below, above)
    assert router is not None
    got = np.array(router(below.post_attention_layernorm(residual)))
    normed = np.array(residual) / np.sqrt((np.array(residual) ** 2).mean(-1, keepdims=True) + 1e-6)
    weight = np.array(above.post_attention_layernorm.weight)
    expected = (normed * weight) @ np.array(above.mlp.gate.weight).T
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_where_the_norm_says_nothing_the_next_router_has_zeros() -> None:
    below, above = decoder_layer(1), decoder_layer(2)
    weight = np.array(below.post_attention_layernorm.weight)
    weight[[3, 7]] = 0, 1e-45
    below.post_attention_layernorm.weight = mx.array(weight)
    router = next_router(below, above)
    assert router is not None
    matrix = np.array(router.weight)
    assert not matrix[:, [3, 7]].any()
    assert np.isfinite(matrix).all()
    assert matrix[:, [0, 1, 2]].all()


class OtherNorm(nn.RMSNorm):
    """A norm that may compute anything."""


@pytest.mark.parametrize("odd", ["norm", "eps", "quantized", "missing"])
def test_no_guess_where_norms_or_routers_are_others(odd: str) -> None:
    below, above = decoder_layer(1), decoder_layer(2)
    if odd == "norm":
        above = decoder_layer(2, OtherNorm(HIDDEN, 1e-6))
    elif odd == "eps":
        above = decoder_layer(2, nn.RMSNorm(HIDDEN, 1e-5))
    elif odd == "quantized":
        above.mlp.gate = nn.QuantizedLinear(HIDDEN, EXPERTS, bias=False)
    else:
        del below.post_attention_layernorm
    assert next_router(below, above) is None


def run_passes(probe: Probe, seconds: Any, *, read: bool = True, count: int = 500) -> None:
    for number in range(count):
        if probe.decided:
            break
        probe.end_pass(seconds(probe.on, number), read=read)


@pytest.mark.parametrize(("early", "pays"), [(0.5, True), (1.0, False), (2.0, False)])
def test_reading_early_stays_on_only_where_passes_wait_less(early: float, pays: bool) -> None:
    probe = Probe()
    run_passes(probe, lambda on, number: (early if on else 1.0) + 0.01 * (number % 3))
    assert probe.decided
    assert probe.on == pays
    assert probe.waited is not None
    assert probe.waited == pytest.approx((1.01, early + 0.01), abs=0.01)
    before = probe.on
    run_passes(probe, lambda *_: 100.0)
    assert probe.on == before


def test_passes_that_read_nothing_decide_nothing() -> None:
    probe = Probe()
    run_passes(probe, lambda *_: 0.0, read=False)
    assert not probe.decided
    run_passes(probe, lambda on, _: 1.0 if on else 2.0)
    assert probe.decided
    assert probe.on


def test_the_first_pass_after_a_change_does_not_count() -> None:
    probe, last = Probe(), SimpleNamespace(on=None)

    def seconds(on: bool, _: int) -> float:
        changed, last.on = on != last.on, on
        return 1000.0 if changed else 1.0

    run_passes(probe, seconds)
    assert probe.waited == (1.0, 1.0)


# -- in a model -----------------------------------------------------------------------------------


def decoded(model: Any, tokens: int = 40) -> list[np.ndarray]:
    """Logits of some tokens, decoded one by one."""
    cache = make_prompt_cache(model)
    given = (mx.array([[7 * number % 200 + 5]]) for number in range(tokens))
    return [np.array(model(x, cache=cache)) for x in given]


def paged(tier: Path, slots: int) -> tuple[Any, Lookahead]:
    model = load_model(tier, expert_memory=ExpertMemory(slots=slots))[0]
    lookahead = lookahead_of(model)
    assert lookahead is not None
    return model, lookahead


@pytest.mark.slow
def test_reading_early_changes_no_bit(demo: Path) -> None:
    expected = decoded(load_model(demo)[0])
    for slots in (6, 8, 12):
        model, lookahead = paged(demo, slots)
        lookahead.probe.decide(True)
        assert all(map(np.array_equal, decoded(model), expected))
        statistics = statistics_of(model)
        assert statistics is not None
        assert statistics.early > 0
        # Layers above the first MoE layer need two experts for each token.
        assert 0 < statistics.guessed <= 40 * 2 * 2
        assert statistics.recall is not None
        assert statistics.recall > 2 / 6  # of guesses at random
        assert f"look-ahead foresaw {statistics.recall:.0%}, and pays, and stays on" in str(
            statistics
        )


def test_reading_early_costs_a_launch_a_layer_and_changes_no_bit_on_a_gpu(
    demo: Path, metal: Metal
) -> None:
    expected = decoded(load_model(demo)[0], 6)
    metal.clear()
    model, lookahead = paged(demo, 6)
    for on, routed in (False, 3), (True, 5):  # of three MoE layers, two have a next one
        lookahead.probe.decide(on)
        metal.clear()
        assert all(map(np.array_equal, decoded(model, 6), expected))
        assert metal.names.count("tq1_0_route") == 6 * routed


def test_the_probe_decides_while_a_model_decodes(demo: Path) -> None:
    model, lookahead = paged(demo, 6)
    assert lookahead.possible
    decoded(model, 120)
    assert lookahead.probe.decided
    assert lookahead.probe.waited is not None
    assert min(lookahead.probe.waited) > 0
    statistics = statistics_of(model)
    assert statistics is not None
    assert statistics.recall is not None
    assert statistics.reads_early == lookahead.probe.on
    assert statistics.as_json()["reads_early"] == lookahead.probe.on


@pytest.mark.slow
def test_a_prompt_is_no_pass_of_the_probe(demo: Path) -> None:
    model, lookahead = paged(demo, 9)
    prompt = mx.array([[7 * number % 200 + 5 for number in range(40)]])
    for _ in range(10):
        mx.eval(model(prompt))
    assert lookahead.probe.waited is None  # of passes that decode
    statistics = statistics_of(model)
    assert statistics is not None
    assert statistics.recall is statistics.reads_early is None
    assert statistics.early > 0
    assert "look-ahead" not in str(statistics)
