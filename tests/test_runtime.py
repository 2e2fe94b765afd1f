"""The routed path in pieces: transcoding of ternary rows, expert layers, routing, dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx.runtime import switch
from outlier_mlx.runtime.affine2 import (
    affine_group,
    byte_digits,
    padded_width,
    row_bytes,
    rows_to_affine2,
    rows_to_dense,
)
from outlier_mlx.runtime.moe import OutlierMoE, top_experts
from outlier_mlx.runtime.switch import TernarySwitchGLU, TernarySwitchLinear
from tests import builders, reference
from tests.engine import as_array, load, pack_rows, recording, tier_of
from tests.goldens import require_shared
from tests.reference import Array
from tests.tensor_file import read_arrays

# The n-th digit of a byte, as a fraction of 256 in base 3, and the bytes that a packer writes.
DIGITS = np.arange(256)[:, None] * 3 ** np.arange(1, 6) // 256 % 3
MEANT = np.array([(256 * q + 242) // 243 for q in range(243)])


def random_experts(shape: tuple[int, ...], seed: int = 0) -> tuple[Array, Array]:
    """Trits (..., out, in) and scales (..., out)."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.standard_normal(shape[:-1])).astype(np.float32)
    return rng.integers(-1, 2, shape, dtype=np.int8), scales


def dequantized(rows: Array, scales: Array, width: int) -> Array:
    """What MLX itself reads from the transcoded rows, (..., width)."""
    weight, scale, bias = rows_to_affine2(mx.array(rows), mx.array(scales), width)
    assert weight.dtype == mx.uint32 and weight.shape[-1] * 16 == padded_width(width)
    group = affine_group(width)
    return np.array(mx.dequantize(weight, scale, bias, group, 2))[..., :width]


# Transcoding


def test_every_byte():
    table = read_arrays(require_shared() / "goldens/codec/gguf_tq1_0_byte_table.safetensors")
    trits, canonical = table["digits"], table["canonical"].astype(bool)
    assert [byte_digits(b) for b in range(256)] == (trits + 1).tolist() == DIGITS.tolist()
    np.testing.assert_array_equal(np.flatnonzero(canonical), MEANT)
    rows, ones = np.arange(256, dtype=np.uint8)[:, None], np.ones(256, np.float32)
    np.testing.assert_array_equal(dequantized(rows, ones, 5), trits)
    np.testing.assert_array_equal(rows_to_dense(mx.array(rows), mx.array(ones), 5), trits)


def test_every_byte_that_a_packer_writes():
    digits = np.stack(np.meshgrid(*[[-1, 0, 1]] * 5, indexing="ij"), -1).reshape(-1, 5)
    rows = pack_rows(digits)
    np.testing.assert_array_equal(rows[:, 0], MEANT)
    ones = np.ones(243, np.float32)
    np.testing.assert_array_equal(dequantized(rows, ones, 5), digits)
    np.testing.assert_array_equal(rows_to_dense(mx.array(rows), mx.array(ones), 5), digits)


@pytest.mark.parametrize("start", range(1, 201, 25))
def test_every_width(start: int):
    for width in range(start, start + 25):
        trits, scales = random_experts((2, 3, width), seed=width)
        rows = pack_rows(trits)
        assert rows.shape[-1] == row_bytes(width)
        assert padded_width(width) % affine_group(width) == 0
        dense = scales[..., None] * trits
        np.testing.assert_array_equal(dequantized(rows, scales, width), dense)
        np.testing.assert_array_equal(rows_to_dense(mx.array(rows), mx.array(scales), width), dense)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(1, 700))
def test_any_rows(data: st.DataObject, width: int):
    size = row_bytes(width)
    rows = np.frombuffer(data.draw(st.binary(min_size=2 * size, max_size=2 * size)), np.uint8)
    scale = data.draw(st.floats(0, 2.0**126, width=32))
    scales = np.array([scale, 1], np.float32)
    dense = np.array(rows_to_dense(mx.array(rows.reshape(2, size)), mx.array(scales), width))
    np.testing.assert_array_equal(dequantized(rows.reshape(2, size), scales, width), dense)
    trits = DIGITS[rows.reshape(2, size)].reshape(2, -1)[:, :width] - 1
    np.testing.assert_array_equal(dense, scales[:, None] * trits)


