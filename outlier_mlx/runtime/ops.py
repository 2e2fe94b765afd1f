"""Operations on ternary experts: which of them run in Metal kernels, and their gradients.

There is one arithmetic, float32 sums of trits times x, times the row's scale. On a GPU, few pairs
of a token and an expert go through the decode kernels; for many, the experts are transcoded and
MLX's own matrix kernels multiply a copy that does not outlive the product. A custom kernel has no
gradient, so gradients are those of the same operation in plain MLX.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.activations import swiglu

from .affine2 import affine_product, rows_to_affine2, spread_scales
from .kernels import tq1_0_down, tq1_0_qmv, tq1_0_swiglu, tq1_0_to_affine2

# Pairs of one expert that a tile of MLX's sorted `gather_qmm` has room for.
TILE_PAIRS = 16


def use_metal() -> bool:
    """Whether what is computed now runs on a GPU. Nothing else decides about the device."""
    return mx.metal.is_available() and (sys.platform != "darwin" or mx.default_device() == mx.gpu)


def use_matrix_kernels(pairs: int, experts: int) -> bool:
    """Whether to transcode all experts once rather than decode an expert for every pair.

    Transcoding reads and writes each expert, then MLX multiplies it with a tile of pairs in the
    time of one: that is worth it from a full tile an expert on.

    Args:
        pairs: (token, expert) pairs.
        experts: experts of the layer.
    """
    return pairs >= TILE_PAIRS * experts


def weighted_sum(shared: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
    """Add experts (..., k, hidden), weighted by weights (..., k), to shared (..., hidden).

    Returns:
        (..., hidden) of the dtype of `shared`: computed in float32, rounded once.
    """
    routed = (experts * weights[..., None]).sum(axis=-2)
    return (shared.astype(mx.float32) + routed).astype(shared.dtype)


def with_gradient_of(
    plain: Callable[..., mx.array],
    compute: Callable[..., mx.array],
    inputs: Sequence[mx.array],
    constants: Sequence[mx.array],
) -> mx.array:
    """compute(*inputs, *constants), whose gradients are those of `plain`, which equals it.

    Args:
        plain: in plain MLX.
        compute: in whatever way; it is never differentiated.
        inputs: what there are gradients for.
        constants: what there are none for: packed weights, indices.
    """
    run: Any = mx.custom_function(compute)

    def of_inputs(*given: mx.array) -> mx.array:
        return plain(*given, *constants)

    @run.vjp
    def vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        given = list(primals[: len(inputs)])
        gradients = mx.vjp(of_inputs, given, [cotangent])[1]
        return (*gradients, *(mx.zeros_like(p) for p in primals[len(inputs) :]))

    return run(*inputs, *constants)


def rows_product(
    x: mx.array,
    indices: mx.array,
    rows: mx.array,
    scales: mx.array,
    sorted_indices: bool = False,
    training: bool = False,
) -> mx.array:
    """Multiply x by packed experts, on a GPU.

    Args:
        x: (..., 1, in).
        indices: (...) experts, uint32.
        rows: (experts, out, row_bytes) uint8.
        scales: (experts, out) float32.
        sorted_indices: whether `indices` ascend.
        training: keeps to plain MLX. Transcoded weights are made again for the gradient, not kept.

    Returns:
        (..., 1, out) float32.
    """

    def plain(x: mx.array, indices: mx.array, rows: mx.array, scales: mx.array) -> mx.array:
        affine = rows_to_affine2(rows, scales, x.shape[-1])
        return affine_product(x, affine, indices, sorted_indices)

    compute = plain
    if not training:
        few = x.shape[-2] == 1 and not use_matrix_kernels(indices.size, rows.shape[0])
        compute = _decoded_product if few else _transcoded_product(sorted_indices)
    return with_gradient_of(plain, compute, [x], [indices, rows, scales])


def _decoded_product(x: mx.array, indices: mx.array, rows: mx.array, scales: mx.array) -> mx.array:
    batch = indices.shape
    # A vector may serve the neighbouring pairs of its token; what is broadcast otherwise is copied.
    if x.shape[:-2] not in (batch, (*batch[:-1], 1)):
        x = mx.broadcast_to(x, (*batch, *x.shape[-2:]))
    y = tq1_0_qmv(x.reshape(-1, x.shape[-1]), rows, scales, indices.flatten())
    return y.reshape(*batch, 1, -1)


def _transcoded_product(sorted_indices: bool) -> Callable[..., mx.array]:
    def product(x: mx.array, indices: mx.array, rows: mx.array, scales: mx.array) -> mx.array:
        # Without x to wait for, MLX might transcode every layer of a model before the first runs.
        rows = mx.depends([rows], [x])[0]
        codes = tq1_0_to_affine2(rows, x.shape[-1])
        affine = (codes, *spread_scales(scales, x.shape[-1]))
        return affine_product(x, affine, indices, sorted_indices)

    return product


def decoded_mix(
    x: mx.array,
    weights: mx.array,
    shared: mx.array,
    indices: mx.array,
    gate: tuple[mx.array, mx.array],
    up: tuple[mx.array, mx.array],
    down: tuple[mx.array, mx.array],
) -> mx.array:
    """shared + the weighted sum of each token's experts, in two launches.

    Args:
        x: (..., hidden), any activation dtype.
        weights: (..., k) float32.
        shared: (..., hidden) of the dtype of the result.
        indices: (..., k) uint32.
        gate: rows (experts, expert_size, row_bytes) and scales (experts, expert_size).
        up: as `gate`.
        down: rows (experts, hidden, row_bytes) and scales (experts, hidden).

    Returns:
        (..., hidden) of the dtype of `shared`: summed in float32, rounded once.
    """

    def compute(
        x: mx.array, weights: mx.array, shared: mx.array, indices: mx.array, *packed: mx.array
    ) -> mx.array:
        gate, gate_scales, up, up_scales, down, scales = packed
        h = tq1_0_swiglu(x, gate, gate_scales, up, up_scales, indices)
        return tq1_0_down(h, down, scales, indices, weights, shared)

    def plain(
        x: mx.array, weights: mx.array, shared: mx.array, indices: mx.array, *packed: mx.array
    ) -> mx.array:
        def product(x: mx.array, rows: mx.array, scales: mx.array) -> mx.array:
            affine = rows_to_affine2(rows, scales, x.shape[-1])
            return affine_product(x, affine, indices)

        gate, gate_scales, up, up_scales, down, scales = packed
        x = mx.expand_dims(x.astype(mx.float32), (-2, -3))
        h = swiglu(product(x, gate, gate_scales), product(x, up, up_scales))
        return weighted_sum(shared, product(h, down, scales).squeeze(-2), weights)

    inputs = [a.reshape(-1, a.shape[-1]) for a in (x, weights, shared)]
    constants = [indices.reshape(-1, indices.shape[-1]), *gate, *up, *down]
    return with_gradient_of(plain, compute, inputs, constants).reshape(shared.shape)
