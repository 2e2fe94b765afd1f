"""What the expert layers launch on a GPU, and what they leave to plain MLX."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.qwen2 import MLP

from kernels.emulator import VirtualMetal, virtual_metal
from outlier_mlx.runtime import launching, ops, switch
from outlier_mlx.runtime.affine2 import rows_to_affine2
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.runtime.ops import matrix_units, use_metal
from tests.engine import as_array
from tests.kernel_cases import random_matrices
from tests.marks import slow_but
from tests.memory import at_rest

HIDDEN, WIDTH, EXPERTS, K = 64, 96, 4, 2
ROUTE = ["tq1_0_route"]
DECODE = [*ROUTE, "tq1_0_swiglu", "tq1_0_down"]
BLOCKS = [*ROUTE, "tq1_0_sort", "tq1_0_swiglu", "tq1_0_qmv", "tq1_0_mix"]
TRANSCODE = [*ROUTE, *["tq1_0_to_affine2"] * 3]
# What a layer launches, by the number of pairs in a block; 0: experts are converted.
WAYS = {1: DECODE, 4: BLOCKS, 0: TRANSCODE}


@pytest.fixture
def metal() -> Iterator[VirtualMetal]:
    """The emulator, also where there is a GPU."""
    with virtual_metal(count=False) as device:
        yield device


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of pairs in a block. These layers are too small to be sorted or converted."""

    def chosen(size: int) -> None:
        monkeypatch.setattr(ops, "pairs_in_a_block", lambda *sizes: size)

    return chosen


def layer(
    hidden: int = HIDDEN, width: int = WIDTH, experts: int = EXPERTS, k: int = K
) -> OutlierMoE:
    """A MoE layer with random weights of every kind, ready for the CPU, in evaluation mode."""
    mx.random.seed(0)
    block = OutlierMoE(MLP(hidden, 80), hidden, width, experts, k, "tq1_0_strided")
    block.gate.weight = mx.random.normal((experts, hidden)) / hidden**0.5
    block.alpha = mx.random.normal((experts,))
    for seed, name in enumerate(("gate", "up", "down")):
        linear = getattr(block.switch_mlp, f"{name}_proj")
        shape = (hidden, width) if name == "down" else (width, hidden)
        linear.weight, linear.scales = random_matrices(seed, experts, *shape).packed
        linear.prepare()
    mx.eval(block.parameters())
    block.eval()
    return block


def inputs(tokens: int, dtype: mx.Dtype = mx.float32, hidden: int = HIDDEN) -> mx.array:
    mx.random.seed(tokens)
    return mx.random.normal((1, tokens, hidden)).astype(dtype)


# Which device, which path


def test_the_device_is_decided_at_call_time(monkeypatch: pytest.MonkeyPatch):
    assert not use_metal()
    with virtual_metal(count=False):
        assert use_metal()
        monkeypatch.setattr(sys, "platform", "darwin")
        assert use_metal() == (mx.default_device() == mx.gpu)
    assert not use_metal()


@pytest.mark.parametrize(
    ("architecture", "has"),
    [("applegpu_g13s", 0), ("applegpu_g16p", 0), ("applegpu_g17s", 1), ("x86_64", 0), (None, 0)],
)
def test_chips_with_matrix_units(
    architecture: str | None, has: bool, monkeypatch: pytest.MonkeyPatch
):
    info = {} if architecture is None else {"architecture": architecture}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert matrix_units.__wrapped__() == has


def test_what_decides_the_way(metal: VirtualMetal, monkeypatch: pytest.MonkeyPatch):
    """Numbers of tokens, experts and weights, and nothing that only the GPU knows."""
    asked = []

    def choose(*sizes: int) -> int:
        asked.append(sizes)
        return 1

    monkeypatch.setattr(ops, "pairs_in_a_block", choose)
    block, x = layer(), inputs(5)
    block(x.reshape(5, 1, HIDDEN))
    chosen = mx.zeros((5, K), mx.uint32)
    block.switch_mlp.gate_proj(x[0][:, None, None], chosen)
    assert asked == [
        (5, EXPERTS, K, 3 * HIDDEN * WIDTH, False),
        (10, EXPERTS, 1, HIDDEN * WIDTH, False),
    ]


