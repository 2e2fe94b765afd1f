"""Whether this machine computes what it should: MLX's products, a layer of experts, the kernels.

What is expected is computed in NumPy, in float64, from numbers that every dtype holds exactly; so
an error can only come from rounding sums and results. `bench_kernels.excess` says how much that may
be; one wrong weight in a row is many times as much. The kernels are compared with plain MLX, whose
products have been compared with NumPy before.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from outlier_mlx.errors import one_line
from outlier_mlx.measure.bench_kernels import (
    ROUNDING,
    TOLERANCE,
    check_kernels,
    excess,
    mlx_dtype,
)
from outlier_mlx.measure.environment import dtype_name
from outlier_mlx.runtime.affine2 import ROWS
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.runtime.ops import use_metal
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.ternary import pack_rows

BITS, GROUPS = (2, 4), (32, 64, 128)
# A matrix, and numbers of vectors for which MLX has different kernels.
OUT, IN, VECTORS = 64, 512, (1, 40)
# Matrices to gather from, and numbers of pairs: some in any order, more of them sorted.
MATRICES, PAIRS, SORTED_PAIRS = 3, 6, 96
# A layer of experts, and numbers of tokens. Widths are such that every kernel takes them.
HIDDEN, WIDTH, EXPERTS, TOP_K, TOKENS = 512, 192, 8, 2, (1, 3, 33)


@dataclass(frozen=True)
class Check:
    """A computation, and what is wrong with its result; None: nothing."""

    name: str
    error: str | None


@dataclass(frozen=True)
class SelfTest:
    """What was checked.

    Attributes:
        checks: every computation.
        kernels: how many of them are kernels of this project; 0: there is no GPU.
    """

    checks: list[Check]
    kernels: int

    @property
    def wrong(self) -> list[Check]:
        """Those with a wrong result."""
        return [check for check in self.checks if check.error is not None]


def self_test(progress: Progress = no_progress) -> SelfTest:
    """Check MLX's quantized products, a layer of ternary experts and, on a GPU, every kernel.

    Args:
        progress: called with computations checked so far, and in all.
    """
    gpu = use_metal()
    dtypes = (mx.float32, mx.float16, mx.bfloat16) if gpu else (mx.float32,)
    todo = [*_products({mlx_dtype(dtype): None for dtype in dtypes}), *_layers(dtypes)]
    checks: list[Check] = []
    for name, run in todo:
        progress(len(checks), len(todo))
        checks.append(Check(name, _error(run)))
    kernels = [check for dtype in dtypes for check in _kernels(dtype, progress)] if gpu else []
    return SelfTest(checks + kernels, len(kernels))


def _kernels(dtype: mx.Dtype, progress: Progress) -> list[Check]:
    """Every kernel, on a layer's experts."""
    layer, _ = _layer()
    try:
        found = check_kernels(layer, dtype, progress)
    except (RuntimeError, ValueError) as error:  # of plain MLX
        found = {"kernels": _told(error)}
    return [Check(f"{name}, {dtype_name(dtype)}", error) for name, error in found.items()]


def _told(error: Exception) -> str:
    return one_line(str(error))[:200]


#: Computes a result, and gives what it should be, and the dtype whose roundings it has.
Run = Callable[[], tuple[mx.array, np.ndarray, mx.Dtype]]


def _error(run: Run) -> str | None:
    try:
        found, expected, dtype = run()
        mx.eval(found)
    except (RuntimeError, ValueError) as error:  # as when Metal does not compile a kernel
        return _told(error)
    if found.shape != expected.shape:
        return f"its shape is {found.shape}, not {expected.shape}"
    rounding = 8 * ROUNDING[dtype]
    times = excess(found, mx.array(expected.astype(np.float32)), (TOLERANCE + rounding, rounding))
    return f"its result is wrong: {times:.3g} times the error allowed" if times > 1 else None


def _products(dtypes: Iterable[mx.Dtype]) -> Iterator[tuple[str, Run]]:
    """MLX's products with quantized matrices, one matrix or several of them."""
    for dtype, bits, group in product(dtypes, BITS, GROUPS):
        how = f"{bits} bits, groups of {group}, {dtype_name(dtype)}"
        for vectors in VECTORS:
            name = f"quantized_matmul, {how}, {vectors} vector{'s' if vectors > 1 else ''}"
            yield name, _multiplying(dtype, bits, group, vectors)
        for pairs in (PAIRS, SORTED_PAIRS):
            name = f"gather_qmm, {how}, {pairs} vectors"
            yield name, _gathering(dtype, bits, group, pairs)


def _multiplying(dtype: mx.Dtype, bits: int, group: int, vectors: int) -> Run:
    def run() -> tuple[mx.array, np.ndarray, mx.Dtype]:
        draw = np.random.default_rng(0)
        x, (arrays, weight) = _exact(draw, (vectors, IN)), _matrices(draw, bits, group)
        one = [mx.array(array[0]) for array in arrays]
        scales, biases = (array.astype(dtype) for array in one[1:])
        given: Any = {"group_size": group, "bits": bits}
        y = mx.quantized_matmul(mx.array(x).astype(dtype), one[0], scales, biases, **given)
        return y, x.astype(np.float64) @ weight[0].T, dtype

    return run


