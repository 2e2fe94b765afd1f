"""Run the base layer by layer in float32, with one layer in memory at a time."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from outlier_mlx.merge.sources import Dense
from outlier_mlx.merge.texts import Batch
from outlier_mlx.models.config import PROJECTIONS, spell_config
from outlier_mlx.storage.tensors import FloatTensor
from outlier_mlx.upstream import module_of


def read_array(tensor: FloatTensor) -> mx.array:
    """A whole tensor in float32."""
    return mx.array(tensor.read_float32())


def embed(model: Dense, batch: Batch) -> mx.array:
    """Token embeddings of a batch: (batch, length, hidden). Only the needed rows are read."""
    tensor = model.tensors["model.embed_tokens.weight"]
    used, places = np.unique(batch.tokens, return_inverse=True)
    rows = np.stack([tensor.read_float32(i, i + 1)[0] for i in used.tolist()])
    return mx.array(rows[places.reshape(batch.tokens.shape)])


class AttentionLayer:
    """Norms and attention of a layer of the base: the part that is the same for all experts."""

    def __init__(self, model: Dense, layer: int) -> None:
        config = model.config
        family = module_of("mlx_lm.models", "qwen2" if config.family == "qwen2" else "llama")
        args = family.ModelArgs.from_dict(spell_config(config))
        self._attention: nn.Module = family.Attention(args)
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
        self._eps = config.rms_norm_eps

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Apply attention to the layer's input x (batch, length, hidden).

        Returns:
            The residual stream after attention, and the normalised input of FFN and router; both
            of x's shape.
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
        """Apply the FFN to x (..., hidden); the result has the same shape."""
        y = (nn.silu(x @ self._gate.T) * (x @ self._up.T)) @ self._down.T
        mx.eval(y)
        return y


def layer_inputs(model: Dense, groups: Sequence[Batch]) -> Iterator[list[mx.array]]:
    """Run a model layer by layer.

    Yields:
        For each layer, its input for each batch: (batch, length, hidden). The first layer's input
        is the token embeddings.
    """
    inputs = [embed(model, batch) for batch in groups]
    for layer in range(model.config.layers):
        yield inputs
        if layer + 1 == model.config.layers:
            return
        attention = AttentionLayer(model, layer)
        attended = [attention(x) for x in inputs]
        del attention
        ffn = FeedForward([model.ffn(layer, projection) for projection in PROJECTIONS])
        inputs = [h + ffn(normed) for h, normed in attended]
        mx.eval(inputs)
        del ffn, attended