@pytest.mark.parametrize(("size", "launched"), WAYS.items())
def test_launches_of_a_layer(
    size: int, launched: list[str], choose: Callable[[int], None], metal: VirtualMetal
):
    """One to route. Then two, or four with blocks; to convert, one a projection, which MLX's own
    kernels multiply."""
    choose(size)
    block, x = layer(), inputs(33)
    y = block(x)
    assert metal.names == launched
    plain = block.switch_mlp(x, block.route(x)[0])
    assert plain.shape == (1, 33, K, HIDDEN)
    metal.clear()
    block.train()
    np.testing.assert_allclose(y, block(x), rtol=2e-5, atol=2e-5)
    assert metal.names == []


@pytest.mark.parametrize(
    "dtype", slow_but([mx.float16, mx.bfloat16], [mx.float16, mx.bfloat16, mx.float32])
)
@pytest.mark.parametrize(("size", "launched"), WAYS.items())
def test_a_layer_is_the_same_on_both_devices(
    dtype: mx.Dtype, size: int, launched: list[str], choose: Callable[[int], None]
):
    """In every dtype: sums in float32 and one rounding, so results differ by one at most."""
    choose(size)
    block, x = layer(), inputs(7, dtype)
    block.shared_expert.set_dtype(dtype)
    expected = as_array(block(x))
    with virtual_metal(count=False) as metal:
        found = as_array(block(x))
        assert metal.names == launched
    step = {mx.float16: 2**-10, mx.bfloat16: 2**-7, mx.float32: 2e-5}[dtype]
    np.testing.assert_allclose(found, expected, rtol=step, atol=2e-5)


@pytest.mark.parametrize(
    ("size", "launched"),
    [(1, ["tq1_0_qmv"]), (2, ["tq1_0_sort", "tq1_0_qmv"]), (0, TRANSCODE[1:2])],
)
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_linear_layer_by_itself(
    tokens: int,
    size: int,
    launched: list[str],
    choose: Callable[[int], None],
    metal: VirtualMetal,
):
    choose(size)
    linear = layer().switch_mlp.gate_proj
    x = inputs(tokens)[0][:, None, None]  # (tokens, 1, 1, hidden)
    experts = mx.array(np.random.default_rng(0).integers(0, EXPERTS, (tokens, K)).astype(np.uint32))
    y = linear(x, experts)
    assert y.shape == (tokens, K, 1, WIDTH) and metal.names == launched
    for rows, chosen in ((mx.broadcast_to(x, (tokens, K, 1, HIDDEN)), experts), (x[:1], experts)):
        expected = ops.affine_product(rows, linear.affine(), chosen)
        np.testing.assert_allclose(linear(rows, chosen), expected, rtol=2e-5, atol=2e-5)
    pairs = x[:, 0], experts[:, 0]
    np.testing.assert_allclose(linear(*pairs), y[:, 0], rtol=2e-5, atol=2e-5)
    wider = mx.concatenate([x, 2 * x], axis=-2)  # two vectors to an expert: no decode kernel
    metal.clear()
    np.testing.assert_allclose(linear(wider, experts)[:, :, 1:], 2 * y, rtol=2e-5, atol=2e-5)
    assert metal.names == TRANSCODE[1:2]


def test_widths_that_no_group_divides(metal: VirtualMetal, choose: Callable[[int], None]):
    block = layer(44, 37, 3)
    for size, launched in WAYS.items():
        choose(size)
        metal.clear()
        x = inputs(5, hidden=44)
        y = block(x)
        assert metal.names == launched
        block.train()
        np.testing.assert_allclose(y, block(x), rtol=2e-5, atol=2e-5)
        block.eval()


# Experts that conversion accepts, and that no decode kernel takes


def assert_same_on_a_gpu(block: OutlierMoE, tokens: int, metal: VirtualMetal) -> list[str]:
    """A layer's result is that of plain MLX; returns the kernels that were launched for it."""
    x = inputs(tokens, hidden=block.gate.weight.shape[1])
    metal.clear()
    y = block(x)
    launched = metal.names
    block.train()
    np.testing.assert_allclose(y, block(x), rtol=2e-5, atol=2e-5)
    block.eval()
    return launched


