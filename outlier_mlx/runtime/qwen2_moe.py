"""Qwen2-MoE with renormalised routing weights; mlx-lm's own model ignores `norm_topk_prob`.

It is for plain models, and not part of a tier's `outlier_moe.py`.
"""

import mlx.core as mx
from mlx_lm.models import qwen2_moe

from .routing import route


class RenormalisedMoE(qwen2_moe.Qwen2MoeSparseMoeBlock):
    """y = sum over the top k experts of w_e * FFN_e(x) + sigmoid(g . x) * FFN_shared(x).

    w is softmax over the k largest routing logits. If logits are equal, the expert with the lower
    number comes first.
    """

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Experts for x (..., hidden) and their weights; see the function `route`."""
        return route(x, self.gate, self.top_k, training=self.training)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (batch, tokens, hidden) to the same shape and dtype."""
        indices, weights = self.route(x)
        y = (self.switch_mlp(x, indices) * weights[..., None].astype(x.dtype)).sum(axis=-2)
        return y + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


class RenormalisedQwen2Moe(qwen2_moe.Model):
    """mlx-lm's Qwen2-MoE with `RenormalisedMoE` in every layer."""

    def __init__(self, args: qwen2_moe.ModelArgs) -> None:
        super().__init__(args)
        for layer in self.model.layers:
            layer.mlp = RenormalisedMoE(args)
