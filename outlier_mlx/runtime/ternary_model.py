"""Any model of mlx-lm with ternary layers in place of those that its config lists.

The field `ternary` of config.json has `modules`, an object of `in_features` and perhaps
`group_size` and `rotation` by path; and `rotations`, a list of `block`, `width` and `signed`:
whether the tensor `rotations.N.signs` is there.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models import bitnet
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.utils import _get_classes

from .affine2 import ROWS, check_experts
from .dtypes import activation_dtype, converted
from .groups import SCALE_GROUPS
from .ops import swiglu
from .packed import PackedModule, keeping_fixed
from .ternary_layers import Rotation, RotationSigns, TernaryEmbedding, TernaryLinear


class TernaryModelArgs:
    """Makes the args of mlx-lm's model; those of a ternary model have four fields more.

    They are `ternary`; `activation_dtype`, which overrides the dtypes that are stored;
    `vector_dtype`, that of an embedding's vectors where nothing else says it; and `hidden_act`.
    """

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> Any:
        """Make the arguments from a config; unknown fields are ignored.

        Raises:
            ValueError: mlx-lm has no such model, or another format of trits is asked for.
        """
        if not str(params.get("model_type")).isidentifier():
            raise ValueError(f"model_type {params.get('model_type')!r}: mlx-lm has no such model")
        return ternary_args(_get_classes(params)[1], params)


def ternary_args(base: Any, params: dict[str, Any]) -> Any:
    """The args of a ternary model.

    Args:
        base: class of the args of mlx-lm's model.
        params: the config.

    Raises:
        ValueError: another format of trits is asked for.
    """
    check_experts(params["ternary"], (ROWS,))
    args = base.from_dict(params)
    args.ternary = params["ternary"]
    args.activation_dtype = params.get("activation_dtype")
    args.vector_dtype = params.get("dtype") or params.get("torch_dtype") or "float32"
    args.hidden_act = params.get("hidden_act")
    return args


class TernaryModel(nn.Module):
    """mlx-lm's model of the config, with `TernaryLinear` and `TernaryEmbedding` in it.

    `TernaryModel(args)` is an instance of a class that inherits from this class and from mlx-lm's,
    so mlx-lm gets the model's cache and layers.
    """

    args: Any

    def __new__(cls, args: Any = None) -> "TernaryModel":
        """An empty instance of the class for the model that `args` are of."""
        made: Any = cls
        if cls is TernaryModel:
            made = ternary_model_on(sys.modules[type(args).__module__].Model)
        return super().__new__(made)

    def __init__(self, args: Any) -> None:
        base: Any = super()
        base.__init__(args)
        self.args = args  # not all models of mlx-lm keep them
        fields = args.ternary
        self.rotations = [RotationSigns(each["width"]) for each in fields.get("rotations", ())]
        shared: dict[tuple[str, int], Rotation] = {}
        found = dict(self.named_modules())
        made = []
        for path, how in fields["modules"].items():
            rotation, number = None, how.get("rotation")
            if number is not None:
                signs, block = self.rotations[number], fields["rotations"][number]["block"]
                key = path.rpartition(".")[0], number
                rotation = shared.setdefault(key, Rotation(signs, block))
            group = how.get("group_size", fields.get("group_size"))
            made.append(
                (path, _ternary(path, found.get(path), how["in_features"], group, rotation))
            )
        self.update_modules(tree_unflatten(made))
        if args.hidden_act == "silu":
            for module in self.modules():
                if type(module) is bitnet.MLP:
                    module.__class__ = SiluBitNetMLP

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Convert floats to the activation dtype; to float32 on the CPU, where halves are slow."""
        signs = {}
        for number, rotation in enumerate(self.rotations):
            name = f"rotations.{number}.signs"
            found = weights.pop(name, None)
            signs[name] = rotation.signs if found is None else found.astype(mx.float16)
        base: Any = super()
        if hasattr(base, "sanitize"):
            weights = base.sanitize(weights)
        fixed = {f"{path}.scales" for path in self.args.ternary["modules"]}
        may_convert: Callable[[str], bool] = getattr(self, "cast_predicate", lambda name: True)
        dtype = activation_dtype(self.args.activation_dtype)
        stays = dtype is not None and dtype != mx.float32
        return signs | converted(
            weights, dtype, lambda name: name in fixed or (stays and not may_convert(name))
        )

    def load_weights(self, *args: Any, **kwargs: Any) -> "TernaryModel":
        """Load weights like any MLX module, then prepare the ternary layers."""
        super().load_weights(*args, **kwargs)
        dtype = activation_dtype(self.args.activation_dtype)
        for module in self.modules():
            if isinstance(module, TernaryEmbedding):
                halves = module.scales.dtype != mx.float32
                stored = module.scales.dtype if halves else getattr(mx, self.args.vector_dtype)
                module.dtype = dtype or stored
            if isinstance(module, PackedModule):
                module.prepare()
        return self

    def set_dtype(self, dtype: mx.Dtype, predicate: Callable | None = None) -> None:
        """Convert floats to a dtype, except the scales and signs of ternary layers."""
        predicates = [] if predicate is None else [predicate]
        keeping_fixed(self, lambda: super(TernaryModel, self).set_dtype(dtype, *predicates))
        for module in self.modules():
            if isinstance(module, TernaryEmbedding):
                module.dtype = dtype


class SiluBitNetMLP(bitnet.MLP):
    """The FFN of BitNet models before b1.58-2B-4T: down(norm(silu(gate x) * up x))."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., hidden) to the same shape."""
        y: mx.array = self.down_proj(self.ffn_sub_norm(swiglu(self.gate_proj(x), self.up_proj(x))))
        return y


@cache
def ternary_model_on(base: type) -> type:
    """The class of ternary models for a model class of mlx-lm."""
    return type("TernaryModel", (TernaryModel, base), {"__doc__": TernaryModel.__doc__})


def _ternary(
    path: str, module: Any, width: int, group: int, rotation: Rotation | None
) -> TernaryLinear | TernaryEmbedding:
    """What takes the place of a module.

    Raises:
        ValueError: it is neither a linear layer nor an embedding, or has another width.
    """
    if isinstance(module, BitLinear):
        out, wide = module.out_features, module.in_features
    elif isinstance(module, nn.Linear | nn.Embedding):
        out, wide = module.weight.shape
    else:
        raise ValueError(f"ternary: {path}: the model has no linear layer or embedding there")
    if wide != width or group not in (0, *SCALE_GROUPS) or (group and width % group):
        raise ValueError(
            f"ternary: {path}: rows of {width} weights in groups of {group}; the model's have"
            f" {wide}"
        )
    if rotation is not None and rotation.signs.signs.shape != (width,):
        raise ValueError(f"ternary: {path}: a rotation of another width than {width}")
    if isinstance(module, nn.Embedding):
        return TernaryEmbedding(out, width, group, rotation=rotation)
    bias = module.get("bias") is not None
    return TernaryLinear(width, out, group, bias=bias, rotation=rotation)
