"""The MoE block: which experts it chooses, what it adds up, and in which dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.qwen2 import MLP

from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.runtime.routing import top_experts
from tests import reference
from tests.engine import as_array, load, recording, rows_to_dense, swiglu_experts
from tests.library import Library

# Ties of all kinds: zeros, the smallest subnormal, neighbours, and what a sure router gives.
VALUES = np.array([0, 1e-45, 1e-39, 0.125, np.nextafter(np.float32(0.125), 1), 0.25, 1], np.float32)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), experts=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_top_experts(data: st.DataObject, experts: int, seed: int):
    """Largest first, ties to the lower number, for every k: as a stable sort has it."""
    rng = np.random.default_rng(seed)
    few = rng.choice(VALUES, (4, experts))
    probs = np.where(
        rng.random((4, experts)) < data.draw(st.floats(0, 1)), few, rng.random(experts)
    )
    probs = probs.astype(np.float32)
    k = data.draw(st.integers(1, experts))
    chosen = top_experts(mx.array(probs), k)
    assert chosen.dtype == mx.uint32
    np.testing.assert_array_equal(chosen, np.argsort(-probs, axis=-1, kind="stable")[:, :k])


def moe_block(experts: int = 5, top_k: int = 2, hidden: int = 64) -> OutlierMoE:
    """A block with random weights of every kind."""
    mx.random.seed(experts)
    block = OutlierMoE(MLP(hidden, 96), hidden, 64, experts, top_k, "tq1_0_strided")
    block.switch_mlp = swiglu_experts(hidden, 64, experts)
    block.gate.weight = mx.random.normal((experts, hidden)) / hidden**0.5
    block.alpha = mx.random.normal((experts,))
    return block


def test_equal_probabilities_choose_the_first_experts():
    block = moe_block(experts=9, top_k=3)
    block.gate.weight = mx.zeros((9, 64))
    indices, weights = block.route(mx.random.normal((2, 4, 64)))
    np.testing.assert_array_equal(indices, np.broadcast_to([0, 1, 2], (2, 4, 3)))
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4, 1e19])
def test_routing_stays_finite(size: float):
    """Certain routers leave probabilities of exactly 0 and 1: no NaN, and the weights sum to 1."""
    block = moe_block(experts=8, top_k=4)
    indices, weights = block.route(mx.random.normal((1, 50, 64)) * size)
    assert np.isfinite(np.array(weights)).all()
    np.testing.assert_allclose(np.array(weights).sum(-1), 1, rtol=1e-6)
    assert (np.diff(np.array(weights), axis=-1) <= 0).all()
    assert all(len(set(row)) == 4 for row in np.array(indices)[0].tolist())


def test_more_experts_a_token_than_there_are():
    assert moe_block(experts=2, top_k=5).top_k == 2


def test_the_block_is_the_formula():
    block = moe_block(experts=4, top_k=3)
    mx.eval(block.parameters())
    x = mx.random.normal((1, 30, 64))
    parts: dict[str, list[reference.Ternary]] = {}
    for name in ("gate", "up", "down"):
        layer = getattr(block.switch_mlp, f"{name}_proj")
        trits = np.array(rows_to_dense(layer.weight, mx.ones_like(layer.scales), layer.input_dims))
        parts[name] = [
            reference.Ternary(trits[e], np.array(layer.scales)[e][:, None]) for e in range(4)
        ]
    experts = reference.Experts(np.array(block.gate.weight), np.array(block.alpha), **parts)
    h = np.array(x[0], np.float64)
    logits = h @ experts.router.T
    shared = [np.array(getattr(block.shared_expert, f"{p}_proj").weight) for p in parts]
    exact = reference.swiglu(h, *shared)
    exact = exact + reference.routed(experts, h, reference.route(logits, 3))
    np.testing.assert_allclose(block(x)[0], exact, atol=2e-5, rtol=1e-5)


# Dtypes


@pytest.fixture(scope="module")
def tier(library: Library) -> Path:
    """A bfloat16 tier of 4-bit weights."""
    return library.tier(tier="q4", dtype="bfloat16")


PROMPT = list(range(40))


def residual_dtypes(model: Any, tokens: list[int]) -> set[mx.Dtype]:
    hidden: list[mx.array] = []
    with recording(hidden, []):
        logits = model(mx.array([tokens]))
    return {logits.dtype, *(x.dtype for x in hidden)}


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="about the CPU's default")
def test_on_the_cpu_a_bfloat16_tier_runs_in_float32(tier: Path):
    model = load(tier)
    assert residual_dtypes(model, PROMPT) == {mx.float32}
    assert model.model.norm.weight.dtype == mx.float32


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_activations_keep_the_dtype_asked_for(tier: Path, name: str):
    model, exact = load(tier, name), load(tier, "float32")
    wanted = getattr(mx, name)
    for tokens in (PROMPT, PROMPT[:1]):
        assert residual_dtypes(model, tokens) == {wanted}
    layer = model.layers[1].mlp
    assert layer.shared_expert.gate_proj.scales.dtype == wanted
    assert layer.gate.weight.dtype == layer.alpha.dtype == mx.float32
    for name in ("gate", "up", "down"):
        assert getattr(layer.switch_mlp, f"{name}_proj").scales.dtype == mx.float32
        assert getattr(layer.switch_mlp, f"{name}_proj").weight.dtype == mx.uint8
    probs = layer.gate(mx.ones((1, 1, 64), wanted))
    assert probs.dtype == mx.float32
    a, b = (as_array(m(mx.array([PROMPT]))) for m in (model, exact))
    assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)


def test_routing_is_as_exact_for_half_activations():
    block = moe_block()
    for dtype in (mx.bfloat16, mx.float16):
        x = mx.random.normal((1, 12, 64)).astype(dtype)
        np.testing.assert_array_equal(block.gate(x), block.gate(x.astype(mx.float32)))


def test_the_routed_path_is_rounded_once():
    """Shared and routed path are added in float32: one rounding, not one each and one for all."""
    block = moe_block()
    block.shared_expert.set_dtype(mx.bfloat16)
    x = mx.random.normal((1, 12, 64)).astype(mx.bfloat16)
    indices, weights = block.route(x)
    weights = weights * block.alpha[indices]
    routed = (block.switch_mlp(x.astype(mx.float32), indices) * weights[..., None]).sum(-2)
    once = (block.shared_expert(x).astype(mx.float32) + routed).astype(mx.bfloat16)
    np.testing.assert_array_equal(as_array(block(x)), as_array(once))
    assert not np.array_equal(
        as_array(once), as_array(block.shared_expert(x) + routed.astype(mx.bfloat16))
    )
