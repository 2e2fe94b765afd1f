"""Commands: how their parameters are declared and parsed, and what their help looks like."""

import functools
import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from outlier_mlx.cli.ranks import together
from outlier_mlx.cli.values import Reader
from outlier_mlx.engine.buffers import mlx_is_imported, use_larger_buffers
from outlier_mlx.upstream import set_reader

#: Name of the parameter of `--model`, which stands for the argument MODEL.
NAMED = "named_model"
#: Names of parameters that are MODEL.
MODELS = ("model", "models")
#: Heading of the options that every command has.
GENERAL = "General"
#: Headings that come before the others.
FIRST = ("Arguments", "Options")


def _set_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.find_root().meta["debug"] = value
    return value


_NamedModel = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="MODEL", help="Use this in place of the argument MODEL."),
]
_Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks.", callback=_set_debug, rich_help_panel=GENERAL),
]


def flattened(function: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter that is a dataclass by its fields, since typer knows no groups.

    An argument `model` or `models` can also be given as `--model`. It is required, unless its
    default is the empty text. Every command gets `--debug`.

    Args:
        function: its parameters are options and arguments (`Annotated`, as typer wants them), and
            dataclasses with such fields. The default of a dataclass gives its fields' defaults.
    """
    groups: dict[str, type] = {}
    flat: list[inspect.Parameter] = []

    def add(name: str, annotation: Any, default: Any) -> None:
        flat.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )

    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        name, kind, default = parameter.name, parameter.annotation, parameter.default
        if isinstance(kind, type) and is_dataclass(kind):
            groups[name] = kind
            for field, hint, own in _fields(kind):
                add(field, hint, own if default is parameter.empty else getattr(default, field))
        elif name in MODELS:
            add(name, kind, None if default is parameter.empty else default)
            add(NAMED, _NamedModel, None)
        else:
            add(name, kind, default)
    add("debug", _Debug, False)

    @functools.wraps(function)
    def called(**given: Any) -> None:
        del given["debug"]
        given.pop(NAMED, None)
        for name, group in groups.items():
            given[name] = group(**{field: given.pop(field) for field, _, _ in _fields(group)})
        function(**given)

    called.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return called


@functools.cache
def _fields(group: Any) -> list[tuple[str, Any, Any]]:
    """Name, annotation and default of each field of a dataclass."""
    hints = get_type_hints(group, include_extras=True)
    return [(field.name, hints[field.name], field.default) for field in fields(group)]


class Command(TyperCommand):
    """A command with `MODEL` in two spellings, values read by `Reader`, and help in sections."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with the values of `--model` in place of MODEL."""
        read_plainly(self.get_params(ctx))
        with _telling(ctx):
            return super().parse_args(ctx, [*self._named(ctx, args), *args])

    def invoke(self, ctx: Any) -> Any:
        """Run the command, which may import MLX: its settings come before that."""
        if not mlx_is_imported():
            use_larger_buffers()
        # transformers tells at each start that there is no PyTorch, which nothing here needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        given = {
            name: value
            for name, value in ctx.params.items()
            if (source := ctx.get_parameter_source(name)) and source.name != "DEFAULT"
        }
        with _telling(ctx), together(str(ctx.info_name), given):
            return super().invoke(ctx)

    def _named(self, ctx: Any, args: list[str]) -> list[str]:
        """The values of `--model`; a usage error if MODEL is given twice or not at all."""
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        model = next((param for param in arguments if param.name in MODELS), None)
        if model is None or ctx.resilient_parsing:
            return []
        given, rest, order = self.make_parser(ctx).parse_args(list(args))
        named: list[str] = given.get(NAMED) or []
        if named and (rest or all(given.get(param.name) is not None for param in arguments)):
            ctx.fail("the model is given twice: as argument MODEL and by --model")
        if len(named) > 1 and model.nargs == 1:
            ctx.fail("--model is given twice, but there is one model")
        # Eager options, such as --help, are obeyed whatever else is missing.
        required = model.default is None
        if (
            required
            and not named
            and not given.get(model.name)
            and not any(p.is_eager for p in order)
        ):
            ctx.fail("no model is given: name one, as argument MODEL or by --model MODEL")
        return named

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then that there are options."""
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        text = " ".join(["Usage:", ctx.command_path, *map(_names, arguments), "[OPTIONS]"])
        lines = fill(text, formatter.width, subsequent_indent="  ", break_on_hyphens=False)
        formatter.write(f"{lines}\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, a section for each panel."""
        write_parameters(self.get_params(ctx), formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example, on one line if the terminal has room: it may be copied."""
        columns = get_terminal_size().columns
        text = fill(
            self.epilog or "",
            max(columns, 20),
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        formatter.write(f"\n{text}\n")


def read_plainly(params: Sequence[Any]) -> None:
    """Let our `Reader` read the values of options and arguments."""
    for param in params:
        set_reader(param, Reader())


@contextmanager
def _telling(ctx: Any) -> Iterator[None]:
    """Add the command to usage errors, so that they can say where its help is."""
    try:
        yield
    except typer.TyperException as error:
        if getattr(error, "ctx", None) is None:
            error.ctx = ctx  # type: ignore[attr-defined]
        raise


def write_parameters(params: Sequence[Any], formatter: Any) -> None:
    """Write the help of arguments and options, a section for each panel, the general one last."""
    panels: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for param in params:
        if not param.hidden:
            usual = "Arguments" if param.param_type_name == "argument" else "Options"
            panel = GENERAL if param.name == "help" else param.rich_help_panel or usual
            panels[panel].append((_names(param), _explanation(param)))
    for panel in sorted(panels, key=lambda name: (name == GENERAL, name not in FIRST)):
        write_section(panel, panels[panel], formatter)


def write_section(name: str, rows: list[tuple[str, str]], formatter: Any) -> None:
    """Write a heading, and below it names with a description each."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    with formatter.section(name if plain else typer.style(name, bold=True)):
        formatter.write_dl(rows, col_max=min(26, formatter.width // 3))


def _names(param: Any) -> str:
    """The spellings of an option and the placeholder of its value; or an argument's name."""
    value = placeholder(param)
    if param.param_type_name == "argument":
        return value + "..." * (param.nargs == -1)
    spellings = sorted(param.opts, key=len)
    return ", ".join([*spellings, *param.secondary_opts]) + f" {value}".rstrip()


def placeholder(param: Any) -> str:
    """The placeholder of an option's value in its help, such as PATH; empty for a switch."""
    if param.metavar is not None:
        return str(param.metavar)
    kind = param.type_descriptor.annotation
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    usual = {bool: "", int: "N", float: "X", Path: "PATH", str: "TEXT"}
    return usual[kind] if kind in usual else "|".join(map(str, get_args(kind)))


def _explanation(param: Any) -> str:
    text = param.help or ""
    if param.show_envvar and param.envvar:
        text += f" [{param.envvar}]"
    switch = param.type_descriptor.annotation is bool
    if param.default not in (None, "") and not switch and param.show_default:
        text += f" [default: {param.default}]"
    # MODEL may be given as `--model`, too.
    required = param.required or (param.name in MODELS and param.default is None)
    return text + " [required]" * required
