"""Ternary rows: transcoding them, and the layers that multiply by them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx.runtime import switch
from outlier_mlx.runtime.affine2 import (
    affine_group,
    padded_width,
    row_bytes,
    rows_to_affine2,
)
from outlier_mlx.runtime.switch import TernarySwitchLinear
from tests.engine import (
    pack_rows,
    random_experts,
    rows_to_dense,
    swiglu_experts,
    unpack_rows,
)
from tests.goldens import require_shared
from tests.reference import Array
from tests.tensor_file import read_arrays

# The n-th digit of a byte, as a fraction of 256 in base 3, and the bytes that a packer writes.
MEANT = np.array([(256 * q + 242) // 243 for q in range(243)])


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
    np.testing.assert_array_equal(np.flatnonzero(canonical), MEANT)
    rows, ones = np.arange(256, dtype=np.uint8).reshape(16, 16), np.ones(16, np.float32)
    expected = trits.reshape(16, 16, 5).swapaxes(1, 2).reshape(16, 80)
    np.testing.assert_array_equal(unpack_rows(rows, 80), expected)
    np.testing.assert_array_equal(dequantized(rows, ones, 80), expected)


def test_every_byte_that_a_packer_writes():
    digits = np.stack(np.meshgrid(*[[-1, 0, 1]] * 5, indexing="ij"), -1).reshape(-1, 5)
    trits = np.zeros((243, 80), np.int64)
    trits[:, ::16] = digits  # byte 0 has the trits 0, 16, 32, 48 and 64
    rows = pack_rows(trits)
    np.testing.assert_array_equal(rows[:, 0], MEANT)
    assert (rows[:, 1:] == 128).all()
    ones = np.ones(243, np.float32)
    np.testing.assert_array_equal(dequantized(rows, ones, 80), trits)


@pytest.mark.parametrize("start", range(1, 201, 25))
def test_every_width(start: int):
    for width in range(start, start + 25):
        trits, scales = random_experts((2, 3, width), seed=width)
        rows = pack_rows(trits)
        assert rows.shape[-1] == row_bytes(width)
        assert padded_width(width) % affine_group(width) == 0
        dense = scales[..., None] * trits
        np.testing.assert_array_equal(dequantized(rows, scales, width), dense)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(1, 700))
def test_any_rows(data: st.DataObject, width: int):
    size = row_bytes(width)
    rows = np.frombuffer(data.draw(st.binary(min_size=2 * size, max_size=2 * size)), np.uint8)
    scale = data.draw(st.floats(0, 2.0**126, width=32))
    scales = np.array([scale, 1], np.float32)
    trits = unpack_rows(rows.reshape(2, size), width)
    dense = scales[:, None] * trits
    np.testing.assert_array_equal(dequantized(rows.reshape(2, size), scales, width), dense)


# Expert layers


def ternary_linear(width: int, out: int, experts: int) -> tuple[TernarySwitchLinear, Array]:
    """A layer, and its weights (experts, out, width). What rows hold past the width is random."""
    rng = np.random.default_rng(width)
    rows = rng.integers(0, 256, (experts, out, row_bytes(width)), dtype=np.uint8)
    scales = np.exp(rng.standard_normal((experts, out))).astype(np.float32)
    layer = TernarySwitchLinear(width, out, experts)
    layer.load_weights([("weight", mx.array(rows)), ("scales", mx.array(scales))])
    trits = unpack_rows(rows, width)
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


def test_sorted_from_64_pairs_on(monkeypatch: pytest.MonkeyPatch):
    glu = swiglu_experts(64, 32, 2)
    sizes: list[int] = []
    sort = switch.sort_by_expert

    def spy(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        sizes.append(indices.size)
        return sort(x, indices)

    monkeypatch.setattr(switch, "sort_by_expert", spy)
    for tokens in (31, 32):
        glu(mx.ones((1, tokens, 64)), mx.zeros((1, tokens, 2), mx.uint32))
    assert sizes == [64]


def test_sorting_by_expert_is_undone():
    x = mx.arange(40, dtype=mx.float32).reshape(20, 1, 1, 2)
    experts = mx.array(np.random.default_rng(0).integers(0, 7, (20, 3)).astype(np.uint32))
    tokens, order, inverse = switch.sort_by_expert(x, experts)
    assert (np.diff(np.array(order).astype(int)) >= 0).all()
    np.testing.assert_array_equal(np.array(order)[np.array(inverse)], np.array(experts).ravel())
    pairs = np.repeat(np.array(x)[:, 0], 3, axis=0)
    np.testing.assert_array_equal(np.array(tokens)[np.array(inverse)], pairs)
