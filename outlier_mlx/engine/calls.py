"""Watch or replace a method of one module of a model, while the module stays what it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

#: Called with the arguments of a call, and what it returned.
Told = Callable[[tuple[Any, ...], Any], None]


def replace_method(module: nn.Module, method: str, call: Callable[..., Any]) -> Callable[[], None]:
    """Give a module another method.

    The module gets its own subclass of its class, so its parameters, names and children stay the
    same.

    Args:
        module: a module of a model.
        method: name of the method, such as "__call__".
        call: called instead with the module and the arguments.

    Returns:
        A function that gives the module its class back.
    """
    original = type(module)
    made = type(original.__name__, (original,), {method: call})
    # nn.Module's own __setattr__ takes only parameters and children.
    object.__setattr__(module, "__class__", made)
    return lambda: object.__setattr__(module, "__class__", original)


@contextmanager
def watched_calls(module: nn.Module, method: str, told: Told) -> Iterator[None]:
    """Call `told` after each call of a module's method, until the block ends.

    Args:
        module: as for `replace_method`.
        method: see there.
        told: called after each call.
    """
    original = getattr(type(module), method)

    def call(self: nn.Module, *given: Any, **named: Any) -> Any:
        result = original(self, *given, **named)
        told(given, result)
        return result

    undo = replace_method(module, method, call)
    try:
        yield
    finally:
        undo()
