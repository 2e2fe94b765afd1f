"""A terminal whose long lines end between words, where it would itself break them anywhere."""

import re
from textwrap import fill
from typing import Any

from rich.console import Console

# What stays on one line: commands, which may be copied, asides, and sizes with their units.
_WHOLE = re.compile(
    r"`[^`]*`|\([^()]{1,60}\)|(?<=: )(?:pip install|outlier-mlx) [^,;]*$|[0-9] (?:[kMG]?B|GiB)\b"
)
# Stands for the blanks in these while lines are filled.
_GLUE = "\0"
# Characters of a line, at least, however narrow the terminal.
_LEAST = 20


class Screen(Console):
    """Rich's console on a terminal."""

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """Print objects; with `soft_wrap`, texts in lines of any length in a file, or folded."""
        if soft_wrap and self.file.isatty():
            objects = tuple(folded(x, self.width) if isinstance(x, str) else x for x in objects)
        super().print(*objects, soft_wrap=soft_wrap, **options)


def folded(text: str, width: int) -> str:
    """Text with line breaks between words; a word that is longer than a line stays whole.

    Args:
        text: one or more lines.
        width: of a line, in characters.
    """
    return "\n".join(_fold(line, width) for line in text.split("\n"))


def _fold(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    words = line.lstrip()
    indent = line[: len(line) - len(words)]
    return fill(
        _WHOLE.sub(lambda found: found[0].replace(" ", _GLUE), words),
        max(width, _LEAST),
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    ).replace(_GLUE, " ")
