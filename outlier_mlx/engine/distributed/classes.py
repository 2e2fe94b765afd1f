"""Classes of models that load a rank's part only."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.quantized import Classes, with_methods


def partial_classes(
    get_model_classes: Classes,
    choose: Callable[[Any, dict[str, mx.array]], None],
    connect: Callable[[Any], None],
) -> Classes:
    """The same classes for `mlx_lm.utils.load_model`, whose models have this rank's part.

    Args:
        get_model_classes: the classes of the whole model, which others can inherit from.
        choose: called with a model and its weights by name, before they are loaded: changes both.
        connect: called with the model when its weights are loaded.
    """

    def methods(model: Any) -> dict[str, Any]:
        def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            choose(self, weights)
            given = getattr(model, "sanitize", None)
            return weights if given is None else given(self, weights)

        def load_weights(
            self: Any, weights: list[tuple[str, mx.array]], strict: bool = True
        ) -> Any:
            loaded = model.load_weights(self, weights, strict)
            connect(self)
            return loaded

        return {"sanitize": sanitize, "load_weights": load_weights}

    return with_methods(get_model_classes, methods)


def extend(module: nn.Module, mixin: type) -> None:
    """Let methods of another class come before those of a module's own."""
    module.__class__ = type(type(module).__name__, (mixin, type(module)), {})
