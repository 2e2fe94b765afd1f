"""Pairs of one expert that share the decoding of its rows: how they are sorted, and same bits."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from kernels.costs import SHAPES, ours
from kernels.costs_blocks import block_cost, sort_cycles
from kernels.emulator import virtual_metal
from outlier_mlx.runtime import blocks, kernels
from outlier_mlx.runtime.blocks import block_count, tq1_0_sort
from tests.engine import as_array
from tests.kernel_cases import (
    Matrices,
    assert_within,
    mixed,
    random_experts,
    random_matrices,
    random_x,
    swiglu,
)
from tests.marks import slow_but
from tests.metal import Metal, needs_emulator
from tests.reference import Array

SIZES = (2, 4, 8)
# Kernels with a loop for each size of a block take long to compile.
SLOW_SIZES = slow_but([4], SIZES)


# Sorting


def sorted_blocks(experts: Array, count: int, size: int) -> Array:
    """Blocks by their definition."""
    found = []
    for expert in range(count):
        pairs = np.flatnonzero(experts == expert)
        for at in range(0, len(pairs), size):
            block = list(pairs[at : at + size])
            found.append([len(block), *block, *[0] * (size - len(block))])
    empty = block_count(len(experts), count, size) - len(found)
    return np.array(found + [[0] * (1 + size)] * empty, np.uint32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("pairs", "experts"), [(1, 1), (9, 1), (7, 3), (64, 8), (33, 64), (100, 40), (256, 100)]
)
def test_blocks_are_those_of_their_definition(pairs: int, experts: int, size: int, metal: Metal):
    chosen = np.random.default_rng(pairs).integers(0, experts, pairs).astype(np.uint32)
    found = tq1_0_sort(mx.array(chosen), experts, size)
    np.testing.assert_array_equal(found, sorted_blocks(chosen, experts, size))


def test_as_many_blocks_as_experts_can_need():
    """Where each expert has one pair more than full blocks, no block is left over."""
    for size in SIZES:
        for experts in (1, 5):
            chosen = np.repeat(np.arange(experts, dtype=np.uint32), 2 * size + 1)
            assert (sorted_blocks(chosen, experts, size)[:, 0] > 0).all()
        assert block_count(3, 1000, size) == 3


@pytest.mark.slow
def test_the_most_experts_are_sorted(metal: Metal):
    chosen = np.random.default_rng(0).integers(0, 1024, 2048).astype(np.uint32)
    found = tq1_0_sort(mx.array(chosen.reshape(256, 8)), 1024, 4)
    np.testing.assert_array_equal(found, sorted_blocks(chosen, 1024, 4))


# Same bits


@dataclass(frozen=True)
class Layer:
    """Experts of a layer, and inputs of tokens."""

    gate: Matrices
    up: Matrices
    down: Matrices
    x: mx.array
    chosen: Array
    weights: mx.array
    shared: mx.array

    def run(self, size: int, tokens: slice = slice(None)) -> list[mx.array]:
        """Results for some of the tokens: h, y, and products with gate. Size 1: no blocks."""
        chosen = mx.array(self.chosen[tokens])
        made = tq1_0_sort(chosen, len(self.gate.trits), size) if size > 1 else None
        gate, up, down = self.gate.packed, self.up.packed, self.down.packed
        x = self.x[tokens]
        h = kernels.tq1_0_swiglu(x, *gate, *up, chosen, blocks=made)
        rest = self.weights[tokens], self.shared[tokens]
        y = kernels.tq1_0_down(h, *down, chosen, *rest, blocks=made)
        z = kernels.tq1_0_qmv(x, *gate, chosen.flatten(), blocks=made)
        return [h, y, z.reshape(*h.shape)]


def made_layer(
    hidden: int, width: int, tokens: int, experts: int, k: int, dtype: mx.Dtype = mx.float16
) -> Layer:
    gate, up = (random_matrices(seed, experts, width, hidden) for seed in (1, 2))
    return Layer(
        gate,
        up,
        random_matrices(3, experts, hidden, width),
        random_x(1, (tokens, hidden), dtype),
        random_experts(4, tokens, k, experts),
        random_x(5, (tokens, k), mx.float32),
        random_x(6, (tokens, hidden), dtype),
    )


def assert_same_bits(layer: Layer, sizes: tuple[int, ...] = SIZES) -> None:
    expected = layer.run(1)
    for size in sizes:
        for found, one in zip(layer.run(size), expected, strict=True):
            np.testing.assert_array_equal(as_array(found), as_array(one))


@pytest.mark.parametrize("size", SLOW_SIZES)
def test_a_token_has_the_same_bits_in_any_company(size: int, metal: Metal):
    """Nine tokens over four experts: full blocks and others; each token alone; and in slices."""
    layer = made_layer(644, 50, 9, 4, 2)
    whole = layer.run(size)
    assert_within(whole[0], swiglu(layer.x, layer.gate, layer.up, layer.chosen))
    weights = np.array(layer.weights)
    assert_within(whole[1], mixed(whole[0], layer.down, layer.chosen, weights, layer.shared))
    for part in (slice(0, 1), slice(3, 4), slice(2, 7)):
        for other in (1, size):
            for found, all_ in zip(layer.run(other, part), whole, strict=True):
                np.testing.assert_array_equal(as_array(found), as_array(all_[part]))


def test_bfloat_is_converted_once(metal: Metal):
    """The simdgroups of a threadgroup copy the vectors; some have no rows of their own."""
    assert_same_bits(made_layer(644, 18, 5, 2, 2, mx.bfloat16), (4,))
    loaders = [run.template["LOADERS"] for run in metal.launches if "LOADERS" in run.template]
    assert loaders == [1, 1, 4, 1, 4]  # h of `tq1_0_down` is in float32


@pytest.mark.parametrize("size", SLOW_SIZES)
def test_every_number_of_pairs_in_a_block(size: int, metal: Metal):
    """One expert, and every loop."""
    for pairs in range(1, size + 1):
        assert_same_bits(made_layer(160, 20, pairs, 1, 1), (size,))


LAYERS = {
    "odd": (100, 37, 13, 3, 3, mx.bfloat16),
    "k32": (32, 33, 17, 2, 1, mx.float32),
    "smallest": (5, 7, 3, 2, 2, mx.float16),
    "two-rows": (20, 2, 5, 2, 1, mx.float16),
    "64-experts-a-token": (24, 9, 3, 64, 64, mx.float16),
    "steps": (1281, 96, 8, 3, 2, mx.bfloat16),
    "more-experts-than-pairs": (84, 40, 2, 100, 2, mx.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_more_layers_have_the_same_bits(name: str, metal: Metal):
    """In the smallest and the largest blocks; tests above have the loops between."""
    assert_same_bits(made_layer(*LAYERS[name]), (2, 8))


def test_launches_with_blocks(metal: Metal):
    made_layer(64, 32, 4, 2, 1).run(4)
    names = ["tq1_0_sort", "tq1_0_swiglu", "tq1_0_qmv", "tq1_0_mix", "tq1_0_qmv"]
    assert metal.names == names


# Refusals


def test_what_is_refused(metal: Metal):
    layer = made_layer(64, 32, 4, 2, 1)
    call = layer.x, *layer.gate.packed, mx.array(layer.chosen.flatten())
    for wrong in (mx.zeros((3, 4), mx.uint32), mx.zeros((3, 5)), mx.zeros((5,), mx.uint32)):
        with pytest.raises(ValueError, match=r"tq1_0_qmv: blocks are .*; expected \(blocks, 1 \+"):
            kernels.tq1_0_qmv(*call, blocks=wrong)
    with pytest.raises(ValueError, match="tq1_0_sort: blocks of 3 pairs are not supported"):
        tq1_0_sort(call[-1], 2, 3)
    with pytest.raises(ValueError, match="tq1_0_sort: 1025 experts; supported: 1 to 1024"):
        tq1_0_sort(call[-1], 1025, 4)
    for wrong in (mx.zeros((0,), mx.uint32), mx.zeros((3,), mx.int32)):
        with pytest.raises(ValueError, match=r"tq1_0_sort: indices are .*; expected some uint32"):
            tq1_0_sort(wrong, 2, 4)
    assert metal.launches == []


# Cost


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize(("size", "main"), [(2, 3.65), (4, 5.76), (8, 10.08)])
def test_what_full_blocks_cost(size: int, main: float):
    found = block_cost("qmv", SHAPES["14B"]["qmv"], size, size)
    assert 1.3 + size < found.main <= main
    assert found.second <= 0.6 and not found.private
    assert found.loop_bytes <= 8192


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", ["swiglu", "qmv", "down"])
def test_what_blocks_cost(kernel: str, size: int):
    """A pair alone costs no more than a tenth above a launch without blocks."""
    wide = SHAPES["14B"][kernel]
    dtype = mx.float32 if kernel == "down" else mx.float16
    alone = ours(kernel, wide, kernels.VARIANTS[f"tq1_0_{kernel}"])
    assert block_cost(kernel, wide, size, 1, dtype).main <= 1.1 * alone.main
    for pairs in range(1, size + 1):
        found = block_cost(kernel, wide, size, pairs, dtype)
        assert not found.private


@needs_emulator
def test_sorting_costs_little():
    """Of 64 pairs over 8 experts, a few hundred cycles of one threadgroup."""
    assert sort_cycles(64, 8, 4) < 500
    assert sort_cycles(256, 64, 4) < 5000


@needs_emulator
@pytest.mark.slow
def test_no_array_of_a_thread_is_in_memory():
    with virtual_metal() as metal:
        layer = made_layer(100, 37, 5, 2, 1)
        for size in SIZES:
            layer.run(size)
    for launch in metal.launches:
        assert not {"private load", "private store"} & set(launch.cost.instructions), launch.name
    assert blocks.SORT_SIMDGROUPS * 32 <= 1024
