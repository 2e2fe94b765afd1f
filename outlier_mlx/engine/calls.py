"""Watch the calls of a module's method while a model runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

#: Called with the arguments of a call, and what it returned.
Told = Callable[[tuple[Any, ...], Any], None]


@contextmanager
def watched_calls(module: nn.Module, method: str, told: Told) -> Iterator[None]:
    """Call `told` after each call of a module's method, until the block ends.

    Until then the module has its own subclass of its class, so its parameters, names, children and
    results stay the same.

    Args:
        module: a module of a model.
        method: name of the method, such as "__call__".
        told: called after each call.
    """
    original = type(module)

    def call(self: nn.Module, *given: Any, **named: Any) -> Any:
        result = getattr(original, method)(self, *given, **named)
        told(given, result)
        return result

    watching = type(original.__name__, (original,), {method: call})
    # nn.Module's own __setattr__ takes only parameters and children.
    object.__setattr__(module, "__class__", watching)
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", original)