# Expert layers


def ternary_linear(width: int, out: int, experts: int) -> tuple[TernarySwitchLinear, Array]:
    """A layer, and its weights (experts, out, width). What rows hold past the width is random."""
    rng = np.random.default_rng(width)
    rows = rng.integers(0, 256, (experts, out, row_bytes(width)), dtype=np.uint8)
    scales = np.exp(rng.standard_normal((experts, out))).astype(np.float32)
    layer = TernarySwitchLinear(width, out, experts)
    layer.load_weights([("weight", mx.array(rows)), ("scales", mx.array(scales))])
    trits = DIGITS[rows].reshape(experts, out, -1)[..., :width] - 1
    return layer, scales[..., None].astype(np.float64) * trits


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("width", [3, 32, 37, 64, 100, 160, 256])
def test_ternary_linear_is_a_dense_product(width: int, prepared: bool):
    layer, dense = ternary_linear(width, 7, 5)
    if prepared:
        layer.prepare()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, width)).astype(np.float32)
    experts = rng.integers(0, 5, (6, 3)).astype(np.uint32)
    y = layer(mx.array(x)[:, None, None], mx.array(experts))
    assert y.shape == (6, 3, 1, 7) and y.dtype == mx.float32
    exact = np.einsum("tk,teok->teo", x, dense[experts])
    np.testing.assert_allclose(np.array(y)[:, :, 0], exact, rtol=1e-5, atol=2e-5 * width**0.5)


def dense_scale(dense: Array) -> Array:
    """The scale of each row of scale · trits, (out, 1)."""
    return np.abs(dense).max(axis=-1, keepdims=True)


def test_a_new_layer_multiplies_by_zero():
    layer = TernarySwitchLinear(50, 4, 2)
    y = layer(mx.ones((1, 1, 50)), mx.array([1], mx.uint32))
    np.testing.assert_array_equal(y, np.zeros((1, 1, 4)))
    np.testing.assert_array_equal(
        rows_to_dense(layer.weight, mx.ones((2, 4)), 50), np.zeros((2, 4, 50))
    )


def test_the_affine_copy_is_not_used_for_other_weights():
    layer, dense = ternary_linear(40, 6, 2)
    layer.prepare()
    x, expert = mx.ones((1, 1, 40)), mx.array([1], mx.uint32)
    before = np.array(layer(x, expert))
    layer.scales = layer.scales * 2
    np.testing.assert_array_equal(layer(x, expert), 2 * before)
    layer.weight = layer.weight[::-1]
    exact = 2 * (dense[0] / dense_scale(dense[0])) * dense_scale(dense[1])
    np.testing.assert_allclose(layer(x, expert)[0, 0], exact.sum(-1), rtol=1e-5, atol=1e-4)


def test_the_affine_copy_is_no_parameter():
    layer, _ = ternary_linear(40, 6, 2)
    before = set(layer.parameters()), set(layer.state)
    layer.prepare()
    assert (set(layer.parameters()), set(layer.state)) == before
    assert set(layer.parameters()) == {"weight", "scales"}


def swiglu_experts(hidden: int, width: int, count: int) -> TernarySwitchGLU:
    glu = TernarySwitchGLU(hidden, width, count)
    for name in ("gate", "up", "down"):
        shape = (hidden, width) if name == "down" else (width, hidden)
        trits, scales = random_experts((count, *shape), seed=ord(name[0]))
        rows = {"weight": mx.array(pack_rows(trits)), "scales": mx.array(scales / shape[1] ** 0.5)}
        getattr(glu, f"{name}_proj").load_weights(list(rows.items()))
    return glu


