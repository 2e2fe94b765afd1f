"""Experts whose weights have scales of groups: the kernel in the emulator, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import VirtualMetal, virtual_metal
from outlier_mlx.runtime import ops
from outlier_mlx.runtime.blocks import tq1_0_sort
from outlier_mlx.runtime.groups import tq1_0_linear, tq1_0_qmv_groups
from outlier_mlx.runtime.ops import rows_product
from outlier_mlx.ternary.rows import pack_rows
from outlier_mlx.ternary.scales import tile_scales
from tests.engine import as_array
from tests.kernel_cases import random_x
from tests.marks import slow_but
from tests.metal import Metal, needs_emulator
from tests.reference import Array

EXPERTS = 3


def experts(
    out: int, wide: int, group: int, dtype: mx.Dtype = mx.float16
) -> tuple[mx.array, mx.array, Array]:
    """Rows, tiles of scales, and the weights (EXPERTS, out, wide) in float64."""
    rng = np.random.default_rng([out, wide, group])
    trits = rng.integers(-1, 2, (EXPERTS, out, wide), dtype=np.int8)
    values = rng.uniform(0.5, 2, (EXPERTS, out, wide // group)) / wide**0.5
    scales = mx.array(values).astype(dtype)
    tiles = mx.array(tile_scales(np.array(scales.view(mx.uint16)))).view(dtype)
    each = np.array(scales.astype(mx.float32), np.float64)
    return mx.array(pack_rows(trits)), tiles, trits * np.repeat(each, group, axis=-1)


def assert_products(y: mx.array, x: Array, weights: Array, indices: Array) -> None:
    """y (pairs, out), of x (pairs, in)."""
    exact = np.einsum("pk,pnk->pn", x.astype(np.float64), weights[indices])
    np.testing.assert_allclose(as_array(y), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("out", "wide", "group"), [(13, 320, 64), (24, 128, 128), (9, 2048, 128), (3, 448, 64)]
)
@pytest.mark.parametrize("share", slow_but([2], [1, 2]))
def test_every_shape(out: int, wide: int, group: int, share: int, metal: Metal):
    rows, scales, weights = experts(out, wide, group)
    x = random_x(share, (3, wide), mx.float32)
    indices = np.array([2, 0, 1, 1, 2, 0][: 3 * share], np.uint32)
    y = tq1_0_qmv_groups(x, rows, scales, mx.array(indices))
    assert y.dtype == mx.float32 and metal.names == ["tq1_0_qmv_groups"]
    assert_products(y, np.repeat(as_array(x), share, axis=0), weights, indices)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_every_dtype(dtype: mx.Dtype, metal: Metal):
    rows, scales, weights = experts(16, 640, 128, dtype)
    indices = np.array([1, 2], np.uint32)
    for x in (random_x(1, (2, 640), t) for t in (mx.float16, mx.bfloat16)):
        y = tq1_0_qmv_groups(x, rows, scales, mx.array(indices))
        assert_products(y, as_array(x), weights, indices)


def test_an_expert_is_a_linear_layer(metal: Metal):
    """Bit for bit: the same sums in the same order."""
    rows, scales, _ = experts(21, 640, 128)
    x = random_x(2, (2, 640), mx.float32)
    y = tq1_0_qmv_groups(x, rows, scales, mx.array([2, 2], mx.uint32))
    np.testing.assert_array_equal(y, tq1_0_linear(x, rows[2], scales[2]))


@pytest.mark.parametrize("size", slow_but([4], [2, 4, 8]))
@pytest.mark.parametrize("share", slow_but([2], [1, 2]))
def test_blocks_of_pairs_have_the_same_bits(size: int, share: int, metal: Metal):
    """Experts with one pair, some pairs, a full block and one that is not."""
    rows, scales, weights = experts(13, 448, 64)
    chosen = np.array([2] + [1] * (size + 3) + [0] * 2 + [1] * (2 - size % 2), np.uint32)
    pairs = len(chosen) - len(chosen) % share
    x, indices = random_x(4, (pairs // share, 448), mx.float16), mx.array(chosen[:pairs])
    alone = tq1_0_qmv_groups(x, rows, scales, indices)
    blocks = tq1_0_sort(indices, EXPERTS, size)
    found = tq1_0_qmv_groups(x, rows, scales, indices, blocks=blocks)
    np.testing.assert_array_equal(found, alone)
    assert_products(found, np.repeat(as_array(x), share, axis=0), weights, chosen[:pairs])
    assert metal.names == ["tq1_0_qmv_groups", "tq1_0_sort", "tq1_0_qmv_groups"]


@needs_emulator
def test_costs_of_blocks():
    """Four pairs of one expert; a block of fewer takes the time of few."""
    rows, scales, _ = experts(64, 5120, 128)
    found = {}
    for pairs in (1, 3, 4):
        indices = mx.array([1] * pairs, mx.uint32)
        with virtual_metal() as metal:
            blocks = tq1_0_sort(indices, EXPERTS, 4)
            x = random_x(0, (pairs, 5120), mx.float16)
            tq1_0_qmv_groups(x, rows, scales, indices, blocks=blocks)
        cost = metal.launches[1].cost
        found[pairs] = cost.per_weight(64 * 5120).main
        assert cost.registers <= 135
        assert not {"private load", "private store"} & set(cost.instructions)
    assert found[1] < 2.8 and found[3] < 5.2 and found[4] < 6.3


@pytest.fixture
def emulated() -> Iterator[VirtualMetal]:
    with virtual_metal(count=False) as metal:
        yield metal


@pytest.mark.parametrize(
    ("size", "launched"),
    [
        (1, ["tq1_0_qmv_groups"]),
        (4, ["tq1_0_sort", "tq1_0_qmv_groups"]),
        (0, ["tq1_0_to_affine2"]),
    ],
)
def test_products_of_a_layer(
    size: int, launched: list[str], emulated: VirtualMetal, monkeypatch: pytest.MonkeyPatch
):
    """One by one, in blocks, or with converted experts; training and gradients are in plain MLX."""
    monkeypatch.setattr(ops, "pairs_in_a_block", lambda *_: size)
    tokens = 40
    rows, scales, weights = experts(13, 640, 64)
    x = random_x(3, (tokens, 1, 1, 640), mx.float32)
    indices = np.random.default_rng(0).integers(0, EXPERTS, (tokens, 2)).astype(np.uint32)
    wide = np.repeat(as_array(x)[:, 0, 0], 2, axis=0)

    def product(x: mx.array, training: bool) -> mx.array:
        return rows_product(x, mx.array(indices), rows, scales, training=training)

    for training in (False, True):
        y = product(x, training)
        assert y.shape == (tokens, 2, 1, 13)
        assert_products(y.reshape(-1, 13), wide, weights, indices.flatten())
        gradient = mx.grad(lambda x, training=training: product(x, training).sum())(x)
        exact = weights[indices].sum((1, 2))
        np.testing.assert_allclose(as_array(gradient)[:, 0, 0], exact, rtol=1e-4, atol=1e-5)
    assert emulated.names == launched * 2


@needs_emulator
@pytest.mark.parametrize(("wide", "main", "second"), [(5120, 2.6, 0.45), (2048, 2.95, 0.55)])
def test_costs(wide: int, main: float, second: float):
    rows, scales, _ = experts(64, wide, 128)
    with virtual_metal() as metal:
        tq1_0_qmv_groups(random_x(0, (1, wide), mx.float16), rows, scales, mx.array([1], mx.uint32))
    cost = metal.launches[0].cost
    weight = cost.per_weight(64 * wide)
    assert weight.main <= main and weight.second <= second and cost.threads == 1024


def test_wrong_arguments():
    rows, scales, _ = experts(16, 128, 64)
    x, indices = mx.zeros((1, 128)), mx.zeros((2,), mx.uint32)
    for arguments, message in (
        ((x[0], rows, scales, indices), "x is"),
        ((x, rows[0], scales[0], indices), "rows are"),
        ((x, rows, scales[0], indices), "scales are"),
        ((x, rows, mx.zeros((EXPERTS, 16)), indices), "expected tiles"),
        ((x, rows, scales, indices.astype(mx.int32)), "indices are"),
        ((mx.zeros((3, 128)), rows, scales, indices), "3 vectors"),
        ((x[:0], rows, scales, indices), "0 vectors"),
    ):
        with pytest.raises(ValueError, match=message):
            tq1_0_qmv_groups(*arguments)
    with pytest.raises(ValueError, match="blocks are"):
        tq1_0_qmv_groups(x, rows, scales, indices, blocks=indices)
    assert tq1_0_qmv_groups(x, rows, scales, indices[:0]).shape == (0, 16)
