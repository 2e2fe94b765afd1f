"""The way to multiply experts that costs least, its prices, and modelled times of all ways."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from kernels.costs import CHIPS, SHAPES
from kernels.launch_counts import launches
from kernels.several import Layer, block_cycles, conversion, tile
from outlier_mlx.runtime import costs, ops
from outlier_mlx.runtime.affine2 import row_bytes
from outlier_mlx.runtime.costs import BLOCK_CYCLES, pairs_in_a_block, pairs_of_an_expert
from outlier_mlx.runtime.switch import TernarySwitchGLU
from tests.metal import needs_emulator

# Experts of a layer, and those of a token.
ROUTINGS = [(1, 1), (3, 2), (8, 2), (8, 8), (64, 2), (64, 8), (1024, 64)]
LARGE, SMALL, TINY = 3 * 5120 * 13824, 3 * 1024 * 2048, 3 * 64 * 96
TOKENS = (*range(130), 200, 256, 333, 512, 1000, 1024, 2048, 4096, 16384)


@pytest.mark.parametrize(("experts", "k"), ROUTINGS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 64, 500])
def test_pairs_of_an_expert(tokens: int, experts: int, k: int):
    likely = pairs_of_an_expert(tokens, experts, k)
    numbers, chances = np.array(list(likely)), np.array(list(likely.values()))
    assert chances.sum() == pytest.approx(1, abs=1e-6)
    assert (numbers * chances).sum() == pytest.approx(tokens * k / experts, rel=1e-6)
    assert numbers.min() >= 0 and numbers.max() <= tokens


def test_a_draft_reads_each_expert_once():
    """As far as blocks go: up to 4 tokens exactly, up to 8 but for one expert in thirty."""
    for tokens in range(2, 9):
        size = pairs_in_a_block(tokens, 8, 2, LARGE)
        likely = pairs_of_an_expert(tokens, 8, 2)
        used = sum(chance for number, chance in likely.items() if number)
        read = sum(chance * -(-number // size) for number, chance in likely.items())
        assert read <= used * (1.0001 if tokens <= 4 else 1.034)


def test_pairs_of_an_expert_are_those_of_random_routing():
    rng = np.random.default_rng(0)
    draws = [np.bincount(_routed(rng, 6, 8, 2), minlength=8) for _ in range(4000)]
    found = np.bincount(np.concatenate(draws), minlength=7) / (8 * 4000)
    likely = pairs_of_an_expert(6, 8, 2)
    np.testing.assert_allclose(found, [likely.get(n, 0) for n in range(7)], atol=0.01)


def _routed(rng: np.random.Generator, tokens: int, experts: int, k: int) -> np.ndarray:
    return np.concatenate([rng.choice(experts, k, replace=False) for _ in range(tokens)])


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("weights", [LARGE, SMALL, TINY])
@pytest.mark.parametrize(("experts", "k"), [r for r in ROUTINGS if r[0] > r[1]])
def test_more_tokens_never_make_blocks_smaller(experts: int, k: int, weights: int, units: bool):
    """And where experts are converted, they are for all larger numbers of tokens, too."""
    chosen = [
        pairs_in_a_block(tokens, experts, k, weights, matrix_units=units) for tokens in TOKENS
    ]
    assert set(chosen) <= {0, *BLOCK_CYCLES}
    order = [size or 99 for size in chosen]
    assert order == sorted(order)


@pytest.mark.parametrize(("experts", "k"), ROUTINGS)
def test_a_single_token_is_never_sorted(experts: int, k: int):
    for weights, units in itertools.product((LARGE, SMALL, TINY), (False, True)):
        assert pairs_in_a_block(0, experts, k, weights, matrix_units=units) == 1
        assert pairs_in_a_block(1, experts, k, weights, matrix_units=units) == 1


def test_a_smaller_layer_is_sorted_later():
    """Sorting costs launches, which only a large layer makes up for."""
    firsts = [
        next(tokens for tokens in TOKENS if pairs_in_a_block(tokens, 8, 2, weights) > 1)
        for weights in (LARGE, SMALL, TINY)
    ]
    assert firsts == sorted(firsts) and firsts[0] == 2 and firsts[2] > 100


def test_experts_that_share_no_pairs_are_not_sorted():
    assert pairs_in_a_block(2, 1024, 1, LARGE) == 1


def test_matrix_units_convert_earlier():
    for experts, k in ROUTINGS:
        for tokens in TOKENS:
            if pairs_in_a_block(tokens, experts, k, LARGE) == 0:
                assert pairs_in_a_block(tokens, experts, k, LARGE, matrix_units=True) == 0
    assert pairs_in_a_block(512, 8, 2, LARGE, matrix_units=True) == 0


def test_each_choice_is_that_of_a_launch_that_costs_nothing(monkeypatch: pytest.MonkeyPatch):
    """Then only pairs that may share an expert decide."""
    monkeypatch.setattr(costs, "LAUNCH_CYCLES", 0.0)
    choose = pairs_in_a_block.__wrapped__
    assert [choose(tokens, 8, 2, TINY) > 1 for tokens in (1, 2, 3)] == [False, True, True]


def test_where_every_token_uses_every_expert_full_blocks_are_cheapest():
    sizes = {tokens: pairs_in_a_block(tokens, 8, 8, LARGE) for tokens in (1, 2, 4, 8, 64)}
    assert sizes == {1: 1, 2: 2, 4: 4, 8: 8, 64: 8}


def test_the_choice_for_the_14b_shape():
    """Blocks of 4 for a few tokens, of 8 for most prompts, MLX's matrix kernels for long ones."""
    sizes = {tokens: pairs_in_a_block(tokens, 8, 2, LARGE) for tokens in (1, 2, 8, 32, 512, 2048)}
    assert sizes == {1: 1, 2: 2, 8: 4, 32: 8, 512: 8, 2048: 0}