@pytest.mark.parametrize("experts", slow_but([3], [1, 3]))
@pytest.mark.parametrize("width", slow_but([1, 2, 7], range(1, 9)))
def test_narrow_experts(
    width: int, experts: int, metal: VirtualMetal, choose: Callable[[int], None]
):
    """A hidden width of 4, too: MLX has so few activations in another address space."""
    for hidden in (2, 4, 64):
        block = layer(hidden, width, experts, 1)
        choose(1)
        assert (assert_same_on_a_gpu(block, 1, metal) == DECODE) == (width > 1)
        if hidden == 4:
            choose(2)
            assert (assert_same_on_a_gpu(block, 5, metal) == BLOCKS) == (width > 1)
        choose(0)
        assert assert_same_on_a_gpu(block, 64, metal) == TRANSCODE


def test_more_experts_a_token_than_a_kernel_mixes(metal: VirtualMetal):
    block = layer(64, 32, 100, 65)
    assert assert_same_on_a_gpu(block, 1, metal) == ["tq1_0_qmv"] * 3
    assert assert_same_on_a_gpu(layer(64, 32, 100, 64), 1, metal) == DECODE[1:]


def test_more_experts_than_a_decode_kernel_takes(metal: VirtualMetal):
    block = layer(8, 8, 1025, 2)
    for tokens in (1, 40):
        assert assert_same_on_a_gpu(block, tokens, metal) == TRANSCODE[1:]
    assert assert_same_on_a_gpu(layer(8, 8, 1024, 2), 1, metal) == DECODE[1:]


@pytest.mark.parametrize("limit", ["tokens", "in features", "out features", "elements"])
def test_what_is_too_large_for_a_kernel(
    limit: str, metal: VirtualMetal, monkeypatch: pytest.MonkeyPatch
):
    """With limits lowered: real ones would take gigabytes."""
    block = layer()
    monkeypatch.setitem(launching.LIMITS, limit, (0, 20))
    tokens = 21 if limit == "tokens" else 1
    # The conversion has a limit of its own for the width of a row, and plain MLX has none.
    others = {"tokens": TRANSCODE[1:], "in features": []}
    launched = others.get(limit, TRANSCODE)
    assert assert_same_on_a_gpu(block, tokens, metal) == launched


def test_sorting_changes_nothing(
    metal: VirtualMetal, monkeypatch: pytest.MonkeyPatch, choose: Callable[[int], None]
):
    choose(0)
    block, x = layer(), inputs(40)
    sorted_pairs = np.array(block(x))
    monkeypatch.setattr(switch, "SORT_FROM_PAIRS", 10**9)
    np.testing.assert_allclose(block(x), sorted_pairs, rtol=2e-5, atol=2e-5)


# Exactly the base


@pytest.mark.parametrize("how", ["alpha", "trits", "down-trits", "gate-trits", "scales"])
@pytest.mark.parametrize(("size", "launched"), WAYS.items())
def test_silent_experts_leave_exactly_the_base(
    how: str, size: int, launched: list[str], choose: Callable[[int], None]
):
    choose(size)
    block, x = layer(), inputs(5)
    expected = np.array(block.shared_expert(x))
    experts = block.switch_mlp
    if how == "alpha":
        block.alpha = mx.zeros((EXPERTS,))
    names = {"trits": ("gate", "up", "down"), "down-trits": ("down",), "gate-trits": ("gate",)}
    with virtual_metal(count=False) as metal:
        assert np.abs(np.array(block(x)) - expected).max() > 0.1 or how == "alpha"
        for linear in (getattr(experts, f"{n}_proj") for n in names.get(how, ())):
            linear.weight = mx.full(linear.weight.shape, 128, mx.uint8)
            linear.prepare()
        if how == "scales":
            experts.up_proj.scales = mx.zeros_like(experts.up_proj.scales)
        metal.clear()
        np.testing.assert_array_equal(block(x), expected)
        assert metal.names == launched


def test_only_rows_without_a_trit_lose_their_scale():
    m = random_matrices(1, 2, 5, 33)
    m.trits[0, 1] = m.trits[1, 4] = 0
    m.trits[1, 2] = 0
    m.trits[1, 2, 32] = -1
    linear = switch.TernarySwitchLinear(33, 5, 2)
    linear.weight, linear.scales = m.packed
    linear.prepare()
    expected = m.scales.copy()
    expected[0, 1] = expected[1, 4] = 0
    np.testing.assert_array_equal(linear.scales, expected)


# Gradients


