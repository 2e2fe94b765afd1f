"""How far the decode kernels are from float64, with and without outlier features.

The unit is half an ulp of float16 at the size of a typical output, one without outliers: what
rounding the result to float16 costs anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import VirtualMetal, virtual_metal
from outlier_mlx.runtime import kernels
from outlier_mlx.runtime.kernels import Variant
from tests.engine import pack_rows
from tests.reference import Array


@pytest.fixture
def metal() -> Iterator[VirtualMetal]:
    with virtual_metal(count=False) as device:
        yield device


def half_ulp(typical: float) -> float:
    """Half the distance between float16 numbers near a value."""
    return 2.0 ** (np.floor(np.log2(typical)) - 11)


def planted(
    seed: int, wide: int, rows: int, outliers: int, size: float, together: bool = False
) -> tuple[Array, Array, Array]:
    """x (wide,) in float16 and trits (rows, wide): those of even rows are 0 where x is large.

    `together` puts the outliers into twenty neighbouring dimensions: one word of a row.
    """
    rng = np.random.default_rng([seed, wide, outliers])
    x = rng.standard_normal(wide)
    among = 20 * rng.integers(wide // 20) + np.arange(20) if together else np.arange(wide)
    dims = rng.choice(among, outliers, replace=False)
    x[dims] = size * rng.choice([-1, 1], outliers)
    trits = rng.integers(-1, 2, (rows, wide), dtype=np.int8)
    trits[::2, dims] = 0
    return x.astype(np.float16), trits, dims


def errors(x: Array, trits: Array, decode: str, dtype: mx.Dtype = mx.float16) -> Array:
    """Errors of `trits x` (rows,), in half ulps of a typical float16 output."""
    y = kernels.tq1_0_qmv(
        mx.array(x[None]).astype(dtype),
        mx.array(pack_rows(trits)[None]),
        mx.ones((1, len(trits))),
        mx.zeros((1,), mx.uint32),
        variant=Variant(decode=decode),
    )
    exact = trits.astype(np.float64) @ x.astype(np.float64)
    typical = (len(x) * 2 / 3) ** 0.5  # trits of equal probability, x of variance 1
    return np.abs(np.array(y)[0] - exact) / half_ulp(typical)


# Largest error allowed: of rows whose trits are 0 where x is large, and of the others.
ALLOWED = {"exponent": (0.5, 1.0), "exact": (0.01, 1.0)}


@pytest.mark.parametrize("decode", ALLOWED)
@pytest.mark.parametrize("seed", range(4))
def test_five_dimensions_at_ten_thousand(decode: str, seed: int, metal: VirtualMetal):
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
def test_outliers(decode: str, together: bool, size: float, outliers: int, metal: VirtualMetal):
    for seed in range(4):
        x, trits, _ = planted(seed, 5120, 1024, outliers, size, together)
        found = errors(x, trits, decode)
        zero, others = ALLOWED[decode]
        assert found[::2].max() <= zero
        assert found[1::2].max() <= others


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_without_outliers(dtype: mx.Dtype, metal: VirtualMetal):
    x, trits, _ = planted(1, 5120, 128, 0, 0)
    x = np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)).astype(np.float16)
    assert errors(x, trits, "exponent", dtype).max() < 0.01


def test_telescoping_is_worse(metal: VirtualMetal):
    """Why it is not the default: rows inherit the rounding of a product that they do not have."""
    x, trits, _ = planted(0, 5120, 256, 5, 1e4)
    assert errors(x, trits, "telescoped")[::2].max() > 1


@pytest.mark.parametrize("seed", range(2))
def test_down_with_five_dimensions_at_ten_thousand(seed: int, metal: VirtualMetal):
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


def test_swiglu_with_five_dimensions_at_ten_thousand(metal: VirtualMetal):
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
