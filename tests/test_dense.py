"""Linear layers with ternary weights: the kernel in the emulator and plain MLX, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from kernels.accuracy import half_ulp, planted
from kernels.emulator import VirtualMetal, virtual_metal
from outlier_mlx.runtime import groups
from outlier_mlx.runtime.affine2 import rows_to_affine2
from outlier_mlx.runtime.dense import ternary_linear
from outlier_mlx.runtime.groups import tq1_0_linear
from outlier_mlx.ternary.rows import pack_rows
from outlier_mlx.ternary.scales import tile_scales
from tests.engine import as_array
from tests.kernel_cases import ROUNDING, random_x
from tests.marks import slow_but
from tests.metal import Metal, needs_emulator
from tests.reference import Array

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Rows, width and group (0: a scale for each row): whole tiles or not; digits 1 to 4 that begin in
# the middle of a group; the last digit's part shorter than a row's bytes.
GROUPED = [(24, 128, 128), (13, 320, 64), (9, 2048, 128), (17, 1536, 64), (11, 448, 64)]
WHOLE = [(13, 321, 0), (8, 8, 0), (19, 1000, 0), (16, 1282, 0)]


@dataclass(frozen=True)
class Layer:
    """Trits (N, K), scales of each weight (N, K) float64, and what the product takes."""

    trits: Array
    weights: Array
    rows: mx.array
    scales: mx.array

    def product(self, x: mx.array) -> Array:
        """x times the weights, float64."""
        return as_array(x).astype(np.float64) @ self.weights.T

    def assert_product(self, x: mx.array, y: mx.array) -> None:
        """y has the dtype of x, and is as near as sums in float32 and one rounding are."""
        exact = self.product(x)
        assert y.dtype == x.dtype and y.shape == exact.shape
        sums = np.abs(as_array(x).astype(np.float64)) @ np.abs(self.weights).T
        steps = 12 + self.trits.shape[1] // 320  # additions one after the other for an element
        allowed = steps * 2.0**-24 * sums + ROUNDING[x.dtype] * np.abs(exact) + 1e-6
        excess = np.abs(as_array(y).astype(np.float64) - exact) / allowed
        assert excess.max() <= 1, excess.max()


def layer(out: int, wide: int, group: int, dtype: mx.Dtype = mx.float16) -> Layer:
    rng = np.random.default_rng([out, wide, group])
    trits = rng.integers(-1, 2, (out, wide), dtype=np.int8)
    values = rng.uniform(0.5, 2, (out, wide // group if group else 1)) / wide**0.5
    if group == 0:
        scales = mx.array(values[:, 0].astype(np.float32))
        each = np.array(scales, np.float64)[:, None]
    else:
        logical = mx.array(values).astype(dtype)
        bits = np.array(logical.view(mx.uint16))
        scales = mx.array(tile_scales(bits)).view(dtype)
        each = np.repeat(np.array(logical.astype(mx.float32), np.float64), group, axis=1)
    return Layer(trits, trits * each, mx.array(pack_rows(trits)), scales)


# The kernel


@pytest.mark.parametrize(
    ("out", "wide", "group"), slow_but(GROUPED[1:3] + WHOLE[:1], GROUPED + WHOLE, names=3)
)
@pytest.mark.parametrize("vectors", [1, 3])
def test_every_shape(out: int, wide: int, group: int, vectors: int, metal: Metal):
    m, x = layer(out, wide, group), random_x(vectors, (vectors, wide), mx.float32)
    m.assert_product(x, ternary_linear(x, m.rows, m.scales))
    assert metal.names == ["tq1_0_linear"]


@pytest.mark.parametrize("vectors", slow_but([2, 5, 13], [1, 2, 3, 4, 5, 6, 7, 8, 9, 13]))
@pytest.mark.parametrize("group", [0, 64, 128])
def test_every_number_of_vectors(group: int, vectors: int, metal: Metal):
    m, x = layer(21, 640, group), random_x(vectors, (vectors, 640), mx.float32)
    m.assert_product(x, ternary_linear(x, m.rows, m.scales))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [mx.float16, mx.bfloat16])
def test_every_dtype(dtype: mx.Dtype, scale_dtype: mx.Dtype, metal: Metal):
    m, x = layer(16, 640, 128, scale_dtype), random_x(1, (2, 3, 640), dtype)
    m.assert_product(x, ternary_linear(x, m.rows, m.scales))
    m = layer(16, 640, 0)
    m.assert_product(x, ternary_linear(x, m.rows, m.scales))


@pytest.mark.parametrize(
    ("wide", "group"), slow_but([(640, 128), (321, 0)], [(576, 64), (640, 128), (321, 0)], names=2)
)
def test_a_vector_has_the_same_bits_whoever_shares_the_launch(wide: int, group: int, metal: Metal):
    m, x = layer(13, wide, group), random_x(2, (11, wide), mx.float16)
    alone = mx.concatenate([tq1_0_linear(x[i : i + 1], m.rows, m.scales) for i in range(11)])
    for size in groups.SLICES if group == 64 else (2, 8):
        together = tq1_0_linear(x, m.rows, m.scales, size=size)
        np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(tq1_0_linear(x[3:6], m.rows, m.scales), alone[3:6])


def test_every_byte(metal: Metal):
    """All byte values at all of the places that lanes share, by products with powers of three."""
    rows = (np.arange(256)[:, None] + 37 * np.arange(16)).astype(np.uint8)
    digits = rows[..., None].astype(np.int64) * 3 ** np.arange(1, 6) // 256 % 3
    trits = np.swapaxes(digits - 1, 1, 2).reshape(256, 80)
    x = np.zeros((8, 80), np.float32)
    for i in range(80):
        x[i // 10, i] = 3.0 ** (i % 10)
    y = tq1_0_linear(mx.array(x), mx.array(rows), mx.ones((256,)))
    np.testing.assert_array_equal(y, x.astype(np.float64) @ trits.T)


def test_slices():
    expected = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8, 9: 8, 32: 8}
    assert {n: groups.slice_size(n) for n in expected} == expected


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("group", [0, 128])
def test_outliers(group: int, together: bool, metal: Metal):
    """Five activations of 1e4, in half ulps of a typical float16 output. Trits of 0 are exact."""
    x, trits, _ = planted(1, 5120, 512, 5, 1e4, together)
    scales = mx.ones((512,)) if group == 0 else mx.ones((64, 5120 // group, 8), mx.float16)
    y = tq1_0_linear(mx.array(x[None].astype(np.float32)), mx.array(pack_rows(trits)), scales)
    exact = trits.astype(np.float64) @ x.astype(np.float64)
    errors = np.abs(as_array(y)[0] - exact) / half_ulp((5120 * 2 / 3) ** 0.5)
    assert errors[::2].max() < 0.002 and errors[1::2].max() < 0.7


@needs_emulator
@pytest.mark.parametrize(("wide", "main", "second"), [(5120, 2.6, 0.45), (2048, 2.95, 0.5)])
def test_costs(wide: int, main: float, second: float):
    m = layer(64, wide, 128)
    with virtual_metal() as metal:
        tq1_0_linear(random_x(0, (1, wide), mx.float16), m.rows, m.scales)
    cost = metal.launches[0].cost
    weight = cost.per_weight(64 * wide, ("rows", "scales"))
    assert weight.main <= main and weight.second <= second
    assert weight.bytes == pytest.approx((m.rows.nbytes + m.scales.nbytes) / m.trits.size)
    assert cost.threads == 1024 and cost.loop_bytes <= 8192


@needs_emulator
@pytest.mark.slow
def test_costs_of_several_vectors():
    """1.4 cycles and 1.15 for each vector; a last slice costs what its vectors cost."""
    m, found = layer(64, 5120, 128), {}
    for vectors in (1, 2, 4, 8, 9):
        with virtual_metal() as metal:
            tq1_0_linear(random_x(0, (vectors, 5120), mx.float16), m.rows, m.scales)
        cost = metal.launches[0].cost
        found[vectors] = cost.per_weight(64 * 5120).main
        assert cost.registers <= 135 and cost.loop_bytes <= 8192
        assert not {"private load", "private store"} & set(cost.instructions)
        assert found[vectors] < 1.5 + 1.15 * vectors + (1.5 if vectors > 8 else 0)


# Which way


@pytest.fixture
def emulated() -> Iterator[VirtualMetal]:
    with virtual_metal(count=False) as metal:
        yield metal


@pytest.mark.parametrize("group", [0, 64, 128])
def test_many_vectors_are_multiplied_by_mlx(group: int, emulated: VirtualMetal):
    m, x = layer(24, 640, group), random_x(4, (33, 640), mx.float32)
    m.assert_product(x, ternary_linear(x, m.rows, m.scales))
    assert emulated.names == ["tq1_0_to_affine2"]
    emulated.clear()
    m.assert_product(x, ternary_linear(x, m.rows, m.scales, training=True))
    assert ternary_linear(x[:0], m.rows, m.scales).shape == (0, 24)
    assert emulated.names == []


def test_narrow_layers_are_multiplied_by_mlx(emulated: VirtualMetal):
    for out, wide in ((7, 64), (8, 7)):
        m, x = layer(out, wide, 0), random_x(5, (2, wide), mx.float32)
        m.assert_product(x, ternary_linear(x, m.rows, m.scales))
    assert emulated.names == ["tq1_0_to_affine2"] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 64, 128])
def test_the_cpu(dtype: mx.Dtype, group: int):
    m, x = layer(13, 640, group), random_x(6, (2, 2, 640), dtype)
    m.assert_product(x, ternary_linear(x, m.rows, m.scales))
    affine = rows_to_affine2(m.rows, m.scales, 640)
    m.assert_product(x, ternary_linear(x, m.rows, m.scales, affine=affine))


@pytest.mark.parametrize("vectors", [3, 40])
@pytest.mark.parametrize("group", [0, 128])
def test_gradients(vectors: int, group: int, emulated: VirtualMetal):
    m, x = layer(13, 640, group), random_x(7, (vectors, 640), mx.float32)
    w = random_x(8, (vectors, 13), mx.float32)
    for training in (False, True):

        def loss(x: mx.array, training: bool = training) -> mx.array:
            return (ternary_linear(x, m.rows, m.scales, training=training) * w).sum()

        found = mx.grad(loss)(x)
        np.testing.assert_allclose(found, as_array(w) @ m.weights, rtol=1e-4, atol=1e-5)
    assert emulated.names == ["tq1_0_linear" if vectors == 3 else "tq1_0_to_affine2"]


def test_wrong_arguments():
    m, x = layer(16, 128, 64), mx.zeros((1, 128))
    whole = mx.zeros((16,))
    for arguments, message in (
        ((x.astype(mx.int32), m.rows, m.scales), "x is"),
        ((mx.zeros((1, 64)), m.rows, m.scales), "rows are"),
        ((x, m.rows[None], m.scales), "rows are"),
        ((x, m.rows.astype(mx.int8), m.scales), "rows are"),
        ((x, m.rows, whole.astype(mx.float16)), "scales are"),
        ((x, m.rows, m.scales.astype(mx.float32)), "scales are"),
        ((x, m.rows, m.scales[:1]), "scales are"),
        ((x, m.rows, mx.zeros((2, 4, 8), mx.float16)), "scales are"),
        ((x, m.rows, whole[:8]), "scales are"),
    ):
        with pytest.raises(ValueError, match=message):
            ternary_linear(*arguments)
    with pytest.raises(ValueError, match="tq1_0_linear"):
        tq1_0_linear(x[None], m.rows, m.scales)
