"""Quantized matrices of any model, checked before MLX divides by what mlx-lm infers from them."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from outlier_mlx.errors import CheckpointError

#: From a config: the classes of a model and of its args.
Classes = Callable[..., tuple[type, type]]


def with_methods(get_model_classes: Classes, methods: Callable[[Any], dict[str, Any]]) -> Classes:
    """The same classes, whose models have the methods that `methods` gives for their class."""

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        model, args = get_model_classes(config)
        made = {"__module__": model.__module__, "__doc__": model.__doc__} | methods(model)
        return type(model.__name__, (model,), made), args

    return classes


def checked_classes(get_model_classes: Classes) -> Classes:
    """The same classes for `mlx_lm.utils.load_model`, whose models check their weights.

    `sanitize` is the last that a model does before mlx-lm quantizes its modules.
    """

    def methods(model: Any) -> dict[str, Any]:
        def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            own = getattr(model, "sanitize", None)
            weights = weights if own is None else own(self, weights)
            _check(self, weights)
            return weights

        return {"sanitize": sanitize}

    return with_methods(get_model_classes, methods)


def unchecked(model: nn.Module) -> None:
    """Give a loaded model the class that `checked_classes` was given."""
    model.__class__ = type(model).__bases__[0]


def _check(model: nn.Module, weights: dict[str, mx.array]) -> None:
    """Check that each quantized module has at least one weight in a group and one bit in a weight.

    mlx-lm divides the width of the module by the shapes of its weight and scales; MLX then divides
    by the result.

    Raises:
        CheckpointError: names the module.
    """
    modules: Any = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    for path, module in modules:
        scales, weight = (weights.get(f"{path}.{name}") for name in ("scales", "weight"))
        if scales is None or weight is None or not hasattr(module, "to_quantized"):
            continue
        width = module.weight.shape[-1]
        groups, words = (array.shape[-1] if array.ndim else 0 for array in (scales, weight))
        if not 0 < groups <= width or 32 * words < width:
            raise CheckpointError(
                f"{path}: scales {scales.shape} and weight {weight.shape} do not fit a width of"
                f" {width}"
            )
