"""Routing: the kernels in the emulator, and plain MLX, against the reference in NumPy."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import qwen2_moe
from mlx_lm.tuner.lora import LoRALinear

from outlier_mlx.runtime import routing
from outlier_mlx.runtime.affine2 import EXPERT_FORMAT_VERSION, ROWS
from outlier_mlx.runtime.mixtral import TernaryMixtralArgs, TernaryMixtralBlock
from outlier_mlx.runtime.qwen2_moe import RenormalisedMoE
from outlier_mlx.runtime.routing import Router, route, top_experts, tq1_0_logits, tq1_0_route
from tests import reference
from tests.engine import as_array, swiglu_experts
from tests.kernel_cases import random_x
from tests.marks import slow_but
from tests.metal import Metal, any_metal
from tests.reference import Array

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Ties of all kinds: both zeros, the smallest subnormals, neighbours, infinities, NaN.
ABOVE_HALF = np.nextafter(np.float32(0.5), 1)
VALUES = np.array(
    [0, -0.0, 1e-45, -1e-45, 0.5, ABOVE_HALF, -3, 88, 1e30, -1e30, np.inf, -np.inf, np.nan],
    np.float32,
)


def tied_logits(seed: int, tokens: int, experts: int) -> Array:
    """Rows with many ties, some of them all one value; others of random numbers."""
    rng = np.random.default_rng([seed, tokens, experts])
    few = rng.choice(VALUES, (tokens, experts))
    few[::5] = few[::5, :1]
    logits = np.where(rng.random((tokens, 1)) < 0.7, few, rng.standard_normal((tokens, experts)))
    return logits.astype(np.float32)


def assert_routed(
    found: tuple[mx.array, mx.array], logits: Array, k: int, alpha: Array | None = None
) -> None:
    """Exactly the experts of the reference, and their weights."""
    with np.errstate(invalid="ignore"):
        expected = reference.route(logits.astype(np.float64), k)
    indices, weights = found
    assert indices.dtype == mx.uint32 and weights.dtype == mx.float32
    np.testing.assert_array_equal(indices, expected.indices)
    factors = 1 if alpha is None else alpha[expected.indices]
    np.testing.assert_allclose(weights, expected.weights * factors, rtol=2e-6, atol=1e-7)


# Which experts


@settings(max_examples=100, deadline=None)
@given(experts=st.integers(1, 130), data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_the_order_in_plain_mlx(experts: int, data: st.DataObject, seed: int):
    """Largest first, ties to the lower number, NaN last: as a stable sort has it."""
    logits = tied_logits(seed, 7, experts)
    k = data.draw(st.integers(1, experts))
    assert_routed(route(mx.array(logits), lambda x: x, k), logits, k)


@pytest.mark.parametrize("experts", slow_but([1, 8, 33, 64], [1, 2, 3, 8, 31, 32, 33, 60, 64]))
def test_the_order_in_the_kernel(experts: int, metal: Metal):
    logits = tied_logits(0, 61, experts)
    for k in range(1, 9) if experts == 8 else {1, min(2, experts), experts // 2 or 1, experts}:
        metal.clear()
        assert_routed(tq1_0_route(mx.array(logits), k=k), logits, k)
        assert metal.names == ["tq1_0_route"]


@pytest.mark.slow
@pytest.mark.parametrize("experts", range(1, 65))
def test_every_number_of_experts(experts: int, metal: Metal):
    """One and two of them are chosen above, and in models."""
    for k in {-(-experts // 3), experts}:
        logits = tied_logits(k, 41, experts)
        assert_routed(tq1_0_route(mx.array(logits), k=k), logits, k)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 20), size=st.floats(1e-30, 1e30))
def test_random_logits(seed: int, tokens: int, size: float):
    """The kernel is built once for one token, and once for several."""
    rng = np.random.default_rng(seed)
    logits = (size * rng.standard_normal((tokens, 40))).astype(np.float32)
    logits[rng.random(logits.shape) < 0.2] = rng.choice(VALUES)
    with any_metal():
        assert_routed(tq1_0_route(mx.array(logits), k=6), logits, 6)


@pytest.mark.parametrize("experts", [3, 8, 64, 70])
def test_not_renormalised(experts: int, metal: Metal):
    """Weights are then softmax over all experts; a NaN anywhere shows in all of them."""
    logits = tied_logits(3, 30, experts)
    with np.errstate(invalid="ignore"):
        expected = reference.route(logits.astype(np.float64), 2)
        chosen = np.take_along_axis(expected.probs, expected.indices, axis=-1)
    for training in (False, True):
        given = mx.array(logits)
        indices, weights = route(given, lambda x: x, 2, renormalise=False, training=training)
        np.testing.assert_array_equal(indices, expected.indices)
        np.testing.assert_allclose(weights, chosen, rtol=2e-6, atol=1e-7)
    assert np.isnan(chosen).any() and (~np.isnan(chosen)).any()
    assert metal.names == ["tq1_0_route"] * (experts <= 64)


# Logits


def case(
    tokens: int, hidden: int, experts: int, x: str = "float32", router: str = "float32"
) -> tuple[mx.array, mx.array, Array]:
    """x, a router, and the logits in float64."""
    given = random_x(1, (tokens, hidden), DTYPES[x])
    matrix = random_x(2, (experts, hidden), DTYPES[router])
    exact = as_array(given).astype(np.float64) @ as_array(matrix).astype(np.float64).T
    return given, matrix, exact


@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("router", slow_but(["float16"], DTYPES))
def test_dtypes(x: str, router: str, metal: Metal):
    given, matrix, logits = case(5, 96, 9, x, router)
    alpha = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    assert_routed(tq1_0_route(given, matrix, k=3), logits, 3)
    assert_routed(tq1_0_route(given, matrix, mx.array(alpha), k=3), logits, 3, alpha)
    np.testing.assert_allclose(tq1_0_logits(given, matrix), logits, rtol=1e-5, atol=1e-5)


# Widths that no vector divides, arrays so small that MLX puts them elsewhere, groups of experts
# that are not full, more columns than lanes.
SIZES = [
    (1, 1, 1),
    (1, 3, 2),
    (2, 1, 3),
    (1, 4, 1),
    (1, 8, 1),
    (3, 7, 5),
    (1, 130, 64),
    (4, 100, 7),
]
SIZES += [(6, 64, 33), (1, 1000, 6), (9, 512, 8), (2, 132, 60), (5, 66, 17)]


@pytest.mark.parametrize("sizes", slow_but(SIZES[::3], SIZES), ids=str)
def test_sizes(sizes: tuple[int, int, int], metal: Metal):
    given, matrix, logits = case(*sizes)
    k = -(-sizes[2] // 2)
    alpha = np.linspace(-1, 2, sizes[2]).astype(np.float32)
    assert_routed(tq1_0_route(given, matrix, mx.array(alpha), k=k), logits, k, alpha)
    np.testing.assert_allclose(tq1_0_logits(given, matrix), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [8, 64])
def test_a_14b_router(experts: int, metal: Metal):
    """One launch for 8 experts. 64 are too many for one threadgroup, so two."""
    given, matrix, logits = case(1, 5120, experts, "float16")
    assert_routed(tq1_0_route(given, matrix, k=2), logits, 2)
    assert metal.names == ["tq1_0_logits"] * (experts == 64) + ["tq1_0_route"]


@pytest.mark.parametrize("shared", [True, False])
def test_equal_rows_are_ties(shared: bool, metal: Metal, monkeypatch: pytest.MonkeyPatch):
    """Whichever simdgroup has a row, and with whichever others."""
    monkeypatch.setattr(routing, "LARGEST_SHARED", 1 << 18 if shared else 0)
    for experts in (7, 64):
        rows = np.random.default_rng(experts).standard_normal((3, 260)).astype(np.float32)
        numbers = np.random.default_rng(1).integers(0, 3, experts)
        x = random_x(0, (6, 260), mx.bfloat16)
        found = tq1_0_route(x, mx.array(rows[numbers]), k=experts)[0]
        logits = (as_array(x).astype(np.float64) @ rows.astype(np.float64).T)[:, numbers]
        np.testing.assert_array_equal(found, np.argsort(-logits, axis=-1, kind="stable"))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("experts", [5, 64])
def test_a_token_by_itself_has_the_same_bits(
    experts: int, shared: bool, metal: Metal, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(routing, "LARGEST_SHARED", 1 << 18 if shared else 0)
    x, router, _ = case(11, 300, experts, "bfloat16")
    logits = [tq1_0_logits(x, router), tq1_0_logits(x[:2], router)]
    np.testing.assert_array_equal(logits[0][:2], logits[1])
    indices, weights = tq1_0_route(x, router, k=3)
    for some in (slice(0, 1), slice(10, 11), slice(3, 5), slice(2, 9)):
        found = tq1_0_route(x[some], router, k=3)
        np.testing.assert_array_equal(found[0], indices[some])
        np.testing.assert_array_equal(found[1], weights[some])


@pytest.mark.parametrize("where", ["x", "router"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(where: str, value: float, metal: Metal):
    """Every index exists, and none is chosen twice."""
    x, router, _ = case(3, 64, 6)
    (x if where == "x" else router)[1, 5] = value
    indices, weights = tq1_0_route(x, router, k=4)
    chosen = np.array(indices)
    assert chosen.max() < 6 and all(len(set(row)) == 4 for row in chosen.tolist())
    if where == "x":
        assert np.isnan(np.array(weights)[1]).all() and np.isfinite(np.array(weights)[[0, 2]]).all()


# The choice of a path, gradients


def plain_linear(experts: int, hidden: int, dtype: mx.Dtype = mx.float32) -> nn.Linear:
    gate = nn.Linear(hidden, experts, bias=False)
    gate.weight = random_x(4, (experts, hidden), dtype)
    return gate


@pytest.mark.parametrize("kind", ["router", "linear", "half", "quantized", "adapted", "biased"])
def test_gates(kind: str, metal: Metal):
    """A matrix is read by the kernel; another gate computes the logits itself."""
    gate: Any = plain_linear(6, 64, mx.bfloat16 if kind == "half" else mx.float32)
    if kind == "router":
        weight, gate = gate.weight, Router(64, 6)
        gate.weight = weight
    elif kind == "quantized":
        gate = gate.to_quantized(group_size=32, bits=8)
    elif kind == "adapted":
        gate = LoRALinear.from_base(gate, r=2)
        gate.lora_b = mx.ones(gate.lora_b.shape)
    elif kind == "biased":
        gate.bias = mx.arange(6, dtype=mx.float32)
    x = random_x(5, (2, 3, 64), mx.float32)
    indices, weights = route(x, gate, 2)
    assert metal.names == ["tq1_0_route"] and indices.shape == weights.shape == (2, 3, 2)
    read = {"router", "linear", "half"}
    inputs = getattr(metal.launches[0], "inputs", None)
    assert inputs is None or inputs["x"][0] == ((6, 64) if kind in read else (6, 6))
    flat = as_array(gate(x).astype(mx.float32)).reshape(6, 6)
    if kind == "half":
        assert gate(x.astype(mx.bfloat16)).dtype == mx.bfloat16  # the kernel's are float32 sums
        flat = as_array(x).reshape(6, 64) @ as_array(gate.weight).T
    assert_routed((indices.reshape(6, 2), weights.reshape(6, 2)), flat, 2)
    metal.clear()
    trained = route(x, gate, 2, training=True)
    assert metal.names == []
    np.testing.assert_array_equal(trained[0], indices)
    np.testing.assert_allclose(trained[1], weights, rtol=1e-5)


def test_more_experts_of_a_token_than_there_are(metal: Metal):
    x, gate = random_x(6, (4, 32), mx.float32), plain_linear(3, 32)
    for training in (False, True):
        assert route(x, gate, 5, training=training)[0].shape == (4, 3)


def test_what_the_kernel_does_not_take(metal: Metal):
    """More than 64 experts, and no tokens at all: plain MLX."""
    gate = plain_linear(65, 32)
    x = random_x(6, (4, 32), mx.float32)
    found = route(x, gate, 3)
    assert_routed(found, as_array(gate(x)), 3)
    empty = route(x[:0], plain_linear(6, 32), 3)
    assert empty[0].shape == empty[1].shape == (0, 3)
    assert metal.names == []
    assert [a.shape for a in tq1_0_route(x[:0], gate.weight[:8], k=2)] == [(0, 2)] * 2
    assert tq1_0_logits(x[:0], gate.weight).shape == (0, 65)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_gradients_are_those_of_plain_mlx(
    renormalise: bool, alpha: bool, quantized: bool, metal: Metal
):
    gate: Any = plain_linear(6, 64)
    fixed = gate.to_quantized(group_size=32, bits=8)
    against = random_x(7, (5, 3), mx.float32)

    def loss(x: mx.array, weight: mx.array, factors: mx.array, training: bool) -> mx.array:
        gate.weight = weight
        options = {"renormalise": renormalise, "training": training}
        used = fixed if quantized else gate
        weights = route(x, used, 3, factors if alpha else None, **options)[1]
        return (weights * against).sum()

    point = random_x(8, (5, 64), mx.float16), gate.weight, random_x(9, (6,), mx.float32)
    found, expected = (
        mx.grad(loss, argnums=(0, 1, 2))(*point, training) for training in (False, True)
    )
    assert metal.names == ["tq1_0_route"]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=2e-3 if one.dtype == mx.float16 else 1e-5)
    moved = [bool(mx.any(g != 0)) for g in found]
    assert moved == [True, not quantized, alpha]


# What is refused

X, ROUTER = mx.zeros((2, 20)), mx.zeros((9, 20))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "x-dtype": ({"x": mx.zeros((2, 20), mx.int32)}, "x is (2, 20) int32"),
    "x-shape": ({"x": mx.zeros((20,))}, "x is (20,) float32"),
    "width": ({"router": mx.zeros((9, 21))}, "router is (9, 21) float32; expected (experts, 20)"),
    "router-dtype": ({"router": mx.zeros((9, 20), mx.uint32)}, "router is (9, 20) uint32"),
    "too-wide": ({"x": mx.zeros((1, 131073)), "router": None}, "131073 in features; supported"),
    "no-k": ({"k": 0}, "0 of 9 experts; supported: 1 to all, of at most 64"),
    "k": ({"k": 10}, "10 of 9 experts"),
    "experts": ({"router": mx.zeros((65, 20))}, "2 of 65 experts"),
    "alpha-shape": ({"alpha": mx.ones((8,))}, "alpha is (8,) float32; expected (9,) float32"),
    "alpha-dtype": ({"alpha": mx.ones((9,), mx.float16)}, "alpha is (9,) float16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_a_launch(name: str, metal: Metal):
    changes, reason = REFUSED[name]
    call: Any = tq1_0_route
    with pytest.raises(ValueError) as caught:
        call(**{"x": X, "router": ROUTER, "k": 2} | changes)
    assert str(caught.value).startswith(f"tq1_0_route: {reason}") and "\n" not in str(caught.value)
    assert metal.launches == []


# The layers of other models


def mixtral_block() -> TernaryMixtralBlock:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    sizes |= {"num_local_experts": 5, "num_experts_per_tok": 2}
    switch = {"format": ROWS, "version": EXPERT_FORMAT_VERSION, "layers": [0]}
    args = TernaryMixtralArgs(model_type="ternary_mixtral", ternary_switch=switch, **sizes)
    block = TernaryMixtralBlock(args)
    glu: Any = swiglu_experts(64, 96, 5)
    block.switch_mlp = glu
    return block


def qwen2_moe_block() -> RenormalisedMoE:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 96}
    sizes |= {"num_attention_heads": 4, "num_experts_per_tok": 2, "num_experts": 5}
    sizes |= {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 64}
    args: dict[str, Any] = {"model_type": "qwen2_moe", "rms_norm_eps": 1e-6, "vocab_size": 10}
    return RenormalisedMoE(qwen2_moe.ModelArgs(**args, **sizes))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("make", [mixtral_block, qwen2_moe_block])
def test_mixtral_and_qwen2_moe(make: Any, quantized: bool, metal: Metal):
    block = make()
    if quantized:
        block.gate = block.gate.to_quantized(group_size=64, bits=8)
    x = random_x(10, (1, 3, 64), mx.float32)
    block.eval()
    y = block(x)
    assert metal.names[0] == "tq1_0_route" and metal.names.count("tq1_0_route") == 1
    metal.clear()
    block.train()
    np.testing.assert_allclose(y, block(x), rtol=1e-5, atol=1e-5)
    assert metal.names == []


def test_more_experts_than_the_kernel_has_in_order():
    """The function that plain MLX uses has no such limit."""
    logits = np.tile(np.array([1, 2, 2], np.float32), 400)[None]
    assert top_experts(mx.array(logits), 3).tolist() == [[1, 2, 4]]
