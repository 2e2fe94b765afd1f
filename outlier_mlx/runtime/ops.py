"""Operations on ternary experts: the choice between Metal kernels and plain MLX, and gradients.

All ways compute the same: a float32 sum of trits times x, times the row's scale. On a GPU, a small
number of (token, expert) pairs goes through the decode kernels. For many pairs, the experts are
converted to affine 2-bit, and MLX's own matrix kernels multiply this temporary copy. A custom
kernel has no gradient, so gradients are those of the same operation in plain MLX.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.activations import swiglu

from .affine2 import affine_product, affine_scales, rows_to_affine2
from .groups import tq1_0_qmv_groups
from .kernels import (
    can_convert,
    can_decode,
    tq1_0_down,
    tq1_0_qmv,
    tq1_0_swiglu,
    tq1_0_to_affine2,
)

# Least number of (token, expert) pairs that are sorted by expert, so that MLX's matrix kernels read
# each expert once. mlx-lm uses the same number.
SORT_FROM_PAIRS = 64
# Number of pairs of one expert in a tile of these kernels.
TILE_PAIRS = 16


def use_metal() -> bool:
    """Whether operations run on a GPU now. All code asks this function only."""
    return mx.metal.is_available() and (sys.platform != "darwin" or mx.default_device() == mx.gpu)


def use_decoding(indices: mx.array, experts: int, *widths: int) -> bool:
    """Whether the decode kernels multiply now: for few pairs, if they take the sizes.

    Args:
        indices: (..., k) numbers of the experts of each token.
        experts: number of experts of the layer.
        widths: widths of inputs and outputs.
    """
    k = indices.shape[-1]
    tokens = indices.size // max(1, k)
    few = not use_matrix_kernels(indices.size, experts)
    return use_metal() and few and can_decode(tokens, experts, k, *widths)


def use_matrix_kernels(pairs: int, experts: int) -> bool:
    """Whether to convert all experts once instead of decoding an expert for every pair.

    Conversion reads and writes each expert; then MLX multiplies an expert with a whole tile of
    pairs in the time of one pair. It is faster from one full tile per expert on, if pairs are
    sorted.

    Args:
        pairs: number of (token, expert) pairs.
        experts: number of experts of the layer.
    """
    return pairs >= max(SORT_FROM_PAIRS, TILE_PAIRS * experts)


def weighted_sum(shared: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
    """Add the weighted sum of experts to the shared expert.

    Args:
        shared: (..., hidden).
        experts: (..., k, hidden).
        weights: (..., k).

    Returns:
        (..., hidden) of the dtype of `shared`: computed in float32, rounded once.
    """
    routed = (experts * weights[..., None]).sum(axis=-2)
    return (shared.astype(mx.float32) + routed).astype(shared.dtype)


def with_gradient_of(
    plain: Callable[..., mx.array], compute: Callable[..., mx.array], inputs: int
) -> Callable[..., mx.array]:
    """Give `compute` the gradients of `plain`.

    Args:
        plain: the same operation in plain MLX, used for the gradient.
        compute: the operation, used for the result.
        inputs: number of arguments that have gradients, counted from the first. The others, packed
            weights and indices, have none.
    """
    run: Any = mx.custom_function(compute)

    @run.vjp
    def vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        constants = primals[inputs:]

        def of_inputs(*given: mx.array) -> mx.array:
            return plain(*given, *constants)

        gradients = mx.vjp(of_inputs, list(primals[:inputs]), [cotangent])[1]
        return (*gradients, *(mx.zeros_like(constant) for constant in constants))

    return run


def transcoded(
    x: mx.array, rows: mx.array, scales: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Convert rows on a GPU, like `rows_to_affine2`, for a product with x (..., in)."""
    # Make rows depend on x. Otherwise MLX could convert all layers before the first one runs.
    rows, in_features = mx.depends([rows], [x])[0], x.shape[-1]
    if not can_convert(rows, in_features):
        return rows_to_affine2(rows, scales, in_features)
    codes = tq1_0_to_affine2(rows, in_features)
    return codes, *affine_scales(scales, rows.shape[:-1], in_features)


