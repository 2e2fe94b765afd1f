"""Replies on a terminal: Markdown, rendered block by block while it is generated."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from outlier_mlx.cli.writers import PlainWriter, without_controls

# Least time in seconds between two drawings of the unfinished block.
INTERVAL = 0.08
# Lines of the terminal that stay free below the unfinished block.
SPARE_LINES = 2


class MarkdownWriter:
    """Renders Markdown while it is being generated.

    A block is finished once another block follows; finished blocks are printed once. The last block
    is drawn again as it grows; if it is too long for the terminal, only its last lines are drawn.
    """

    def __init__(self, console: Console, live: Live) -> None:
        self.console = console
        self.live = live
        self.text = ""  # of the unfinished block
        self.drawn = 0.0
        self.printed = False

    def write(self, text: str) -> None:
        """Add a piece of text, and draw it if the last drawing is older than `INTERVAL`."""
        self.text += without_controls(text)
        if time.monotonic() - self.drawn >= INTERVAL:
            self._print_finished()
            limit = max(1, self.console.height - SPARE_LINES)
            self.live.update(_Lines(self.text, limit), refresh=True)
            self.drawn = time.monotonic()

    def finish(self) -> None:
        """Print the last block."""
        self._print_finished()
        self.live.update("", refresh=True)
        if self.text.strip():
            self._print(self.text)

    def _print_finished(self) -> None:
        tokens = Markdown(self.text).parsed
        starts = [token.map[0] for token in tokens if token.level == 0 and token.map]
        lines = self.text.split("\n")
        for start, end in pairwise(starts):
            self._print("\n".join(lines[start:end]))
        if starts:
            self.text = "\n".join(lines[starts[-1] :])

    def _print(self, text: str) -> None:
        if self.printed:
            self.console.print()
        self.console.print(_Lines(text), end="")
        self.printed = True


class _Lines:
    """Markdown without empty lines around it; only its last `limit` lines, if that is given."""

    def __init__(self, text: str, limit: int | None = None) -> None:
        self.text = text
        self.limit = limit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Markdown(self.text), options, pad=False)
        while lines and all(map(_is_empty, lines[0])):
            lines.pop(0)
        while lines and all(map(_is_empty, lines[-1])):
            lines.pop()
        for line in lines if self.limit is None else lines[-self.limit :]:
            yield from line
            yield Segment.line()


def _is_empty(segment: Segment) -> bool:
    background = segment.style.bgcolor if segment.style else None
    return not segment.text.strip() and (background is None or background.is_default)


def renders_markdown(console: Console) -> bool:
    """Whether the console is a terminal that shows colours, and `NO_COLOR` is not set."""
    return console.is_terminal and not console.no_color and not console.is_dumb_terminal


@contextmanager
def reply_writer(console: Console, *, markdown: bool) -> Iterator[PlainWriter | MarkdownWriter]:
    """A writer for one reply: one that renders Markdown, or one that prints plain text."""
    if not markdown:
        yield PlainWriter(console)
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:
        writer = MarkdownWriter(console, live)
        try:
            yield writer
        finally:
            writer.finish()
