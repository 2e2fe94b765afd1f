"""Functions whose gradients are given, and layers that are computed again for theirs."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.calls import replace_method


class Held(Protocol):
    """An array of a model that is trained."""

    @property
    def value(self) -> mx.array:
        """What the model has now."""

    def put(self, value: mx.array) -> None:
        """Give the model another value."""


#: What a layer's gradient is taken of, and the context in which the layer is computed.
Prepared = tuple[Sequence[Held], Callable[[], AbstractContextManager[None]]]


def custom(function: Callable) -> Any:
    """`mx.custom_function`, which MLX types as its decorator, without the method `vjp`."""
    return mx.custom_function(function)


def checkpoint(
    layer: nn.Module, prepare: Callable[[], Prepared], *, recompute: bool = True
) -> Callable[[], None]:
    """Let a layer keep only its input for the gradient, and be computed again when it is needed.

    Args:
        layer: of a model; its first argument is its input.
        prepare: called whenever the layer is. The context is entered then, and again when the
            layer is computed again.
        recompute: without, the layer keeps all that its gradient needs, and nothing is computed
            twice.

    Returns:
        A function that undoes it.
    """
    original = type(layer)

    def call(self: nn.Module, x: mx.array, *given: Any, **named: Any) -> mx.array:
        held, context = prepare()

        # MLX differentiates only what the checkpointed function is given.
        def compute(x: mx.array, *values: mx.array) -> mx.array:
            for each, value in zip(held, values, strict=True):
                each.put(value)
            with context():
                return original.__call__(self, x, *given, **named)

        run = mx.checkpoint(compute) if recompute else compute
        found: mx.array = run(x, *(each.value for each in held))
        return found

    return replace_method(layer, "__call__", call)