@pytest.mark.parametrize(("hidden", "width"), [(64, 96), (44, 37)])
def test_sorted_and_unsorted_agree(hidden: int, width: int, monkeypatch: pytest.MonkeyPatch):
    glu = swiglu_experts(hidden, width, 6)
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (1, 31), (1, 32), (3, 25), (2, 2, 40)]:
        x = mx.array(rng.standard_normal((*shape, hidden)).astype(np.float32))
        experts = mx.array(rng.integers(0, 6, (*shape, 2)).astype(np.uint32))
        results = []
        for threshold in (1, 64, 10**9):
            monkeypatch.setattr(switch, "SORT_FROM_PAIRS", threshold)
            results.append(np.array(glu(x, experts)))
            assert results[-1].shape == (*shape, 2, hidden)
        np.testing.assert_allclose(results[0], results[2], rtol=1e-5, atol=1e-5)
        pairs = np.prod(shape) * 2
        np.testing.assert_array_equal(results[1], results[0] if pairs >= 64 else results[2])


def test_sorting_by_expert_is_undone():
    x = mx.arange(40, dtype=mx.float32).reshape(20, 1, 1, 2)
    experts = mx.array(np.random.default_rng(0).integers(0, 7, (20, 3)).astype(np.uint32))
    tokens, order, inverse = switch.sort_by_expert(x, experts)
    assert (np.diff(np.array(order).astype(int)) >= 0).all()
    np.testing.assert_array_equal(np.array(order)[np.array(inverse)], np.array(experts).ravel())
    pairs = np.repeat(np.array(x)[:, 0], 3, axis=0)
    np.testing.assert_array_equal(np.array(tokens)[np.array(inverse)], pairs)


# Routing


@settings(max_examples=200, deadline=None)
@given(data=st.data(), experts=st.integers(1, 70), rows=st.integers(1, 4))
def test_top_experts(data: st.DataObject, experts: int, rows: int):
    """Largest first, ties to the lower number, for every k: as a stable sort has it."""
    value = st.one_of(
        st.sampled_from([0.0, 1e-45, 1e-39, 0.125, 0.25, 1.0]), st.floats(0, 1, width=32)
    )
    probs = np.array(
        data.draw(st.lists(value, min_size=rows * experts, max_size=rows * experts)), np.float32
    ).reshape(rows, experts)
    k = data.draw(st.integers(1, experts))
    chosen = top_experts(mx.array(probs), k)
    assert chosen.dtype == mx.uint32
    np.testing.assert_array_equal(chosen, np.argsort(-probs, axis=-1, kind="stable")[:, :k])


def moe_block(experts: int = 5, top_k: int = 2, hidden: int = 64) -> OutlierMoE:
    """A block with random weights of every kind."""
    mx.random.seed(experts)
    block = OutlierMoE(hidden, 96, 64, experts, top_k, "tq1_0_rows")
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
    probs = reference.softmax(h @ experts.router.T)
    shared = [np.array(getattr(block.shared_expert, f"{p}_proj").weight) for p in parts]
    exact = reference.swiglu(h, *shared)
    exact = exact + reference.routed(experts, h, reference.route(probs, 3))
    np.testing.assert_allclose(block(x)[0], exact, atol=2e-5, rtol=1e-5)


# Dtypes


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 tier of 4-bit weights."""
    built = builders.write_overlay(tmp_path_factory.mktemp("dtypes") / "overlay", tokenizer=False)
    return tier_of(built.path, None, built.path.parent / "tier", tier="q4", dtype="bfloat16")


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


def test_the_routed_path_is_rounded_once():
    """Shared and routed path are added in float32: one rounding, not one each and one for all."""
    block = moe_block()
    mx.eval(block.parameters())
    x = mx.random.normal((1, 12, 64)).astype(mx.bfloat16)
    indices, weights = block.route(x)
    weights = weights * block.alpha[indices]
    routed = (block.switch_mlp(x.astype(mx.float32), indices) * weights[..., None]).sum(-2)
    once = (block.shared_expert(x).astype(mx.float32) + routed).astype(mx.bfloat16)
    np.testing.assert_array_equal(as_array(block(x)), as_array(once))
    assert not np.array_equal(
        as_array(once), as_array(block.shared_expert(x) + routed.astype(mx.bfloat16))
    )
