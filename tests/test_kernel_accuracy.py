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
ALLOWED = {"exponent": (0.5, 1.0), "exact": (0.01, 1.0)}


@pytest.mark.parametrize("decode", ALLOWED)
@pytest.mark.parametrize("seed", range(4))
def test_five_dimensions_at_ten_thousand(decode: str, seed: int, metal: Metal):
    x, trits, _ = planted(seed, 5120, 256, 5, 1e4)
    found = errors(x, trits, decode)
    zero, others = ALLOWED[decode]
    assert found[::2].max() <= zero
    assert found[1::2].max() <= others


@pytest.mark.slow
@pytest.mark.parametrize("decode", ALLOWED)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("size", [1e3, 1e4])
@pytest.mark.parametrize("outliers", range(1, 6))
def test_outliers(decode: str, together: bool, size: float, outliers: int, metal: Metal):
    for seed in range(4):
        x, trits, _ = planted(seed, 5120, 1024, outliers, size, together)
        found = errors(x, trits, decode)
        zero, others = ALLOWED[decode]
        assert found[::2].max() <= zero
        assert found[1::2].max() <= others


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_without_outliers(dtype: mx.Dtype, metal: Metal):
    x, trits, _ = planted(1, 5120, 128, 0, 0)
    x = np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)).astype(np.float16)
    assert errors(x, trits, "exponent", dtype).max() < 0.01


def test_telescoping_is_worse(metal: Metal):
    """Why it is not the default: rows inherit the rounding of a product that they do not have."""
    x, trits, _ = planted(0, 5120, 256, 5, 1e4)
    assert errors(x, trits, "telescoped")[::2].max() > 1


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
    assert found[::2].max() <= 0.5
    assert found[1::2].max() <= 1.0


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
