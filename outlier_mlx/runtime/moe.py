"""The feed-forward block of a MoE layer: the base's own FFN plus routed ternary experts."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from .affine2 import ROWS
from .ops import weighted_sum
from .routing import Router, route
from .switch import TernarySwitchGLU


class OutlierMoE(nn.Module):
    """y = FFN_shared(x) + sum over the top k experts of w_e * alpha_e * FFN_e(x).

    w is softmax over the k largest routing logits. The experts are computed and summed in float32;
    the shared expert's output is added, and the sum is rounded once.
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

    def route(self, x: mx.array, alpha: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """Experts for x (..., hidden) and their weights, times `alpha` (experts,) if it is given.

        See the function `route`.
        """
        return route(x, self.gate, self.top_k, alpha, training=self.training)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (batch, tokens, hidden) to the same shape and dtype."""
        indices, weights = self.route(x, self.alpha)
        shared = self.shared_expert(x)
        if isinstance(self.switch_mlp, TernarySwitchGLU):
            y = self.switch_mlp.mix(x, indices, weights, shared)
        else:
            y = weighted_sum(shared, self.switch_mlp(x.astype(mx.float32), indices), weights)
        return y.astype(x.dtype)
