"""Output on terminals and in pipes: progress bars, tables and numbers.

Results go to stdout, everything else to stderr.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain, islice
from shutil import get_terminal_size
from threading import Event, Timer
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from outlier_mlx.errors import one_line

# Rich is imported only where something is drawn, because importing it takes time.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn
    from rich.table import Table
    from rich.text import Text

# Least width of a terminal, in characters, for bytes and speed beside a progress bar.
WIDE = 70
# Characters between two columns of a table.
GAP = 2
# Seconds before a spinner appears.
DELAY = 0.5

T = TypeVar("T")
#: Progress callback: called with the amount done and the total amount (None: not known yet).
Progress = Callable[[int, int | None], None]
#: Called with title and unit ("" for bytes) of a stage of work; returns a context manager that
#: yields its progress callback.
Stages = Callable[[str, str], AbstractContextManager[Progress]]


def no_progress(done: int, total: int | None) -> None:
    """A progress callback that shows nothing."""


class Pipe:
    """An output that is not a terminal: plain text, and tables without trailing blanks."""

    is_terminal = False

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    @property
    def width(self) -> int:
        """Largest width of tables in characters: `COLUMNS`, or 80."""
        return get_terminal_size().columns

    def print(self, *objects: Any, soft_wrap: bool = True) -> None:
        """Write objects and a newline; `soft_wrap` is ignored, as nothing is wrapped."""
        if all(isinstance(thing, str) for thing in objects):
            text = " ".join(objects)
        else:
            console = _console(self.file, self.width, None)
            with console.capture() as capture:
                console.print(*objects)
            text = "\n".join(line.rstrip() for line in capture.get().splitlines())
        self.file.write(text + "\n")
        self.file.flush()


#: A terminal or a pipe.
Output: TypeAlias = "Pipe | Console"


def stderr() -> Output:
    """The output for everything but results; colours and bars only on a terminal."""
    return _output(sys.stderr)


def stdout() -> Output:
    """The output for results."""
    return _output(sys.stdout)


def _output(file: IO[str]) -> Output:
    if not file.isatty() and not os.environ.get("FORCE_COLOR"):
        return Pipe(file)
    # For terminals without escape sequences, Rich assumes a width of 80.
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return _console(file, *(get_terminal_size() if dumb else (None, None)))


def _console(file: IO[str], width: int | None, height: int | None) -> "Console":
    from outlier_mlx.screen import Screen

    return Screen(
        file=file,
        highlight=False,
        markup=False,
        emoji=False,
        color_system=color_system(),
        width=width,
        height=height,
    )


def color_system() -> Literal["auto"] | None:
    """Rich's `color_system`; None (no colour, bold or dim) if `NO_COLOR` is set."""
    return None if os.environ.get("NO_COLOR") else "auto"


def print_heading(output: Output, name: str, rest: str) -> None:
    """Print a name, on a terminal in bold, and the rest of the line."""
    if isinstance(output, Pipe):
        output.print(one_line(name + rest))
        return
    from rich.text import Text

    from outlier_mlx.screen import folded

    text = Text(folded(one_line(name + rest), output.width))
    text.stylize("bold", 0, len(one_line(name)))
    output.print(text, soft_wrap=True)


@contextmanager
def progress_bar(
    title: str, unit: str = "", *, quiet: bool, at_once: bool = True
) -> Iterator[Progress]:
    """A progress bar on a terminal; yields its progress callback.

    Args:
        title: stands before the bar.
        unit: what is counted; empty: bytes, with their speed.
        quiet: show nothing.
        at_once: whether a bar that counts appears before the first call. One of bytes never does:
            huggingface_hub may show its own bars before.
    """
    console = stderr()
    if quiet or isinstance(console, Pipe) or not console.is_terminal:
        yield no_progress
        return
    drawn = _plain_bar(console, title) if _is_plain(console) else _bar(console, title, unit)
    with drawn as advance:
        if unit and at_once:
            advance(0, None)
        yield advance


@contextmanager
def _plain_bar(console: "Console", title: str) -> Iterator[Progress]:
    with _plain_line(console) as show:
        yield lambda done, total: show(f"{title} {done / total:.0%}" if total else title)


