"""What the terminal shows: consoles, bars and figures. Results go to stdout, the rest to stderr."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain, islice
from shutil import get_terminal_size
from threading import Event, Timer
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from outlier_mlx.errors import one_line

# Rich is imported where something is drawn: for text in a pipe nobody has to wait for it.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn
    from rich.table import Table
    from rich.text import Text

# Columns of a terminal from which bytes and speed fit beside the bar.
WIDE = 70
# Columns of a terminal between those of a table.
GAP = 2
# Seconds before it is said that something takes its time.
MOMENT = 0.5

T = TypeVar("T")
#: Called with how much is done, and how much there is in all (None: not known yet).
Progress = Callable[[int, int | None], None]
#: Title and unit ("" for bytes) of a stage of some work, to a context that yields its progress.
Stages = Callable[[str, str], AbstractContextManager[Progress]]


def no_progress(done: int, total: int | None) -> None:
    """A progress callback that shows nothing."""


class Pipe:
    """A stream that is no terminal: text is written as it is, tables without trailing blanks."""

    is_terminal = False

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    @property
    def width(self) -> int:
        """Columns that tables may take: `COLUMNS`, or 80."""
        return get_terminal_size().columns

    def print(self, *objects: Any, soft_wrap: bool = True) -> None:
        """Write objects and a newline; `soft_wrap` is for terminals, where Rich may wrap."""
        if all(isinstance(thing, str) for thing in objects):
            text = " ".join(objects)
        else:
            console = _console(self.file, self.width, None)
            with console.capture() as capture:
                console.print(*objects)
            text = "\n".join(line.rstrip() for line in capture.get().splitlines())
        self.file.write(text + "\n")
        self.file.flush()


#: Where something is printed to.
Output: TypeAlias = "Pipe | Console"


def stderr() -> Output:
    """An output for people; colours and bars only on a terminal."""
    return _output(sys.stderr)


def stdout() -> Output:
    """An output for results."""
    return _output(sys.stdout)


def _output(file: IO[str]) -> Output:
    if not file.isatty() and not os.environ.get("FORCE_COLOR"):
        return Pipe(file)
    # Of terminals without escape sequences rich takes it that they are 80 columns wide.
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return _console(file, *(get_terminal_size() if dumb else (None, None)))


def _console(file: IO[str], width: int | None, height: int | None) -> "Console":
    from rich.console import Console

    return Console(
        file=file,
        highlight=False,
        markup=False,
        emoji=False,
        color_system=color_system(),
        width=width,
        height=height,
    )


def color_system() -> Literal["auto"] | None:
    """Rich's name of the colours to use: with `NO_COLOR`, neither colour nor bold nor dim."""
    return None if os.environ.get("NO_COLOR") else "auto"


def print_heading(output: Output, name: str, rest: str) -> None:
    """A name, in bold on a terminal, and what is said of it."""
    if isinstance(output, Pipe):
        output.print(one_line(name + rest))
        return
    from rich.text import Text

    text = Text(one_line(name + rest))
    text.stylize("bold", 0, len(one_line(name)))
    output.print(text, soft_wrap=True)


def progress_bar(title: str, *, quiet: bool) -> AbstractContextManager[Progress]:
    """A bar with bytes, speed and time left; yields a function of (bytes done, bytes in all).

    It appears with the first bytes: until then the hub may have bars of its own.
    """

    def figures() -> "list[ProgressColumn]":
        from rich.progress import DownloadColumn, TransferSpeedColumn

        return [DownloadColumn(), TransferSpeedColumn()]

    return _bar(title, figures, quiet=quiet)


@contextmanager
def counting_bar(title: str, unit: str, *, quiet: bool, at_once: bool = True) -> Iterator[Progress]:
    """A bar that counts; yields a function of (done, in all).

    It is there from the start, or else, as a bar of bytes, from the first call on.
    """

    def figures() -> "list[ProgressColumn]":
        from rich.progress import TextColumn

        return [TextColumn("{task.completed:.0f} " + unit)]

    with _bar(title, figures, quiet=quiet) as advance:
        if at_once:
            advance(0, None)
        yield advance


@contextmanager
def _bar(
    title: str, figures: "Callable[[], list[ProgressColumn]]", *, quiet: bool
) -> Iterator[Progress]:
    """A bar on a terminal; `figures` are left out where it is narrow."""
    console = stderr()
    if quiet or isinstance(console, Pipe) or not console.is_terminal:
        yield no_progress
        return
    if _is_plain(console):
        with _plain_line(console) as show:
            yield lambda done, total: show(f"{title} {done / total:.0%}" if total else title)
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    columns: list[ProgressColumn] = [TextColumn(title), BarColumn(), TaskProgressColumn()]
    if console.width >= WIDE:
        columns += figures()
    columns.append(TimeRemainingColumn())
    bar = ProgressBar(*columns, console=console, transient=True)
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
    """A sign of life on a terminal, for what takes longer than a moment.

    Yields a function that changes its text. Nothing of it is left in the end.
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

        timer = Timer(MOMENT, begin)
        timer.daemon = True
        # What is being drawn must be there before it is taken away.
        shown.callback(timer.join)
        shown.callback(timer.cancel)
        timer.start()
        yield show


def after_reading(start: Callable[[Progress], Iterator[T]], *, quiet: bool = False) -> Iterator[T]:
    """Generate; until the first response comes, a terminal shows how much of the prompt is read.

    Args:
        start: begins to generate, given what is to be told tokens read and tokens to read.
        quiet: show nothing.
    """
    with working("reading", quiet=quiet) as show:
        responses = start(lambda done, total: show(f"reading: {done} of {total} tokens"))
        first = list(islice(responses, 1))
    return chain(first, responses)


@contextmanager
def _spinner(console: "Console") -> Iterator[Callable[[str], None]]:
    """A turning sign and a line of text beside it."""
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
    """Whether a terminal is to get no escape sequences."""
    return console.is_dumb_terminal or console.no_color


@contextmanager
def _plain_line(console: "Console") -> Iterator[Callable[[str], None]]:
    """A line that is written over, and is blank in the end, without escape sequences."""
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


def plain_table(title: str | None = None) -> "Table":
    """An empty table that takes little room."""
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
    """Print a table, one below the other if it is wider than the output: no number is cut.

    Args:
        output: where to.
        heads: a name a column, of a few lines perhaps.
        rows: a cell a column.
        title: stands above the first.
        fixed: columns at the left that every piece begins with.
        left: columns at the left that are set flush left; the others are flush right.
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
    """Columns that a cell takes."""
    from rich.cells import cell_len

    return max(map(cell_len, str(cell).split("\n")))


def parts_table(rows: list, title: str | None = None) -> "Table":
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
