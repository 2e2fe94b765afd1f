"""Replies on a terminal: Markdown, rendered block by block as it comes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

# Seconds between two renderings of the block that is being written.
INTERVAL = 0.08
# Lines of the terminal left free below it.
SPARE_LINES = 2


class Writer(Protocol):
    """Takes a reply, piece by piece."""

    def write(self, text: str) -> None:
        """Show some more text."""


class PlainWriter:
    """Prints pieces as they are; on a terminal without what would control it."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def write(self, text: str) -> None:
        """Print some text."""
        self.console.file.write(harmless(text) if self.console.is_terminal else text)
        self.console.file.flush()


class MarkdownWriter:
    """Renders Markdown while it is being written.

    A block that another one follows is finished: it is printed for good. Below it the block at the
    end is drawn anew as it grows, or as much of its end as the terminal has room for.
    """

    def __init__(self, console: Console, live: Live) -> None:
        self.console = console
        self.live = live
        self.text = ""  # of the block at the end
        self.drawn = 0.0
        self.printed = False

    def write(self, text: str) -> None:
        """Add some text, and show it if the last drawing is not too recent."""
        self.text += harmless(text)
        if time.monotonic() - self.drawn >= INTERVAL:
            self._print_finished()
            room = max(1, self.console.height - SPARE_LINES)
            self.live.update(_Lines(self.text, room), refresh=True)
            self.drawn = time.monotonic()

    def finish(self) -> None:
        """Print what is left for good."""
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
    """Markdown without the empty lines around it; its last lines only, if `room` says so."""

    def __init__(self, text: str, room: int | None = None) -> None:
        self.text = text
        self.room = room

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Markdown(self.text), options, pad=False)
        while lines and all(map(_is_empty, lines[0])):
            lines.pop(0)
        while lines and all(map(_is_empty, lines[-1])):
            lines.pop()
        for line in lines if self.room is None else lines[-self.room :]:
            yield from line
            yield Segment.line()


def _is_empty(segment: Segment) -> bool:
    background = segment.style.bgcolor if segment.style else None
    return not segment.text.strip() and (background is None or background.is_default)


def renders_markdown(console: Console) -> bool:
    """Whether Markdown can be rendered there, and is wanted."""
    return console.is_terminal and not console.no_color and not console.is_dumb_terminal


@contextmanager
def reply_writer(console: Console, *, markdown: bool) -> Iterator[Writer]:
    """What shows a reply: Markdown rendered if asked, else the text as it is."""
    if not markdown:
        yield PlainWriter(console)
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:
        writer = MarkdownWriter(console, live)
        try:
            yield writer
        finally:
            writer.finish()


def harmless(text: str) -> str:
    """The text with control characters shown instead of sent: a terminal would obey them."""
    return "".join(_visible(c) for c in text if c != "\r")


def _visible(char: str) -> str:
    code = ord(char)
    if char in "\n\t" or 0x20 <= code < 0x7F or code >= 0xA0:
        return char
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"
