"""The feed-forward block of a MoE layer: the base's own FFN plus routed ternary experts."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from .affine2 import ROWS
from .ops import weighted_sum
from .switch import TernarySwitchGLU


def top_experts(probs: mx.array, k: int) -> mx.array:
    """The k experts with the largest probabilities, largest first; ties go to the lower number.

    Args:
        probs: (..., experts) float32, none negative.
        k: number of experts to choose.

    Returns:
        (..., k) uint32.
    """
    experts = probs.shape[-1]
    # Floats that are not negative have the same order as their bits. The expert's number in the low
    # bits makes every key unique, so every sorting algorithm gives the same order.
    bits = mx.stop_gradient(probs).view(mx.uint32).astype(mx.uint64)
    keys = (bits << 32) | mx.arange(experts - 1, -1, -1, dtype=mx.uint64)
    largest = mx.sort(keys, axis=-1)[..., ::-1][..., :k]
    return experts - 1 - (largest & 0xFFFFFFFF).astype(mx.uint32)


def choose_experts(probs: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k experts with the largest probabilities, and their renormalised weights.

    Args:
        probs: (..., experts) float32, none negative.
        k: number of experts to choose.

    Returns:
        Experts (..., k) uint32 as `top_experts` orders them, and weights (..., k) float32, which
        add up to 1.
    """
    indices = top_experts(probs, k)
    chosen = mx.take_along_axis(probs, indices, axis=-1)
    return indices, chosen / chosen.sum(axis=-1, keepdims=True)


class Router(nn.Module):
    """The routing matrix, float32 for every activation dtype."""

    def __init__(self, input_dims: int, num_experts: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_experts, input_dims))

    def __call__(self, x: mx.array) -> mx.array:
        """Routing probabilities (..., experts) float32 of x (..., hidden)."""
        logits = x.astype(mx.float32) @ self.weight.astype(mx.float32).T
        return mx.softmax(logits, axis=-1, precise=True)


class OutlierMoE(nn.Module):
    """y = FFN_shared(x) + sum over the top k experts of w_e * alpha_e * FFN_e(x).

    w are the routing probabilities, renormalised over the k. The experts are computed and summed in
    float32; the shared expert's output is added, and the sum is rounded once.
    """

    def __init__(
        self,
        shared_expert: nn.Module,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        top_k: int,
        experts_format: str,
    ) -> None:
        """Add experts to the FFN `shared_expert`, which maps (..., hidden) to the same shape."""
        super().__init__()
        self.top_k = min(top_k, num_experts)
        self.shared_expert = shared_expert
        self.gate = Router(hidden_size, num_experts)
        self.alpha = mx.ones((num_experts,))
        glu = TernarySwitchGLU if experts_format == ROWS else SwitchGLU
        self.switch_mlp = glu(hidden_size, expert_size, num_experts)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Experts for x (..., hidden) and their weights before alpha; see `choose_experts`."""
        return choose_experts(self.gate(x), self.top_k)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (batch, tokens, hidden) to the same shape and dtype."""
        indices, weights = self.route(x)
        weights = weights * self.alpha.astype(mx.float32)[indices]
        shared = self.shared_expert(x)
        if isinstance(self.switch_mlp, TernarySwitchGLU):
            y = self.switch_mlp.mix(x, indices, weights, shared)
        else:
            y = weighted_sum(shared, self.switch_mlp(x.astype(mx.float32), indices), weights)
        return y.astype(x.dtype)
