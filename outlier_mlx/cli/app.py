"""The typer app, and how commands end: in one clear line."""

import re
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from outlier_mlx import __version__
from outlier_mlx.errors import OutlierError, did_you_mean, one_line

# The order in which people meet them.
ORDER = (
    *("convert", "import", "merge", "generate", "chat", "serve", "info", "tiers", "verify", "demo"),
    *("bench", "perplexity", "routing", "tune-alpha", "outliers", "eval", "compare", "export"),
    "push",
)


class Commands(TyperGroup):
    """Ends a command in one clear line on stderr: exit code 1, or 130 after Ctrl-C."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of `ORDER`."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda n: ORDER.index(n) if n in ORDER else len(ORDER))

    def invoke(self, ctx: Any) -> Any:
        """Run a command; `--debug` shows the traceback of what ended it."""
        warnings.showwarning = _show_warning
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except typer.BadParameter as error:
            error.message = _with_nearest(error.message)
            raise
        except (OutlierError, OSError, MemoryError) as error:
            if ctx.meta.get("debug"):
                raise
            say(f"error: {_told(error)}")
            raise typer.Exit(1) from None


def _with_nearest(message: str) -> str:
    """What is said of a value that is none of an option's choices, with the one likely meant.

    Typer lists the choices, but suggests only commands and options.
    """
    message = message.removeprefix("Value error, ")
    given, found, rest = message.partition(" is not one of ")
    choices = re.findall(r"'([^']+)'", rest) if found else []
    return message + did_you_mean(given.strip("'"), choices, " Did you mean {!r}?")


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {_told(message) if isinstance(message, Warning) else message}")


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(one_line(text), file=sys.stderr, flush=True)


def _print_version(value: bool) -> None:
    if value:
        print(f"outlier-mlx {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="outlier-mlx",
    cls=Commands,
    help="Outlier models on Apple silicon: an int4 base plus ternary experts, in MLX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Outlier models on Apple silicon: an int4 base plus ternary experts, in MLX."""
