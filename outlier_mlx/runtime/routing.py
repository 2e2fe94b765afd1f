"""Routing: which experts each token uses, and their weights. On a GPU, in one launch.

The order of logits decides, so no rounding of probabilities can change it. Of equal logits, the one
of the lower expert comes first; a logit that is not a number comes last.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .launching import ACTIVATIONS, built_kernel, check_matrix, check_size, described, is_supported
from .ops import use_metal, with_gradient_of

# A lane chooses among two experts.
MOST_ROUTED = 64
# A threadgroup of 16 simdgroups fits a core even if a thread needs 185 registers of 16 bits.
MOST_SIMDGROUPS = 16
# Experts whose logits a simdgroup computes together, so that it reads x once for all of them.
ROUTER_ROWS = 4
# Tokens of a threadgroup, if there are several: it reads the router once for all of them.
ROUTER_TOKENS = 4
# Bytes of the largest router that a single threadgroup reads, in about 6 us. Other threadgroups
# compute the logits of a larger one, in a launch of their own (docs/kernels.md).
LARGEST_SHARED = 1 << 18


class Router(nn.Module):
    """The routing matrix, float32 for every activation dtype."""

    def __init__(self, input_dims: int, num_experts: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_experts, input_dims))

    def __call__(self, x: mx.array) -> mx.array:
        """Routing logits (..., experts) float32 of x (..., hidden)."""
        return _plain_logits(x, self.weight)


def top_experts(logits: mx.array, k: int) -> mx.array:
    """The k experts with the largest logits, largest first; ties go to the lower number.

    Args:
        logits: (..., experts) float32. NaN counts as less than all others, and -0 as equal to 0.
        k: number of experts to choose.

    Returns:
        (..., k) uint32.
    """
    experts = logits.shape[-1]
    logits = mx.stop_gradient(logits) + 0.0  # -0 becomes 0
    # Integers in the order of the floats; NaN becomes the smallest. The expert's number in the low
    # bits makes every key unique, so every sorting algorithm gives the same order.
    bits = mx.where(logits == logits, logits.view(mx.int32), -1)
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    keys = (ordered << 32) | mx.arange(experts - 1, -1, -1)
    largest = mx.sort(keys, axis=-1)[..., ::-1][..., :k]
    return experts - 1 - (largest & 0xFFFFFFFF).astype(mx.uint32)


def route(
    x: mx.array,
    gate: Any,
    k: int,
    alpha: mx.array | None = None,
    *,
    renormalise: bool = True,
    training: bool = False,
) -> tuple[mx.array, mx.array]:
    """Choose each token's experts.

    Args:
        x: (..., hidden), any activation dtype.
        gate: module that computes the logits. If it is a float matrix without bias, they are
            float32 sums; if it is another one (quantized or adapted), they have its own dtype.
        k: experts of a token; all, if there are fewer.
        alpha: (experts,), factors of the weights; default: none.
        renormalise: the weights are softmax over the k experts, otherwise over all.
        training: use plain MLX only.

    Returns:
        Experts (..., k) uint32 as `top_experts` orders them, and weights (..., k) float32.
    """
    router = gate.weight if type(gate) in (Router, nn.Linear) and "bias" not in gate else None
    if router is None or router.dtype not in ACTIVATIONS:
        x, router = gate(x), None
    experts = x.shape[-1] if router is None else router.shape[0]
    k = min(k, experts)
    scales = None if alpha is None else alpha.astype(mx.float32)
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    if use_metal() and not training and can_route(len(flat), width, experts, k):
        indices, weights = _launched_route(flat, router, scales, k, renormalise)
    else:
        logits = flat.astype(mx.float32) if router is None else _plain_logits(flat, router)
        indices = top_experts(logits, k)
        weights = _weights_of(logits, indices, scales, renormalise)
    shape = (*x.shape[:-1], k)
    return indices.reshape(shape), weights.reshape(shape)


def can_route(tokens: int, width: int, experts: int, k: int) -> bool:
    """Whether the kernels take so many tokens of this width, experts, and experts of a token."""
    fits = tokens > 0 and is_supported("tokens", tokens) and is_supported("in features", width)
    return fits and 1 <= k <= experts <= MOST_ROUTED


def _plain_logits(x: mx.array, router: mx.array) -> mx.array:
    return x.astype(mx.float32) @ router.astype(mx.float32).T


def _weights_of(
    logits: mx.array, indices: mx.array, alpha: mx.array | None, renormalise: bool
) -> mx.array:
    if renormalise:
        weights = mx.softmax(mx.take_along_axis(logits, indices, axis=-1), axis=-1, precise=True)
    else:
        probs = mx.softmax(logits, axis=-1, precise=True)
        weights = mx.take_along_axis(probs, indices, axis=-1)
    return weights if alpha is None else weights * alpha[indices]


def _launched_route(
    x: mx.array, router: mx.array | None, alpha: mx.array | None, k: int, renormalise: bool
) -> tuple[mx.array, mx.array]:
    """Indices from a launch, and weights with the gradients of the same weights in plain MLX."""
    constant = (None if a is None else mx.stop_gradient(a) for a in (router, alpha))
    indices, weights = tq1_0_route(mx.stop_gradient(x), *constant, k=k, renormalise=renormalise)
    form = _launched_weights(router is not None, alpha is not None, renormalise)
    inputs = (x if a is None else a for a in (x, router, alpha))
    return indices, form(*inputs, indices, weights)


@cache
def _launched_weights(routed: bool, scaled: bool, renormalise: bool) -> Callable[..., mx.array]:
    def plain(
        x: mx.array, router: mx.array, alpha: mx.array, indices: mx.array, _: mx.array
    ) -> mx.array:
        logits = _plain_logits(x, router) if routed else x.astype(mx.float32)
        return _weights_of(logits, indices, alpha if scaled else None, renormalise)

    return with_gradient_of(plain, lambda *given: given[-1], 3)


def tq1_0_route(
    x: mx.array,
    router: mx.array | None = None,
    alpha: mx.array | None = None,
    *,
    k: int,
    renormalise: bool = True,
) -> tuple[mx.array, mx.array]:
    """Choose each token's experts in one launch; in two, if the router is large.

    Args:
        x: (tokens, hidden) float32, float16 or bfloat16; without `router`, the logits
            (tokens, experts).
        router: (experts, hidden) float32, float16 or bfloat16.
        alpha: (experts,) float32, factors of the weights.
        k: experts of a token.
        renormalise: the weights are softmax over the k experts, otherwise over all.

    Returns:
        Experts (tokens, k) uint32, and weights (tokens, k) float32. A token's results do not depend
        on the other tokens.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    name = "tq1_0_route"
    tokens, width = check_matrix(name, "x", x)
    check_size(name, "in features", width)
    experts = width if router is None else _router_rows(name, router, width)
    if not 1 <= k <= experts <= MOST_ROUTED:
        raise ValueError(
            f"{name}: {k} of {experts} experts; supported: 1 to all, of at most {MOST_ROUTED}"
        )
    if alpha is not None and (alpha.shape != (experts,) or alpha.dtype != mx.float32):
        raise ValueError(f"{name}: alpha is {described(alpha)}; expected ({experts},) float32")
    if tokens == 0:
        return mx.zeros((0, k), mx.uint32), mx.zeros((0, k))
    if router is not None and router.nbytes > LARGEST_SHARED:
        x, router, width = tq1_0_logits(x, router), None, experts
    together = 1 if tokens == 1 else ROUTER_TOKENS
    rows = min(ROUTER_ROWS, experts)
    groups = -(-experts // rows)
    parts = 1 if router is None else MOST_SIMDGROUPS // groups
    threads = 32 * (together if router is None else groups * parts)
    indices, weights = built_kernel(name, "router")(
        # An array that the kernel does not read is any array.
        inputs=[x, x if router is None else router, x if alpha is None else alpha],
        template=[
            ("K", 0 if router is None else width),
            ("EXPERTS", experts),
            ("TOP", k),
            ("ALPHA", alpha is not None),
            ("RENORMALISE", renormalise),
            ("TOKENS", together),
            ("ROWS", rows),
            ("PARTS", parts),
        ],
        grid=(-(-tokens // together) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(tokens, k), (tokens, k)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return indices, weights


def tq1_0_logits(x: mx.array, router: mx.array) -> mx.array:
    """Compute x router^T, with a threadgroup for every four experts.

    Args:
        x: (tokens, hidden) float32, float16 or bfloat16.
        router: (experts, hidden) float32, float16 or bfloat16.

    Returns:
        (tokens, experts) float32. A token's logits do not depend on the other tokens.

    Raises:
        ValueError: a dtype or shape is not supported.
    """
    name = "tq1_0_logits"
    tokens, width = check_matrix(name, "x", x)
    check_size(name, "in features", width)
    experts = _router_rows(name, router, width)
    if tokens == 0:
        return mx.zeros((0, experts))
    together = 1 if tokens == 1 else ROUTER_TOKENS
    rows = min(ROUTER_ROWS, experts)
    threads = 32 * MOST_SIMDGROUPS
    logits: mx.array = built_kernel(name, "router")(
        inputs=[x, router],
        template=[
            ("K", width),
            ("EXPERTS", experts),
            ("TOKENS", together),
            ("ROWS", rows),
            ("PARTS", MOST_SIMDGROUPS),
        ],
        grid=(-(-experts // rows) * threads, -(-tokens // together), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(tokens, experts)],
        output_dtypes=[mx.float32],
    )[0]
    return logits


def _router_rows(name: str, router: mx.array, width: int) -> int:
    if router.ndim != 2 or router.shape[1] != width or router.dtype not in ACTIVATIONS:
        raise ValueError(
            f"{name}: router is {described(router)}; expected (experts, {width}) of float32,"
            " float16 or bfloat16"
        )
    check_size(name, "experts", router.shape[0])
    return router.shape[0]
