"""What the terminal shows: bars and tables. Results go to stdout, the rest to stderr."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from outlier_mlx.errors import one_line

# Columns of a terminal from which bytes and speed fit beside the bar.
WIDE = 70

#: Told what is done, and what there is in all.
Advance = Callable[[int, int], None]


def stderr() -> Console:
    """A console for people; colours and bars only on a terminal."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def stdout() -> Console:
    """A console for results."""
    return Console(highlight=False, markup=False, emoji=False)


def print_heading(console: Console, name: str, rest: str) -> None:
    """A name, in bold, and what is said of it."""
    text = Text(one_line(name + rest))
    text.stylize("bold", 0, len(one_line(name)))
    console.print(text, soft_wrap=True)


def progress_bar(title: str, *, quiet: bool) -> AbstractContextManager[Advance]:
    """A bar with bytes, speed and time left; yields a function of (bytes done, bytes in all)."""
    return _bar(title, [DownloadColumn(), TransferSpeedColumn()], quiet=quiet)


def counting_bar(title: str, unit: str, *, quiet: bool) -> AbstractContextManager[Advance]:
    """A bar that counts; yields a function of (done, in all)."""
    return _bar(title, [TextColumn("{task.completed:.0f} " + unit)], quiet=quiet)


@contextmanager
def _bar(title: str, figures: list[ProgressColumn], *, quiet: bool) -> Iterator[Advance]:
    """A bar on a terminal; `figures` are left out where it is narrow."""
    console = stderr()
    columns: list[ProgressColumn] = [TextColumn(title), BarColumn(), TaskProgressColumn()]
    if console.width >= WIDE:
        columns += figures
    columns.append(TimeRemainingColumn())
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(nbytes: int) -> str:
    """Bytes for people, in powers of ten."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def count(number: int) -> str:
    """A number of parameters for people."""
    value = float(number)
    for unit in ("", " K", " M"):
        if value < 1000:
            return f"{value:.0f}" if not unit else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.2f} B"


def plain_table(title: str | None = None) -> Table:
    """An empty table that takes little room."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def parts_table(rows: list, title: str | None = None) -> Table:
    """Parameters, bytes and bits per weight by kind of part, the total below; 40 columns wide."""
    table = plain_table(title)
    table.show_footer = True
    cells = [_cells(row) for row in rows]
    for name, total in zip(("part", "params", "size", "bits per\nweight"), cells[-1], strict=True):
        justify: Literal["left", "right"] = "left" if name == "part" else "right"
        table.add_column(name, total, justify=justify, no_wrap=True, vertical="bottom")
    for row in cells[:-1]:
        table.add_row(*row)
    return table


def _cells(row) -> tuple[str, str, str, str]:  # type: ignore[no-untyped-def]
    return row.kind, count(row.params), size(row.nbytes), f"{row.bits_per_weight:.2f}"


def print_report(report) -> None:  # type: ignore[no-untyped-def]
    """What a conversion wrote (a `tiers.convert.Report`)."""
    console = stderr()
    recipe = report.recipe
    console.print(
        parts_table(report.rows, one_line(f"{report.path.name}: {recipe.name}, {recipe.dtype}"))
    )
    if report.unquantized:
        shown = ", ".join(report.unquantized[:4])
        more = len(report.unquantized) - 4
        console.print(
            f"unquantized, since no group size divides their width: {shown}"
            + (f" and {more} more" if more > 0 else ""),
            soft_wrap=True,
        )
    console.print(
        one_line(f"wrote {report.path} from an overlay of form {report.form}"), soft_wrap=True
    )


def print_statistics(response) -> None:  # type: ignore[no-untyped-def]
    """Speed and memory of a finished generation (an mlx-lm `GenerationResponse`)."""
    stderr().print(
        f"prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s\n"
        f"generation: {response.generation_tokens} tokens,"
        f" {response.generation_tps:.1f} tokens/s\n"
        f"peak memory: {response.peak_memory:.3f} GB"
    )


def print_info(info) -> None:  # type: ignore[no-untyped-def]
    """What a model is (an `info.Info`)."""
    console = stdout()
    print_heading(console, info.name, f": {info.kind} ({info.form})")
    for name, value in info.details.items():
        console.print(one_line(f"{name}: {value}"), soft_wrap=True)
    console.print(
        f"parameters: {count(info.params)}, of which a token uses {count(info.active_params)}",
        soft_wrap=True,
    )
    cache = size(info.kv_bytes_per_token * 4096)
    more = f", and {cache} of KV cache for 4096 tokens in 16 bits"
    console.print(
        f"memory: {size(info.nbytes)} of weights" + (more if info.kv_bytes_per_token else ""),
        soft_wrap=True,
    )
    console.print(parts_table(info.rows))


def print_choices(choices, available) -> None:  # type: ignore[no-untyped-def]
    """What recipes take (a list of `tiers.choose.Choice`), held against a `memory.Budget`."""
    console = stdout()
    keys = next((list(choice.memory) for choice in choices if choice.memory), [])
    table = plain_table("Memory by tokens of context and bits of the KV cache")
    table.add_column("recipe", no_wrap=True)
    table.add_column("weights", justify="right", no_wrap=True)
    for tokens, bits in keys:
        table.add_column(f"{tokens // 1024}k\n{bits or 16} bits", justify="right", no_wrap=True)
    for choice in choices:
        if choice.reason is None:
            cells = [_against(choice.memory[key], available.nbytes) for key in keys]
            table.add_row(choice.name, size(choice.nbytes), *cells)
    console.print(table)
    for choice in choices:
        if choice.reason is not None:
            console.print(f"{choice.name}: {choice.reason}", soft_wrap=True)
    console.print(
        f"{available.whose} gives a model {size(available.nbytes)}; (in brackets: does not fit)",
        soft_wrap=True,
    )


def _against(nbytes: int, limit: int) -> str:
    return size(nbytes) if nbytes <= limit else f"({size(nbytes)})"


def print_routing(layers) -> None:  # type: ignore[no-untyped-def]
    """Which experts serve (a list of `routing.LayerRouting`), a row a layer."""
    table = plain_table(f"Share of {layers[0].tokens} tokens that each expert serves, %")
    table.add_column("layer", justify="right")
    table.add_column("entropy, bits", justify="right")
    for expert in range(len(layers[0].share)):
        table.add_column(str(expert), justify="right", no_wrap=True)
    for layer in layers:
        shares = [f"{100 * share:.0f}" for share in layer.share]
        table.add_row(str(layer.layer), f"{layer.entropy:.2f}", *shares)
    stdout().print(table)
