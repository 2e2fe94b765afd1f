"""A terminal of unlimited length that understands what rich's live display sends."""

from __future__ import annotations

import re

_PART = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+")


def screen(sent: str) -> list[str]:
    """The lines that are left, without what is blank at their ends and at the end of all."""
    lines, row, column = [""], 0, 0
    for part in _PART.findall(sent):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b["):
            row -= int(part[2:-1] or 1)
            assert row >= 0
        elif part.startswith("\x1b[2K"):
            lines[row] = ""
        elif not part.startswith("\x1b"):
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return "\n".join(line.rstrip() for line in lines).rstrip().split("\n")


def highest_jump(sent: str) -> int:
    """How many lines at a time the cursor went up at most."""
    jumps = re.findall(r"(?:\x1b\[2K|\x1b\[1A|\r)+", sent)
    return max((jump.count("\x1b[1A") for jump in jumps), default=0)