@contextmanager
def _bar(console: "Console", title: str, unit: str) -> Iterator[Progress]:
    from rich import progress

    columns: list[ProgressColumn] = [progress.TextColumn(title), progress.BarColumn()]
    columns.append(progress.TaskProgressColumn())
    if console.width >= WIDE and unit:
        columns.append(progress.TextColumn("{task.completed:.0f} " + unit))
    elif console.width >= WIDE:
        columns += [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    columns.append(progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, console=console, transient=True)
    task = bar.add_task(title, total=None)

    def advance(done: int, total: int | None) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


@contextmanager
def working(title: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal, which appears after `DELAY` and is removed at the end.

    Yields a function that changes its text.
    """
    console = stderr()
    if quiet or isinstance(console, Pipe) or not console.is_terminal:
        yield lambda text: None
        return
    current, begun = title, Event()
    with ExitStack() as shown:
        draw = shown.enter_context(
            _plain_line(console) if _is_plain(console) else _spinner(console)
        )

        def begin() -> None:
            begun.set()
            draw(current)

        def show(text: str) -> None:
            nonlocal current
            current = text
            if begun.is_set():
                draw(text)

        timer = Timer(DELAY, begin)
        timer.daemon = True
        # Wait until drawing is finished before the spinner is removed.
        shown.callback(timer.join)
        shown.callback(timer.cancel)
        timer.start()
        yield show


def after_reading(start: Callable[[Progress], Iterator[T]], *, quiet: bool = False) -> Iterator[T]:
    """Generate, and show on a terminal the progress of the prompt until the first response.

    Args:
        start: starts generation with a progress callback (tokens processed, tokens in total).
        quiet: show nothing.

    Returns:
        All responses.
    """
    with working("reading", quiet=quiet) as show:
        responses = start(lambda done, total: show(f"reading: {done} of {total} tokens"))
        first = list(islice(responses, 1))
    return chain(first, responses)


@contextmanager
def _spinner(console: "Console") -> Iterator[Callable[[str], None]]:
    """Rich's spinner with a line of text; yields a function that sets the text."""
    from rich.text import Text

    status = console.status("")

    def show(text: str) -> None:
        line = Text(one_line(text))
        line.truncate(console.width - 3, overflow="ellipsis")
        status.update(line)
        status.start()

    try:
        yield show
    finally:
        status.stop()


def _is_plain(console: "Console") -> bool:
    """Whether a terminal must not get escape sequences."""
    return console.is_dumb_terminal or console.no_color


@contextmanager
def _plain_line(console: "Console") -> Iterator[Callable[[str], None]]:
    """A line that is overwritten without escape sequences; yields a function that sets its text."""
    shown = ""

    def show(text: str) -> None:
        nonlocal shown
        text = one_line(text)[: console.width - 1]
        if text != shown:
            console.file.write("\r" + text.ljust(len(shown)))
            console.file.flush()
            shown = text

    try:
        yield show
    finally:
        if shown:
            show("")
            console.file.write("\r")
            console.file.flush()


def size(nbytes: int) -> str:
    """Format a number of bytes with a unit; units are powers of 1000."""
    return _with_unit(nbytes, (" B", " kB", " MB", " GB"))


def count(number: int) -> str:
    """Format a number of parameters with K (thousand), M (million) or B (billion)."""
    return _with_unit(number, ("", " K", " M", " B"))


def _with_unit(value: float, units: Sequence[str]) -> str:
    """Format a number with the first unit that it has less than 1000 of, or else the last one."""
    for decimals, unit in zip((0, 1, 1), units, strict=False):
        if round(value, decimals) < 1000:
            return f"{value:.{decimals}f}{unit}"
        value /= 1000
    return f"{value:.2f}{units[-1]}"


def plain_table(title: str | None = None) -> "Table":
    """A new compact table."""
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def print_columns(
    output: Output,
    heads: Sequence[str],
    rows: "Iterable[Sequence[str | Text]]",
    *,
    title: str | None = None,
    fixed: int = 1,
    left: int = 1,
) -> None:
    """Print a table. If it is wider than the output, its columns are split over several tables.

    Args:
        output: where to print.
        heads: heading of each column; may have several lines.
        rows: a cell for each column.
        title: printed above the first table.
        fixed: number of first columns that are repeated in every table.
        left: number of first columns that are left-aligned; the others are right-aligned.
    """
    columns = list(zip(heads, *rows, strict=True))
    widths = [GAP + max(map(_width, column)) for column in columns]
    start = fixed
    while start < len(columns) or start == fixed:
        stop, room = start + 1, output.width - sum(widths[:fixed]) - sum(widths[start:][:1])
        while stop < len(columns) and widths[stop] <= room:
            room -= widths[stop]
            stop += 1
        table = plain_table(title if start == fixed else None)
        for at in [*range(fixed), *range(start, min(stop, len(columns)))]:
            table.add_column(columns[at][0], justify="left" if at < left else "right", no_wrap=True)
        for row in zip(*(c[1:] for c in [*columns[:fixed], *columns[start:stop]]), strict=True):
            table.add_row(*row)
        output.print(table)
        start = stop


def _width(cell: "str | Text") -> int:
    """Width of a cell in characters."""
    from rich.cells import cell_len

    return max(map(cell_len, str(cell).split("\n")))


def parts_table(rows: list, title: str | None = None) -> "Table":
    """A table of parameters, bytes and bits per weight by kind of part, 40 characters wide.

    Args:
        rows: rows of `SummaryRow`, the total last.
        title: printed above the table.
    """
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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off transformers' warnings about the unknown model type and about RoPE fields."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
