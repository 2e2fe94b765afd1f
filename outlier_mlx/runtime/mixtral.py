"""mlx-lm's Mixtral with ternary experts in some layers, for imported GGUF models."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models import mixtral

from .affine2 import ROWS, check_experts
from .packed import keeping_fixed
from .routing import route
from .switch import TernarySwitchGLU, TernarySwitchLinear


@dataclass
class TernaryMixtralArgs(mixtral.ModelArgs):
    """Mixtral's `config.json` with `ternary_switch`: the experts' format, and the layers."""

    ternary_switch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the experts' format and layers.

        Raises:
            ValueError: the format or its version is not supported, or a layer does not exist.
        """
        super().__post_init__()
        check_experts(self.ternary_switch, (ROWS,))
        layers = self.ternary_switch.get("layers")
        numbers = range(self.num_hidden_layers)
        if not isinstance(layers, list) or not all(number in numbers for number in layers):
            raise ValueError("ternary_switch.layers: expected a list of layer numbers")


class TernaryMixtralBlock(mixtral.MixtralSparseMoeBlock):
    """y = sum over the top k experts of softmax(their logits)_e * FFN_e(x), as in Mixtral.

    Experts, and the logits of a router that is not quantized, are summed in float32; y is rounded
    once.
    """

    def __init__(self, args: TernaryMixtralArgs) -> None:
        super().__init__(args)
        glu: Any = TernarySwitchGLU(self.hidden_dim, self.ffn_dim, self.num_experts)
        self.switch_mlp = glu

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (batch, tokens, hidden) to the same shape and dtype."""
        k = self.num_experts_per_tok
        indices, weights = route(x, self.gate, k, training=self.training)
        glu: Any = self.switch_mlp
        return glu.mix(x, indices, weights, mx.zeros_like(x)).astype(x.dtype)


class TernaryMixtral(mixtral.Model):
    """Mixtral with `TernaryMixtralBlock` in the layers that its config lists."""

    def __init__(self, args: TernaryMixtralArgs) -> None:
        super().__init__(args)
        for number in args.ternary_switch["layers"]:
            self.model.layers[number].block_sparse_moe = TernaryMixtralBlock(args)

    def load_weights(self, *args: Any, **kwargs: Any) -> "TernaryMixtral":
        """Load weights like any MLX module, then prepare the experts."""
        super().load_weights(*args, **kwargs)
        for module in self._ternary():
            module.prepare()
        return self

    def set_dtype(self, dtype: mx.Dtype, predicate: Callable | None = None) -> None:
        """Convert floats to a dtype, except the experts' scales, which stay float32."""
        predicates = [] if predicate is None else [predicate]
        keeping_fixed(self, lambda: super(TernaryMixtral, self).set_dtype(dtype, *predicates))

    def _ternary(self) -> list[TernarySwitchLinear]:
        return [module for module in self.modules() if isinstance(module, TernarySwitchLinear)]