# The following functions multiply x (..., 1, in) by the experts `indices` (...), given rows
# (experts, out, row_bytes) and scales (experts, out). The result is (..., 1, out) float32.


def _plain_product(
    x: mx.array, indices: mx.array, rows: mx.array, scales: mx.array, ordered: bool
) -> mx.array:
    return affine_product(x, rows_to_affine2(rows, scales, x.shape[-1]), indices, ordered)


def _transcoded_product(
    x: mx.array, indices: mx.array, rows: mx.array, scales: mx.array, ordered: bool
) -> mx.array:
    return affine_product(x, transcoded(x, rows, scales), indices, ordered)


def _decoded_product(
    x: mx.array, indices: mx.array, rows: mx.array, scales: mx.array, ordered: bool
) -> mx.array:
    batch = indices.shape
    # The kernel can use one vector for all pairs of a token. Other broadcasts need a copy.
    if x.shape[:-2] not in (batch, (*batch[:-1], 1)):
        x = mx.broadcast_to(x, (*batch, *x.shape[-2:]))
    multiply = tq1_0_qmv if scales.ndim == 2 else tq1_0_qmv_groups
    y = multiply(x.reshape(-1, x.shape[-1]), rows, scales, indices.flatten())
    return y.reshape(*batch, 1, -1)


_PRODUCTS = {
    (compute, ordered): with_gradient_of(
        partial(_plain_product, ordered=ordered), partial(compute, ordered=ordered), 1
    )
    for compute in (_plain_product, _transcoded_product, _decoded_product)
    for ordered in (False, True)
}


def rows_product(
    x: mx.array,
    indices: mx.array,
    rows: mx.array,
    scales: mx.array,
    sorted_indices: bool = False,
    training: bool = False,
) -> mx.array:
    """Multiply x by packed experts on a GPU.

    Args:
        x: (..., 1, in).
        indices: (...) uint32, numbers of the experts.
        rows: (experts, out, row_bytes) uint8.
        scales: (experts, out) float32, or those of groups (groups.py).
        sorted_indices: whether `indices` are in ascending order.
        training: use plain MLX only. Converted weights are not kept for the gradient, but made
            again.

    Returns:
        (..., 1, out) float32.
    """
    experts, out_features, _ = rows.shape
    compute = _transcoded_product
    if training:
        compute = _plain_product
    elif x.shape[-2] == 1 and use_decoding(indices[..., None], experts, x.shape[-1], out_features):
        compute = _decoded_product
    return _PRODUCTS[compute, sorted_indices](x, indices, rows, scales)


def _decoded_mix(
    x: mx.array, weights: mx.array, shared: mx.array, indices: mx.array, *packed: mx.array
) -> mx.array:
    gate, gate_scales, up, up_scales, down, scales = packed
    h = tq1_0_swiglu(x, gate, gate_scales, up, up_scales, indices)
    return tq1_0_down(h, down, scales, indices, weights, shared)


def _plain_mix(
    x: mx.array, weights: mx.array, shared: mx.array, indices: mx.array, *packed: mx.array
) -> mx.array:
    gate, gate_scales, up, up_scales, down, scales = packed
    x = mx.expand_dims(x.astype(mx.float32), (-2, -3))
    g = _plain_product(x, indices, gate, gate_scales, False)
    u = _plain_product(x, indices, up, up_scales, False)
    experts = _plain_product(swiglu(g, u), indices, down, scales, False).squeeze(-2)
    return weighted_sum(shared, experts, weights)


_MIX = with_gradient_of(_plain_mix, _decoded_mix, 3)


def decoded_mix(
    x: mx.array,
    weights: mx.array,
    shared: mx.array,
    indices: mx.array,
    *packed: mx.array,
) -> mx.array:
    """Add the weighted sum of each token's experts to `shared`, in two kernel launches.

    Args:
        x: (..., hidden), any activation dtype.
        weights: (..., k) float32.
        shared: (..., hidden) of the dtype of the result.
        indices: (..., k) uint32.
        packed: rows (experts, out, row_bytes) and scales (experts, out) of gate, of up and of down.

    Returns:
        (..., hidden) of the dtype of `shared`: summed in float32, rounded once.
    """
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, weights, shared, indices))
    return _MIX(*flat, *packed).reshape(shared.shape)
