"""The typer app. Commands that fail end with one clear line."""

import json
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from shutil import get_terminal_size
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer
from typer.core import TyperGroup

from outlier_mlx import __version__
from outlier_mlx.cli.command import (
    Command,
    flattened,
    read_plainly,
    write_parameters,
    write_section,
)
from outlier_mlx.cli.ranks import only_the_first_talks, tell_others
from outlier_mlx.cli.signals import Ended, cleaning_up
from outlier_mlx.engine.distributed.launcher import LOST, is_lost
from outlier_mlx.errors import OutlierError, did_you_mean, one_line
from outlier_mlx.terminal import stderr

# Columns of help, at most: longer lines are hard to read.
WIDEST = 100
Panel = Literal["Make", "Run", "Measure", "Share"]
Function = TypeVar("Function", bound=Callable[..., None])


class Commands(TyperGroup):
    """Ends a command in one line on stderr: exit code 1, or 2 for wrong usage.

    Ctrl-C and other signals end it with 128 and the signal's number.
    """

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the program and leave it."""
        only_the_first_talks()
        try:
            # Typer takes narrow terminals for wider ones.
            width = min(max(get_terminal_size().columns, 20), WIDEST)
            options |= {"standalone_mode": False, "terminal_width": width}
            status = super().main(*arguments, **options)
        except typer.TyperException as error:
            if message := error.format_message():
                say(_misused(message, error))
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(1)
        sys.exit(status if isinstance(status, int) else 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            hint = did_you_mean(args[0], self.commands, ". Did you mean {}?")
            ctx.fail(f"no such command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the program's own options; without any words, show the help."""
        read_plainly(self.get_params(ctx))
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; with `--debug`, errors show their traceback."""
        warnings.showwarning = _show_warning
        try:
            with cleaning_up():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            say(message_of(error))
            raise typer.Exit(130) from None
        except Ended as end:
            with suppress(OSError):  # the terminal may be gone
                say(message_of(end))
            raise typer.Exit(end.status) from None
        except BrokenPipeError:
            raise
        except (OutlierError, OSError, MemoryError) as error:
            if not ctx.meta.get("debug"):
                say(f"error: {message_of(error)}")
            tell_others(error, message_of(error))
            if ctx.meta.get("debug"):
                raise
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except Exception as error:
            if is_lost(error):
                if ctx.meta.get("debug"):
                    raise
                say(f"error: {LOST}")
                raise typer.Exit(1) from None
            tell_others(error, f"{type(error).__name__}: {error}")
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands by panel, then the program's own options."""
        listed = [(getattr(c, "rich_help_panel", ""), c) for c in self.commands.values()]
        for panel in get_args(Panel):
            rows = [(str(c.name), c.help or "") for of, c in listed if of == panel]
            write_section(panel, rows, formatter)
        write_parameters(self.get_params(ctx), formatter)


def _misused(message: str, error: Any) -> str:
    """The message for wrong usage: what is wrong, and the command that shows the right usage."""
    if isinstance(error, typer.BadParameter) and error.message:
        message = error.message
        if error.param is not None:
            option = error.param.param_type_name == "option"
            name = max(error.param.opts, key=len) if option else error.param.metavar
            message = f"{name}: {message}"
        elif error.param_hint is not None:
            message = f"{error.param_hint}: {message}"
    ctx = getattr(error, "ctx", None)
    if ctx is not None and hasattr(error, "possibilities"):
        params = ctx.command.get_params(ctx)
        options = [name for param in params for name in (*param.opts, *param.secondary_opts)]
        hint = did_you_mean(error.option_name, options, ". Did you mean {}?")
        message = error.message + hint
    message = message.removesuffix(".")
    where = f" (see {ctx.command_path} --help)" if ctx is not None else ""
    # A sentence begins small here, but MODEL and its like do not.
    if message[1:2].islower():
        message = message[0].lower() + message[1:]
    return f"error: {message}{where}"


def message_of(error: BaseException) -> str:
    """What the program says of an error, or of what interrupts it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Ended):
        return error.word
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message_of(message) if isinstance(message, Warning) else message}")


def print_json(value: Any) -> None:
    """Print a value to stdout as JSON, which has no NaN and no infinity: such figures are null."""
    print(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """Print one line to stderr; on a terminal, a line that is too long is folded."""
    line = one_line(text)
    if sys.stderr.isatty():
        stderr().print(line, soft_wrap=True)
    else:
        print(line, file=sys.stderr, flush=True)


def _print_version(value: bool) -> None:
    if value:
        print(f"outlier-mlx {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="outlier-mlx",
    cls=Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def command(panel: str, example: str, name: str | None = None) -> Callable[[Function], Function]:
    """Make a function a command of the program.

    Args:
        panel: the heading that it is listed under.
        example: what to type after `outlier-mlx`, for the end of its help.
        name: its name, if that is not the function's.
    """

    def register(function: Function) -> Function:
        epilog = f"Example: outlier-mlx {example}"
        decorate = app.command(name, cls=Command, rich_help_panel=panel, epilog=epilog)
        decorate(flattened(function))
        return function

    return register


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
