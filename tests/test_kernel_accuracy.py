"""How far the decode kernels are from float64, with and without outlier features.

The unit is half an ulp of float16 at the size of a typical output, one without outliers: what
rounding the result to float16 costs anyway.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from kernels.accuracy import errors, half_ulp, planted
from outlier_mlx.runtime import kernels
from tests.engine import pack_rows
from tests.metal import Metal

# Largest error allowed: of rows whose trits are 0 where x is large, and of the others.
ZERO, OTHERS = 0.01, 1.0


@pytest.mark.parametrize("seed", range(4))
def test_five_dimensions_at_ten_thousand(seed: int, metal: Metal):
    x, trits, _ = planted(seed, 5120, 256, 5, 1e4)
    found = errors(x, trits)
    assert found[::2].max() <= ZERO
    assert found[1::2].max() <= OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("size", [1e3, 1e4])
@pytest.mark.parametrize("outliers", range(1, 6))
def test_outliers(together: bool, size: float, outliers: int, metal: Metal):
    for seed in range(4):
        x, trits, _ = planted(seed, 5120, 1024, outliers, size, together)
        found = errors(x, trits)
        assert found[::2].max() <= ZERO
        assert found[1::2].max() <= OTHERS


# Outliers, their size, whether all are in one word, and the errors that exactly decoded digits had
# in rows of five neighbours a byte: what this layout has to be as good as.
EXACT = [
    (0, 0.0, False, 0.001, 0.001),
    (1, 1e3, False, 0.001, 0.014),
    (5, 1e3, False, 0.001, 0.033),
    (1, 1e4, False, 0.001, 0.221),
    (5, 1e4, False, 0.001, 0.561),
    (5, 1e4, True, 0.001, 0.685),
]


@pytest.mark.parametrize(("outliers", "size", "together", "zero", "others"), EXACT)
def test_as_exact_as_exact_digits(
    outliers: int, size: float, together: bool, zero: float, others: float, metal: Metal
):
    """In every row of the page's table, to its three decimals."""
    found = [errors(*planted(s, 5120, 1024, outliers, size, together)[:2]) for s in range(4)]
    assert round(float(max(f[::2].max() for f in found)), 3) <= zero
    assert round(float(max(f[1::2].max() for f in found)), 3) <= others


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_without_outliers(dtype: mx.Dtype, metal: Metal):
    x, trits, _ = planted(1, 5120, 128, 0, 0)
    x = np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)).astype(np.float16)
    assert errors(x, trits, dtype).max() < 0.01


def test_a_trit_of_zero_adds_nothing(metal: Metal):
    """However large the activation is, the result has the same bits."""
    x, trits, dims = planted(0, 5120, 64, 5, 1e4)
    m = mx.array(pack_rows(trits[None])), mx.ones((1, 64)), mx.zeros((1,), mx.uint32)
    y = [kernels.tq1_0_qmv(mx.array(v[None]), *m) for v in (x, np.where(np.abs(x) > 100, 0, x))]
    np.testing.assert_array_equal(y[0][:, ::2], y[1][:, ::2])
    assert (np.array(y[0][:, 1::2]) != np.array(y[1][:, 1::2])).any() and len(dims) == 5


@pytest.mark.parametrize("seed", range(2))
def test_down_with_five_dimensions_at_ten_thousand(seed: int, metal: Metal):
    """Where language models have the largest: h, here of two experts at the width of a 14B."""
    made = [planted(seed + 10 * e, 13824, 64, 5, 1e4) for e in range(2)]
    h, trits = (np.stack([m[i] for m in made]) for i in (0, 1))
    y = kernels.tq1_0_down(
        mx.array(h[None]).astype(mx.float32),
        mx.array(pack_rows(trits)),
        mx.ones((2, 64)),
        mx.array([[0, 1]], mx.uint32),
        mx.array([[0.75, 0.25]]),
        mx.zeros((1, 64)),
    )
    each = np.einsum("enk,ek->en", trits.astype(np.float64), h.astype(np.float64))
    typical = (13824 * 2 / 3 * (0.75**2 + 0.25**2)) ** 0.5
    found = np.abs(np.array(y)[0] - [0.75, 0.25] @ each) / half_ulp(typical)
    assert found[::2].max() <= ZERO
    assert found[1::2].max() <= OTHERS


def test_swiglu_with_five_dimensions_at_ten_thousand(metal: Metal):
    """Rows of gate and up whose trits are 0 there: h is as exact as without outliers."""
    x, gate, dims = planted(3, 5120, 128, 5, 1e4)
    up = planted(4, 5120, 128, 0, 0)[1]
    up[::2, dims] = 0
    scale = 1 / 64
    scales, expert = mx.full((1, 128), scale), mx.zeros((1, 1), mx.uint32)
    rows = [mx.array(pack_rows(t)[None]) for t in (gate, up)]
    h = kernels.tq1_0_swiglu(mx.array(x[None]), rows[0], scales, rows[1], scales, expert)
    g, u = (t[::2].astype(np.float64) @ x.astype(np.float64) * scale for t in (gate, up))
    exact = g / (1 + np.exp(-g)) * u
    typical = float(np.sqrt(np.mean(exact**2)))
    assert np.abs(np.array(h)[0, 0, ::2] - exact).max() <= half_ulp(typical)
