"""How the values of options are read, and the messages for wrong ones.

Typer reads them with pydantic, and importing that takes longer than all other imports together.
"""

import math
from pathlib import Path
from typing import Any, get_args

import typer

from outlier_mlx.errors import did_you_mean

# MLX counts with 32 bits, whole numbers and others.
_MOST = {int: 2**31 - 1, float: 3.4e38}
# Characters of a wrong number in a message.
_SHOWN = 30


class Reader:
    """Turns words of a command line into values, in place of typer's `RuntimeParam`."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value, or the list of values, of an option or argument.

        Args:
            value: words, a default, or None.
            param: typer's description of the option or argument.
            ctx: typer's context, for messages.

        Raises:
            typer.BadParameter: a word is not what the option takes.
        """
        several = param.multiple or param.nargs == -1
        if value is None:
            return () if several else None
        descriptor = param.type_descriptor
        kind, info = descriptor.annotation, descriptor.parameter_info
        try:
            if several:
                return [_read(word, get_args(kind)[0], info) for word in value]
            return _read(value, kind, info)
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=ctx, param=param) from None


def _read(value: Any, kind: Any, info: Any) -> Any:
    """One value. Raises ValueError if it is not of this kind."""
    if kind in (int, float):
        return _number(value, kind, info.min, info.max)
    if kind is Path:
        return _path(Path(value), info)
    if isinstance(value, str) and not (info.metavar and Path(value).exists()):
        _check_text(value)
    choices = {str(choice): choice for choice in get_args(kind)}
    if choices and str(value) not in choices:
        listed = ", ".join(map(repr, choices.values()))
        hint = did_you_mean(value, choices, " Did you mean {}?")
        raise ValueError(f"{value!r} is not one of {listed}.{hint}")
    return choices.get(str(value), value)


def _number(
    value: Any, kind: type[int] | type[float], least: float | None, most: float | None
) -> Any:
    shown = value if len(str(value)) <= _SHOWN else f"{str(value)[:_SHOWN]}..."
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        number = math.nan
    if most is None:
        most = _MOST[kind]
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{shown!r} is not a {'whole number' if kind is int else 'number'}")
    if least is not None and number < least:
        raise ValueError(f"{shown} is less than {least}")
    if most is not None and number > most:
        raise ValueError(f"{shown} is more than {most}")
    return number


def _check_text(value: str) -> None:
    """Refuse bytes that are not UTF-8: no tokenizer takes them. Names of files may have them."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("not UTF-8 text") from None


def _path(path: Path, info: Any) -> Path:
    if info.exists and not path.exists():
        raise ValueError(f"no such file: {path}")
    if info.exists and not info.dir_okay and path.is_dir():
        raise ValueError(f"is a folder: {path}")
    return path
