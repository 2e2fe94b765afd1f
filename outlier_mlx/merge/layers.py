"""The base's decoder layers, one in memory at a time, in float32 on any device."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama, qwen2

from outlier_mlx.merge.sources import Dense
from outlier_mlx.merge.texts import Batch
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.storage.tensors import FloatTensor


def read_array(tensor: FloatTensor) -> mx.array:
    """A whole tensor in float32."""
    return mx.array(tensor.read_float32())


def embed(model: Dense, batch: Batch) -> mx.array:
    """Embeddings of a batch's tokens, (batch, length, hidden); only their rows are read."""
    tensor = model.tensors["model.embed_tokens.weight"]
    used, places = np.unique(batch.tokens, return_inverse=True)
    rows = np.stack([tensor.read_float32(i, i + 1)[0] for i in used.tolist()])
    return mx.array(rows[places.reshape(batch.tokens.shape)])


class AttentionLayer:
    """The half of a decoder layer that every expert shares: norms and attention.

    Args:
        model: the base.
        layer: which of its layers to read.
    """

    def __init__(self, model: Dense, layer: int) -> None:
        config = model.config
        family = qwen2 if config["model_type"] == "qwen2" else llama
        self._attention: nn.Module = family.Attention(family.ModelArgs.from_dict(config))
        prefix = f"model.layers.{layer}."
        inner = f"{prefix}self_attn."
        self._attention.load_weights(
            [
                (name.removeprefix(inner), read_array(tensor))
                for name, tensor in model.tensors.items()
                if name.startswith(inner)
            ]
        )
        self._before = read_array(model.tensors[f"{prefix}input_layernorm.weight"])
        self._after = read_array(model.tensors[f"{prefix}post_attention_layernorm.weight"])
        self._eps = config["rms_norm_eps"]

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Attend; x (batch, length, hidden) is the residual stream that enters the layer.

        Returns:
            The residual stream after attention, and it normalised: what FFN and router see.
        """
        mask = "causal" if x.shape[1] > 1 else None
        h = x + self._attention(mx.fast.rms_norm(x, self._before, self._eps), mask)
        normed = mx.fast.rms_norm(h, self._after, self._eps)
        mx.eval(h, normed)
        return h, normed


class FeedForward:
    """One FFN: down(silu(gate(x)) * up(x)).

    Args:
        matrices: gate and up (intermediate, hidden), down (hidden, intermediate).
    """

    def __init__(self, matrices: Sequence[FloatTensor]) -> None:
        self._gate, self._up, self._down = (read_array(matrix) for matrix in matrices)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., hidden) to the same shape."""
        y = (nn.silu(x @ self._gate.T) * (x @ self._up.T)) @ self._down.T
        mx.eval(y)
        return y


def entering(model: Dense, groups: Sequence[Batch]) -> Iterator[list[mx.array]]:
    """Run a model, layer by layer.

    Yields:
        For each layer the residual stream that enters it: of each batch (batch, length, hidden).
        The first is the embeddings.
    """
    streams = [embed(model, batch) for batch in groups]
    for layer in range(model.layers):
        yield streams
        if layer + 1 == model.layers:
            return
        attention = AttentionLayer(model, layer)
        halves = [attention(x) for x in streams]
        del attention
        ffn = FeedForward([model.ffn(layer, projection) for projection in PROJECTIONS])
        streams = [h + ffn(normed) for h, normed in halves]
        mx.eval(streams)
        del ffn, halves
