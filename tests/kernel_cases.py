"""Random experts in packed rows, the exact products with them, and how far float32 may be off."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from tests.engine import as_array, pack_rows
from tests.reference import Array

ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Matrices:
    """Experts' matrices: trits (E, N, K) int8, scales (E, N) float32, and both as arrays."""

    trits: Array
    scales: Array

    @property
    def rows(self) -> mx.array:
        """(E, N, row_bytes) uint8."""
        return mx.array(pack_rows(self.trits))

    @property
    def packed(self) -> tuple[mx.array, mx.array]:
        """Rows and scales."""
        return self.rows, mx.array(self.scales)


def random_matrices(seed: int, experts: int, out: int, wide: int) -> Matrices:
    """Trits of equal probability, scales that keep products near 1."""
    rng = np.random.default_rng([seed, experts, out, wide])
    scales = rng.uniform(0.5, 2.0, (experts, out)) / (wide * 2 / 3) ** 0.5
    trits = rng.integers(-1, 2, (experts, out, wide), dtype=np.int8)
    return Matrices(trits, scales.astype(np.float32))


def random_x(seed: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Standard normal."""
    x = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
    return mx.array(x).astype(dtype)


def random_experts(seed: int, tokens: int, k: int, experts: int) -> Array:
    """(tokens, k) uint32, none twice in a token."""
    rng = np.random.default_rng([seed, tokens, k, experts])
    rows = [rng.choice(experts, k, replace=False) for _ in range(tokens)]
    return np.array(rows, np.uint32).reshape(tokens, k)


def products(x: Array, m: Matrices, indices: Array, loss: float = 1.0) -> tuple[Array, Array]:
    """Exact products of x (T, K) or (T, k, K) with the experts `indices` (T, k), and a bound.

    The bound on the error holds for every order of summation that the kernels use: twenty
    products and their offset to a word, words to a lane, lanes to a row. `loss` is how much
    larger than x what a variant adds up may be.

    Returns:
        (T, k, N) float64 each.
    """
    x = np.asarray(x, np.float64)
    if x.ndim == 2:
        x = np.repeat(x[:, None], indices.shape[1], axis=1)
    scales = m.scales.astype(np.float64)[indices]
    exact = np.einsum("tjnk,tjk->tjn", m.trits[indices].astype(np.float64), x) * scales
    words = -(-x.shape[-1] // 640)
    most = (50 + words) * loss * 2.0**-24 * np.abs(x).sum(-1)[..., None] * np.abs(scales)
    return exact, most


def swiglu(x: mx.array, gate: Matrices, up: Matrices, indices: Array) -> tuple[Array, Array]:
    """silu(gate x) * (up x) exactly, (T, k, N) float64, and a bound on the error."""
    g, g_off = products(as_array(x), gate, indices)
    u, u_off = products(as_array(x), up, indices)
    silu = g / (1 + np.exp(-g))
    exact = silu * u
    return exact, 1.1 * g_off * (np.abs(u) + u_off) + np.abs(silu) * u_off + 1e-6 * np.abs(exact)


def mixed(
    h: mx.array, down: Matrices, indices: Array, weights: Array, shared: mx.array
) -> tuple[Array, Array]:
    """shared + sum of weight * (down h), exactly, (T, N) float64, and a bound on the error."""
    y, off = products(as_array(h), down, indices)
    w = weights.astype(np.float64)[..., None]
    base = as_array(shared).astype(np.float64)
    exact = base + (y * w).sum(1)
    off = (off * np.abs(w)).sum(1) + 2.0**-22 * (np.abs(y * w).sum(1) + np.abs(base))
    return exact, off + ROUNDING[shared.dtype] * (np.abs(exact) + off) + 1e-7


def assert_within(actual: mx.array, expected: tuple[Array, Array]) -> None:
    """Every element is within its bound of the exact value."""
    exact, off = expected
    found = as_array(actual).astype(np.float64)
    assert found.shape == exact.shape
    excess = np.abs(found - exact) / off
    worst = np.unravel_index(np.argmax(np.nan_to_num(excess, nan=np.inf)), excess.shape)
    assert excess[worst] <= 1, f"{worst}: {found[worst]} is not {exact[worst]} ± {off[worst]:.2g}"