# Prices


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_prices_of_blocks(size: int):
    """As the emulator counts them; in 7B's shape, rows end in the middle of a step."""
    for pairs, cycles in enumerate(BLOCK_CYCLES[size], 1):
        assert block_cycles(size, pairs) == pytest.approx(cycles, rel=0.03)
        assert block_cycles(size, pairs, "7B") == pytest.approx(cycles, rel=0.1)
    for kernels in SHAPES.values():
        for wide in kernels.values():
            assert row_bytes(wide) / wide == pytest.approx(costs.BLOCK_BYTES, rel=0.02)


@needs_emulator
def test_prices_of_conversion():
    """It is a matter of bytes, whatever its cycles are; a tile is a matter of cycles."""
    for wide in SHAPES["14B"].values():
        made = conversion(wide)
        assert made.bytes == pytest.approx(costs.CONVERSION_BYTES, rel=0.01)
        assert made.cycles < made.bytes * costs.CYCLES_PER_BYTE
        tile_cycles = costs.TILE_CYCLES + costs.TILE_PRODUCT_CYCLES
        assert tile(wide).cycles == pytest.approx(tile_cycles, rel=0.01)
        assert tile(wide).bytes == costs.TILE_BYTES
    per_byte = [chip.cores * 128 * chip.clock / chip.bandwidth for chip in CHIPS]
    assert min(per_byte) == pytest.approx(13.3, rel=0.01)
    assert max(per_byte) == pytest.approx(17.9, rel=0.01)
    assert 13.3 < costs.CYCLES_PER_BYTE < 17.9


@pytest.mark.parametrize(
    ("size", "known"),
    [(1, costs.LAUNCHES), (4, costs.BLOCK_LAUNCHES), (0, costs.CONVERTING_LAUNCHES - 3)],
)
def test_launches(size: int, known: int, monkeypatch: pytest.MonkeyPatch):
    """Counted in MLX's graph. Each of its three matrix products has one more there, which finds the
    pairs of each expert."""
    monkeypatch.setattr(ops, "pairs_in_a_block", lambda *_: size)
    glu = TernarySwitchGLU(128, 256, 8)
    glu.eval()
    mx.eval(glu.parameters())
    x, chosen = mx.zeros((64, 128), mx.float16), mx.zeros((64, 2), mx.uint32)
    assert launches(glu.mix, x, chosen, mx.zeros((64, 2)), x).total() == known


# Modelled times


@needs_emulator
@pytest.mark.slow
def test_several_tokens_take_less_time_than_before():
    """Of the time of the first kernels, over 8 experts of which a token uses 2."""

    def ratios(tokens: int, balanced: bool = False) -> list[float]:
        layer = Layer("14B", tokens, 8, 2, balanced)
        return [layer.now(chip) / layer.first(chip) for chip in CHIPS]

    assert max(ratios(4)) <= 0.765 and np.mean(ratios(4)) <= 0.75
    assert max(ratios(32)) <= 0.47 and np.mean(ratios(32)) <= 0.45
    assert max(ratios(32, balanced=True)) <= 0.45
    assert max(ratios(1)) <= 1.001


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (64, 8)])
def test_the_chosen_way_is_the_fastest_that_is_modelled(experts: int, k: int):
    """Within a few hundredths: one choice is made for all chips, and cores that are not busy and
    launches count for it."""
    for tokens in (1, 2, 4, 8, 32, 256):
        layer = Layer("14B", tokens, experts, k)
        for chip in CHIPS:
            ways = [layer.decoded(size, chip) for size in BLOCK_CYCLES] + [layer.converted(chip)]
            assert layer.now(chip) <= 1.06 * min(ways)