@pytest.mark.parametrize(("size", "launched"), WAYS.items())
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_plain_mlx(
    size: int, launched: list[str], training: bool, choose: Callable[[int], None]
):
    choose(size)
    block, x = layer(), inputs(7)
    block.train(training)
    mx.random.seed(1)
    weights = mx.random.normal(x.shape)

    def loss(x: mx.array, alpha: mx.array, router: mx.array, shared: mx.array) -> mx.array:
        block.alpha, block.gate.weight = alpha, router
        block.shared_expert.down_proj.weight = shared
        return (block(x) * weights).sum()

    arguments = x, block.alpha, block.gate.weight, block.shared_expert.down_proj.weight
    gradient = mx.grad(loss, argnums=(0, 1, 2, 3))
    expected = [np.array(g) for g in gradient(*arguments)]
    with virtual_metal(count=False) as metal:
        found = [np.array(g) for g in gradient(*arguments)]
        assert metal.names == ([] if training else launched)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 0.01
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_in_half_precision(metal: VirtualMetal):
    block, x = layer(), inputs(3, mx.float16)
    block.shared_expert.set_dtype(mx.float16)

    def loss(x: mx.array) -> mx.array:
        return block(x).astype(mx.float32).sum()

    found = mx.grad(loss)(x)
    assert found.dtype == mx.float16
    block.train()
    np.testing.assert_allclose(found, mx.grad(loss)(x), rtol=2**-9, atol=2**-9)


def test_a_linear_layer_has_gradients(metal: VirtualMetal):
    linear = layer().switch_mlp.gate_proj
    experts = mx.array([[0, 3]], mx.uint32)

    def loss(x: mx.array) -> mx.array:
        return (linear(x, experts) ** 2).sum()

    x = inputs(1)[0][:, None, None]
    found = mx.grad(loss)(x)
    assert metal.names == ["tq1_0_qmv"]
    linear.train()
    np.testing.assert_allclose(found, mx.grad(loss)(x), rtol=1e-4)


# Memory


def resident_layer(hidden: int, width: int, experts: int) -> tuple[OutlierMoE, int]:
    """A layer as it is loaded where there is Metal, and the bytes of its packed experts."""
    block, packed = layer(hidden, width, experts), 0
    for name in ("gate", "up", "down"):
        linear = getattr(block.switch_mlp, f"{name}_proj")
        linear.prepared = None  # made for the CPU
        linear.prepare()
        assert linear.prepared is None
        packed += linear.weight.nbytes + linear.scales.nbytes
    gc.collect()
    return block, packed


@pytest.mark.parametrize(("size", "launched"), slow_but([(0, TRANSCODE)], WAYS.items(), names=2))
def test_nothing_but_the_result_stays_in_memory(
    size: int, launched: list[str], metal: VirtualMetal, choose: Callable[[int], None]
):
    choose(size)
    hidden, width, experts = 640, 1280, 4
    block, packed = resident_layer(hidden, width, experts)
    assert packed * 8 / (3 * experts * hidden * width) < 1.7
    x = inputs(8, hidden=hidden)
    mx.eval(x)
    before = at_rest()
    y = block(x)
    mx.eval(y)
    assert metal.names == launched
    # A copy of one projection has 800 kB; MLX keeps a few small constants.
    assert mx.get_active_memory() - before < y.nbytes + 16384


@pytest.mark.slow
def test_the_peak_of_a_long_prompt_does_not_grow_with_layers(
    metal: VirtualMetal, monkeypatch: pytest.MonkeyPatch, choose: Callable[[int], None]
):
    """What MLX evaluates together, it still transcodes in the order of the layers."""

    def transcode(rows: mx.array, in_features: int) -> mx.array:
        # As lazy as a launch is on a GPU; MLX would bring forward as much of it as it can.
        return rows_to_affine2(rows, mx.ones(rows.shape[:-1]), in_features)[0]

    choose(0)
    monkeypatch.setattr(ops, "tq1_0_to_affine2", transcode)
    blocks = [resident_layer(320, 640, 4)[0] for _ in range(6)]
    peaks = []
    for count in (1, 6):
        x = inputs(32, hidden=320)
        mx.eval(x)
        before = at_rest()
        y = x
        for block in blocks[:count]:
            y = y + block(y)
        mx.eval(y)
        peaks.append(mx.get_peak_memory() - before)
    assert set(metal.names) == {*ROUTE}
    assert peaks[1] < 1.5 * peaks[0]
