"""The mlx-lm model of a tier: Qwen2 whose listed layers have routed ternary experts."""

import math
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models import qwen2

from .moe import OutlierMoE
from .switch import TernarySwitchLinear

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
# These keep float32 whatever the activations are.
ALWAYS_FLOAT32 = (".mlp.gate.weight", ".mlp.alpha")
# Both are the same to mlx-lm.
YARN_NAMES = ("yarn", "deepseek_yarn")


@dataclass
class ModelArgs(qwen2.ModelArgs):
    """A tier's `config.json`; the fields of the base are mlx-lm's own for Qwen2.

    Attributes:
        moe_layers: numbers of the layers that have experts.
        num_experts: experts in each of them.
        num_experts_per_tok: experts that a token uses.
        moe_intermediate_size: width of an expert.
        ternary: how the experts are stored; its `format` is "tq1_0_rows" or "affine2".
        activation_dtype: overrides the dtype that the tier was written in.
    """

    moe_layers: list[int] = field(default_factory=list)
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    ternary: dict[str, Any] = field(default_factory=dict)
    activation_dtype: str | None = None

    def __post_init__(self) -> None:
        """Refuse what this code does not know how to run.

        Raises:
            ValueError: the experts' format or its version is not known here.
        """
        known = {"tq1_0_rows": 1, "affine2": 1}
        name, version = self.ternary.get("format"), self.ternary.get("version")
        if name not in known or version != known[name]:
            raise ValueError(f"ternary format {name!r} version {version!r} is not one of {known}")


class Model(qwen2.Model):
    """mlx-lm's Qwen2 with `OutlierMoE` in the layers that `ModelArgs.moe_layers` lists."""

    args: ModelArgs

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for number in args.moe_layers:
            self.model.layers[number].mlp = OutlierMoE(
                args.hidden_size,
                args.intermediate_size,
                args.moe_intermediate_size,
                args.num_experts,
                args.num_experts_per_tok,
                args.ternary["format"],
            )
        scaling: dict[str, Any] = args.rope_scaling or {}
        if scaling.get("rope_type", scaling.get("type")) in YARN_NAMES:
            # mlx-lm reads neither `attention_factor` nor a factor below 1 as YaRN's authors do.
            scale = scaling.get("attention_factor") or 0.1 * math.log(scaling["factor"]) + 1
            for layer in self.model.layers:
                layer.self_attn.rope.mscale = scale

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Bring floats to the activation dtype: float32 on the CPU, where halves are slow."""
        dtype = self._activation_dtype()
        weights = super().sanitize(weights)
        if dtype is None:
            return weights
        return {
            name: value.astype(dtype) if value.dtype in FLOATS and not _stays(name) else value
            for name, value in weights.items()
        }

    def load_weights(self, *args: Any, **kwargs: Any) -> "Model":
        """Load as any MLX module does, then get the experts ready."""
        super().load_weights(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, TernarySwitchLinear):
                module.prepare()
        return self

    def _activation_dtype(self) -> mx.Dtype | None:
        if self.args.activation_dtype is not None:
            return getattr(mx, self.args.activation_dtype)
        return mx.float32 if mx.default_device() == mx.cpu else None


def _stays(name: str) -> bool:
    if ".mlp.switch_mlp." in name:
        return True
    return name.endswith(ALWAYS_FLOAT32)