def _gathering(dtype: mx.Dtype, bits: int, group: int, pairs: int) -> Run:
    def run() -> tuple[mx.array, np.ndarray, mx.Dtype]:
        draw = np.random.default_rng(1)
        x, (arrays, weight) = _exact(draw, (pairs, 1, IN)), _matrices(draw, bits, group)
        indices, in_order = draw.integers(0, MATRICES, pairs, np.uint32), pairs == SORTED_PAIRS
        indices = np.sort(indices) if in_order else indices
        packed, scales, biases = map(mx.array, arrays)
        y = mx.gather_qmm(
            mx.array(x).astype(dtype),
            packed,
            scales.astype(dtype),
            biases.astype(dtype),
            rhs_indices=mx.array(indices),
            transpose=True,
            group_size=group,
            bits=bits,
            sorted_indices=in_order,
        )
        return y, x.astype(np.float64) @ weight[indices].swapaxes(1, 2), dtype

    return run


def _exact(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Eighths from -2 to 2: bfloat16 holds them exactly."""
    return (draw.integers(-16, 17, shape) / 8).astype(np.float32)


def _matrices(
    draw: np.random.Generator, bits: int, group: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Random matrices in MLX's affine format, and their weights (matrices, out, in) in float64.

    A word of 32 bits has its codes in ascending bits; a weight is scale · code + bias of its group.
    """
    codes = draw.integers(0, 1 << bits, (MATRICES, OUT, IN), np.uint32)
    words = codes.reshape(MATRICES, OUT, -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)
    packed = np.bitwise_or.reduce(words, axis=-1)
    shape = MATRICES, OUT, IN // group
    scales = (draw.integers(1, 16, shape) / 64).astype(np.float32)
    biases = (draw.integers(-15, 16, shape) / 64).astype(np.float32)
    weight = codes * np.repeat(scales, group, -1).astype(np.float64) + np.repeat(biases, group, -1)
    return (packed, scales, biases), weight


@dataclass(frozen=True)
class _Experts:
    """What a layer holds, in float64: matrices (experts, out, in), router, alphas."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    router: np.ndarray
    alpha: np.ndarray

    def routed(self, x: np.ndarray) -> np.ndarray:
        """The weighted sum of the experts of each token: x (tokens, hidden) to the same shape."""
        y = np.zeros_like(x)
        for token, logits in enumerate(x @ self.router.T):
            chosen = np.argsort(-logits, kind="stable")[:TOP_K]  # ties go to the lower number
            weights = np.exp(logits[chosen] - logits[chosen].max())
            for expert, weight in zip(chosen, weights / weights.sum(), strict=True):
                g, u = self.gate[expert] @ x[token], self.up[expert] @ x[token]
                h = g / (1 + np.exp(-g)) * u
                y[token] += weight * self.alpha[expert] * (self.down[expert] @ h)
        return y


def _layers(dtypes: Iterable[mx.Dtype]) -> Iterator[tuple[str, Run]]:
    """A MoE layer, in which the numbers of tokens decide how the experts are multiplied."""
    layer, experts = _layer()
    for dtype, tokens in product(dtypes, TOKENS):
        name = f"a layer of experts, {dtype_name(dtype)}, {tokens} token{'s' if tokens > 1 else ''}"
        yield name, _running(layer, experts, dtype, tokens)


def _running(layer: OutlierMoE, experts: _Experts, dtype: mx.Dtype, tokens: int) -> Run:
    def run() -> tuple[mx.array, np.ndarray, mx.Dtype]:
        x = _exact(np.random.default_rng(2), (tokens, HIDDEN))
        wide = x.astype(np.float64)
        y = layer(mx.array(x).astype(dtype)[None])[0]
        return y, wide + experts.routed(wide), dtype

    return run


def _layer() -> tuple[OutlierMoE, _Experts]:
    """A layer of random ternary experts, whose shared FFN gives back its input."""
    draw = np.random.default_rng(3)
    layer = OutlierMoE(nn.Identity(), HIDDEN, WIDTH, EXPERTS, TOP_K, ROWS)
    matrices = []
    switch = layer.switch_mlp
    for linear, (out, wide) in zip(
        (switch.gate_proj, switch.up_proj, switch.down_proj),
        ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)),
        strict=True,
    ):
        trits = draw.integers(-1, 2, (EXPERTS, out, wide), np.int8)
        scales = (draw.integers(1, 16, (EXPERTS, out)) / 256).astype(np.float32)
        linear.weight, linear.scales = mx.array(pack_rows(trits)), mx.array(scales)
        linear.prepare()
        matrices.append(trits * scales[..., None].astype(np.float64))
    router = draw.integers(-16, 17, (EXPERTS, HIDDEN)) / 64
    alpha = draw.integers(1, 9, EXPERTS) / 8
    layer.gate.weight = mx.array(router.astype(np.float32))
    layer.alpha = mx.array(alpha.astype(np.float32))
    mx.eval(layer.parameters())
    layer.eval()
    gate, up, down = matrices
    return layer, _Experts(gate, up, down, router, alpha)
