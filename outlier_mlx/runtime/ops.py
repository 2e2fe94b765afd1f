"""Operations on ternary experts: the choice between Metal kernels and plain MLX, and gradients.

All ways compute the same: a float32 sum of trits times x, times the row's scale. On a GPU, decode
kernels multiply (token, expert) pairs: few of them one by one, more of them sorted by expert and in
blocks. Where that costs less, the experts are converted to affine 2-bit, and MLX's own matrix
kernels multiply this temporary copy. Nothing here waits for the GPU. A custom kernel has no
gradient, so gradients are those of the same operation in plain MLX.
"""

import re
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.activations import swiglu

from .affine2 import affine_product, affine_scales, rows_to_affine2
from .blocks import tq1_0_sort
from .costs import BLOCK_CYCLES, pairs_in_a_block
from .groups import tq1_0_qmv_groups
from .kernels import (
    can_convert,
    can_decode,
    tq1_0_down,
    tq1_0_qmv,
    tq1_0_swiglu,
    tq1_0_to_affine2,
)

# Generation of the GPU from which MLX uses units for products of matrices (M5).
MATRIX_UNITS_FROM = 17


def use_metal() -> bool:
    """Whether operations run on a GPU now. All code asks this function only."""
    return mx.metal.is_available() and (sys.platform != "darwin" or mx.default_device() == mx.gpu)


@cache
def matrix_units() -> bool:
    """Whether MLX multiplies matrices in units of their own: on "applegpu_g17s" and later GPUs."""
    found = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return found is not None and int(found[1]) >= MATRIX_UNITS_FROM


def block_pairs(
    indices: mx.array,
    experts: int,
    matrices: int,
    in_features: int,
    out_features: int,
) -> int:
    """The number of pairs in a block of the decode kernels, or 0 if they are not used.

    Only shapes decide, so the result is known before the routing is.

    Args:
        indices: (..., k) numbers of the experts of each token.
        experts: number of experts of the layer.
        matrices: number of matrices of an expert.
        in_features: width of the input.
        out_features: width of the output, or of what is between.
    """
    k = indices.shape[-1]
    tokens = indices.size // max(1, k)
    if not (use_metal() and can_decode(tokens, experts, k, in_features, out_features)):
        return 0
    weights = matrices * in_features * out_features
    return pairs_in_a_block(tokens, experts, k, weights, matrix_units())


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
    x: mx.array,
    indices: mx.array,
    rows: mx.array,
    scales: mx.array,
    size: int,
) -> mx.array:
    batch = indices.shape
    # The kernel can use one vector for all pairs of a token. Other broadcasts need a copy.
    if x.shape[:-2] not in (batch, (*batch[:-1], 1)):
        x = mx.broadcast_to(x, (*batch, *x.shape[-2:]))
    x, pairs = x.reshape(-1, x.shape[-1]), indices.flatten()
    multiply = tq1_0_qmv if scales.ndim == 2 else tq1_0_qmv_groups
    y = multiply(x, rows, scales, pairs, blocks=_blocks(pairs, rows.shape[0], size))
    return y.reshape(*batch, 1, -1)


def _blocks(indices: mx.array, experts: int, size: int) -> mx.array | None:
    return None if size == 1 else tq1_0_sort(indices, experts, size)


# By the number of pairs in a block, or otherwise by whether pairs are sorted.
_BLOCK_PRODUCTS = {
    size: with_gradient_of(
        partial(_plain_product, ordered=False), partial(_decoded_product, size=size), 1
    )
    for size in BLOCK_CYCLES
}
_PRODUCTS = {
    (compute, ordered): with_gradient_of(
        partial(_plain_product, ordered=ordered), partial(compute, ordered=ordered), 1
    )
    for compute in (_plain_product, _transcoded_product)
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
    size = 0
    if x.shape[-2] == 1 and not training:
        size = block_pairs(indices[..., None], experts, 1, x.shape[-1], out_features)
    if size:
        return _BLOCK_PRODUCTS[size](x, indices, rows, scales)
    compute = _plain_product if training else _transcoded_product
    return _PRODUCTS[compute, sorted_indices](x, indices, rows, scales)


def _decoded_mix(
    x: mx.array,
    weights: mx.array,
    shared: mx.array,
    indices: mx.array,
    *packed: mx.array,
    size: int,
) -> mx.array:
    blocks = _blocks(indices, packed[0].shape[0], size)
    return _launched_mix(x, weights, shared, indices, blocks, *packed)


def _launched_mix(
    x: mx.array,
    weights: mx.array,
    shared: mx.array,
    indices: mx.array,
    blocks: mx.array | None,
    *packed: mx.array,
) -> mx.array:
    gate, gate_scales, up, up_scales, down, scales = packed
    h = tq1_0_swiglu(x, gate, gate_scales, up, up_scales, indices, blocks=blocks)
    return tq1_0_down(h, down, scales, indices, weights, shared, blocks=blocks)


def _plain_mix(
    x: mx.array, weights: mx.array, shared: mx.array, indices: mx.array, *packed: mx.array
) -> mx.array:
    gate, gate_scales, up, up_scales, down, scales = packed
    x = mx.expand_dims(x.astype(mx.float32), (-2, -3))
    g = _plain_product(x, indices, gate, gate_scales, False)
    u = _plain_product(x, indices, up, up_scales, False)
    experts = _plain_product(swiglu(g, u), indices, down, scales, False).squeeze(-2)
    return weighted_sum(shared, experts, weights)


_MIXES = {
    size: with_gradient_of(_plain_mix, partial(_decoded_mix, size=size), 3) for size in BLOCK_CYCLES
}


def decoded_mix(
    x: mx.array,
    weights: mx.array,
    shared: mx.array,
    indices: mx.array,
    size: int,
    *packed: mx.array,
    slots: mx.array | None = None,
) -> mx.array:
    """Add the weighted sum of each token's experts to `shared`, by the decode kernels.

    Args:
        x: (..., hidden), any activation dtype.
        weights: (..., k) float32.
        shared: (..., hidden) of the dtype of the result.
        indices: (..., k) uint32.
        size: number of pairs in a block; if it is 1, pairs are not sorted.
        packed: rows (experts, out, row_bytes) and scales (experts, out) of gate, of up and of down.
        slots: (experts,) uint32, where each expert is in `packed`, which then may hold any number
            of them; None: at its number. With it, there are no gradients.

    Returns:
        (..., hidden) of the dtype of `shared`: summed in float32, rounded once.
    """
    shape = shared.shape
    x, weights, shared, indices = (
        a.reshape(-1, a.shape[-1]) for a in (x, weights, shared, indices)
    )
    if slots is None:
        return _MIXES[size](x, weights, shared, indices, *packed).reshape(shape)
    blocks = _blocks(indices, slots.size, size)
    y = _launched_mix(x, weights, shared, slots[indices], blocks, *packed)
    return y.reshape(shape)
