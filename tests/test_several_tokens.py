"""Expert layers with several tokens: blocks of pairs, and nothing that waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import virtual_metal
from outlier_mlx.runtime import costs, ops
from outlier_mlx.runtime.blocks import block_count
from outlier_mlx.runtime.costs import pairs_in_a_block
from outlier_mlx.runtime.switch import TernarySwitchGLU
from tests.engine import as_array
from tests.kernel_cases import random_matrices, random_x
from tests.metal import Metal
from tests.reference import Array, Experts, Routing, Ternary, routed

HIDDEN, WIDTH = 100, 36


@pytest.fixture(autouse=True)
def launches_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that layers as small as these are sorted, too."""
    monkeypatch.setattr(costs, "LAUNCH_CYCLES", 0.0)
    monkeypatch.setattr(ops, "pairs_in_a_block", pairs_in_a_block.__wrapped__)


def random_layer(experts: int) -> tuple[TernarySwitchGLU, Experts]:
    """Random experts as a layer, and as the reference has them."""
    glu, parts = TernarySwitchGLU(HIDDEN, WIDTH, experts), []
    for seed, name in enumerate(("gate", "up", "down")):
        shape = (HIDDEN, WIDTH) if name == "down" else (WIDTH, HIDDEN)
        m = random_matrices(seed, experts, *shape)
        linear = getattr(glu, f"{name}_proj")
        linear.weight, linear.scales = m.packed
        parts.append([Ternary(t, s[:, None]) for t, s in zip(m.trits, m.scales, strict=True)])
    glu.eval()
    return glu, Experts(np.zeros((experts, HIDDEN)), np.ones(experts), *parts)


def uneven_routing(tokens: int, experts: int, k: int) -> tuple[Array, Array]:
    """Experts (tokens, k) uint32, low numbers much more often, and weights (tokens, k) float32."""
    rng = np.random.default_rng([tokens, experts, k])
    likely = 1 / (1 + np.arange(experts)) ** 1.5
    chosen = [rng.choice(experts, k, False, likely / likely.sum()) for _ in range(tokens)]
    weights = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
    return np.array(chosen, np.uint32).reshape(tokens, k), weights


ROUTINGS = [
    (0, 3, 2),
    (1, 8, 2),
    (9, 1, 1),
    (2, 3, 3),
    (7, 5, 3),
    (32, 8, 2),
    (6, 8, 8),
    (11, 64, 8),
]


@pytest.mark.parametrize(("tokens", "experts", "k"), ROUTINGS)
def test_a_layer_is_that_of_the_reference(tokens: int, experts: int, k: int, metal: Metal):
    """Some experts have one pair, some fill blocks, some have none."""
    glu, reference = random_layer(experts)
    chosen, weights = uneven_routing(tokens, experts, k)
    x = random_x(1, (tokens, HIDDEN), mx.float32)
    shared = random_x(2, (tokens, HIDDEN), mx.float32)
    y = glu.mix(x, mx.array(chosen), mx.array(weights), shared)
    size = pairs_in_a_block.__wrapped__(tokens, experts, k, 3 * HIDDEN * WIDTH)
    assert ("tq1_0_sort" in metal.names) == (size > 1) == (tokens > 1)
    h = as_array(x).astype(np.float64)
    exact = routed(reference, h, Routing(chosen, chosen, weights)) + as_array(shared)
    np.testing.assert_allclose(as_array(y), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [mx.float16, pytest.param(mx.bfloat16, marks=pytest.mark.slow)])
def test_a_token_has_the_same_bits_in_any_batch(dtype: mx.Dtype, metal: Metal):
    """Alone, in a batch of single tokens, in a slice of a prompt, as drafts that are verified."""
    glu, _ = random_layer(4)
    chosen, weights = uneven_routing(12, 4, 2)
    x, shared = (random_x(seed, (12, HIDDEN), dtype) for seed in (1, 2))

    def run(shape: tuple[int, ...], first: int = 0) -> Array:
        part = slice(first, first + int(np.prod(shape)))
        y = glu.mix(
            x[part].reshape(*shape, HIDDEN),
            mx.array(chosen[part]).reshape(*shape, 2),
            mx.array(weights[part]).reshape(*shape, 2),
            shared[part].reshape(*shape, HIDDEN),
        )
        assert y.shape == (*shape, HIDDEN) and y.dtype == dtype
        return as_array(y).reshape(-1, HIDDEN)

    whole = run((1, 12))
    assert metal.names[0] == "tq1_0_sort"
    np.testing.assert_array_equal(run((12, 1)), whole)
    np.testing.assert_array_equal(run((3, 4)), whole)
    metal.clear()
    for first, tokens in ((0, 1), (3, 2), (7, 5)):
        np.testing.assert_array_equal(run((1, tokens), first), whole[first : first + tokens])
    assert metal.names[:2] == ["tq1_0_swiglu", "tq1_0_down"]  # a single token is not sorted


# Without waiting for the GPU


def lazy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes launches lazy, as they are on a GPU, with results of the right shapes; their names."""
    launched = []

    def stand_in(name: str, result: Callable[..., mx.array]) -> None:
        def launch(*arguments: Any, **options: Any) -> mx.array:
            launched.append(name)
            return result(*arguments)

        monkeypatch.setattr(ops, name, launch)

    def sort(indices: mx.array, experts: int, size: int) -> mx.array:
        return mx.zeros((block_count(indices.size, experts, size), 1 + size), mx.uint32)

    stand_in("tq1_0_sort", sort)
    stand_in("tq1_0_swiglu", lambda x, gate, *_: mx.zeros((x.shape[0], 2, gate.shape[1])) + x[0, 0])
    stand_in("tq1_0_down", lambda h, *rest: rest[-1] + h[0, 0, 0])
    stand_in(
        "tq1_0_to_affine2",
        lambda rows, n: ops.rows_to_affine2(rows, mx.ones(rows.shape[:-1]), n)[0],
    )
    return launched


@pytest.mark.parametrize(
    ("size", "launched"),
    [
        (1, ["tq1_0_swiglu", "tq1_0_down"]),
        (8, ["tq1_0_sort", "tq1_0_swiglu", "tq1_0_down"]),
        (0, ["tq1_0_to_affine2"] * 3),
    ],
)
def test_no_way_waits_for_the_gpu(size: int, launched: list[str], monkeypatch: pytest.MonkeyPatch):
    """While MLX traces a function, arrays have no content: looking at it would raise an error."""
    glu, _ = random_layer(4)
    monkeypatch.setattr(ops, "pairs_in_a_block", lambda *_: size)
    mix = mx.compile(glu.mix)
    with virtual_metal(count=False):
        names = lazy(monkeypatch)
        x, shared = mx.ones((1, 40, HIDDEN)), mx.ones((1, 40, HIDDEN))
        chosen = mx.zeros((1, 40, 2), mx.uint32)
        y = mix(x, chosen, mx.ones((1, 40, 2)), shared)
        assert names == launched
        mx.eval(y)
    assert y.shape == x.shape
