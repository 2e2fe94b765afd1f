"""The mlx-lm model of a tier: the model of its base, with routed ternary experts in some layers."""

import importlib
import math
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import YarnRoPE
from mlx_lm.utils import MODEL_REMAPPING

from .affine2 import check_experts
from .dtypes import activation_dtype, converted
from .moe import OutlierMoE
from .switch import TernarySwitchLinear

# These are float32 for every activation dtype.
ALWAYS_FLOAT32 = (".mlp.gate.weight", ".mlp.alpha")
# mlx-lm treats both as YaRN.
YARN_NAMES = ("yarn", "deepseek_yarn")
# transformers reads a tier's config when it loads the tokenizer. It does not know the tier's model
# type, and then fails for the RoPE type "llama3"; a RoPE type that it does not know is ignored.
TIER_LLAMA3 = "outlier_llama3"


@dataclass(kw_only=True)
class ModelArgs:
    """A tier's `config.json`. `from_dict` adds the fields that mlx-lm has for the base.

    Attributes:
        base_model_type: the base's model type, which names a model of mlx-lm.
        moe_layers: numbers of the layers that have experts.
        num_experts: experts in each of them.
        num_experts_per_tok: experts that a token uses.
        moe_intermediate_size: width of an expert.
        ternary: how the experts are stored; see `check_experts`.
        activation_dtype: overrides the dtype that the tier was written in.
    """

    base_model_type: str = "qwen2"
    moe_layers: list[int] = field(default_factory=list)
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    ternary: dict[str, Any] = field(default_factory=dict)
    activation_dtype: str | None = None

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        """Make the arguments from a config; unknown fields are ignored.

        Raises:
            ValueError: mlx-lm has no such base, or the value of a field is not supported.
        """
        _, on_base = classes_on(str(params.get("base_model_type", "qwen2")))
        known = {name: params[name] for name in on_base.__dataclass_fields__ if name in params}
        args: ModelArgs = on_base(**known)
        return args

    def __post_init__(self) -> None:
        """Check the experts' format.

        Raises:
            ValueError: the format or its version is not supported.
        """
        check_experts(self.ternary)
        own: Any = self
        if own.rope_scaling and own.rope_scaling.get("rope_type") == TIER_LLAMA3:
            own.rope_scaling = own.rope_scaling | {"rope_type": "llama3"}
        base: Any = super()
        if hasattr(base, "__post_init__"):
            base.__post_init__()


class Model(nn.Module):
    """mlx-lm's model of the base, with `OutlierMoE` in the layers of `ModelArgs.moe_layers`.

    `Model(args)` is an instance of a class that inherits from this class and from the base's, so
    mlx-lm gets the base's cache and layers.
    """

    args: Any
    layers: list[Any]

    def __new__(cls, args: Any = None) -> "Model":
        """An empty instance of the class for the base of `args`."""
        made: Any = classes_on(args.base_model_type)[0] if cls is Model else cls
        return super().__new__(made)

    def __init__(self, args: Any) -> None:
        base: Any = super()
        base.__init__(args)
        for number in args.moe_layers:
            layer = self.layers[number]
            layer.mlp = OutlierMoE(
                layer.mlp,
                args.hidden_size,
                args.moe_intermediate_size,
                args.num_experts,
                args.num_experts_per_tok,
                args.ternary["format"],
            )
        scaling: dict[str, Any] = args.rope_scaling or {}
        if scaling.get("rope_type", scaling.get("type")) in YARN_NAMES:
            # mlx-lm ignores `attention_factor`, and differs from YaRN's authors for factors below
            # 1.
            scale = scaling.get("attention_factor") or 0.1 * math.log(scaling["factor"]) + 1
            for module in self.modules():
                if isinstance(module, YarnRoPE):
                    module.mscale = scale

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Convert floats to the activation dtype; to float32 on the CPU, where halves are slow."""
        base: Any = super()
        dtype = activation_dtype(self.args.activation_dtype)
        return converted(base.sanitize(weights), dtype, _stays)

    def load_weights(self, *args: Any, **kwargs: Any) -> "Model":
        """Load weights like any MLX module, then prepare the experts."""
        super().load_weights(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, TernarySwitchLinear):
                module.prepare()
        return self


@cache
def classes_on(base: str) -> tuple[type, Any]:
    """The classes of a tier's model and of its args for a base.

    Args:
        base: a model type, such as "qwen3".

    Raises:
        ValueError: mlx-lm has no model of that type.
    """
    module = _base_module(base)
    args = type("ModelArgs", (ModelArgs, module.ModelArgs), {"__doc__": ModelArgs.__doc__})
    model = type("Model", (Model, module.Model), {"__doc__": Model.__doc__})
    return model, dataclass(args)


def _base_module(base: str) -> ModuleType:
    """The module in `mlx_lm.models` for a model type; no other module can be imported."""
    name = MODEL_REMAPPING.get(base, base)
    try:
        if not name.isidentifier():
            raise ImportError(f"{name!r} is not a module name")
        module = importlib.import_module(f"mlx_lm.models.{name}")
    except ImportError as error:
        raise ValueError(f"base_model_type {base!r}: mlx-lm has no such model") from error
    if not hasattr(module, "Model") or not hasattr(module, "ModelArgs"):
        raise ValueError(f"base_model_type {base!r}: mlx-lm has no such model")
    return module


def _stays(name: str) -> bool:
    return ".mlp.switch_mlp." in name or name.endswith(ALWAYS_FLOAT32)
