"""Terminals: what programs send to one, and what is then to be seen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios

from tests.program import start_program

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|4[0-7]|9[0-7])(?:;[0-9;]*)?m")

_PART = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+")


def screen(sent: str) -> list[str]:
    """What a terminal of unlimited length shows in the end of what rich's live display sends.

    Without what is blank at the ends of lines, and at the end of all.
    """
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


def terminal_variables(**variables: str) -> dict[str, str]:
    """The environment of a program on a terminal with colours."""
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return kept | {"TERM": "xterm-256color"} | variables


def on_terminal(columns: int, *arguments: object, typed: str = "", **variables: str) -> str:
    """What a program writes to a terminal of some width, escapes included.

    Args:
        columns: the terminal's width.
        arguments: the program's.
        typed: what is typed, without waiting for a question; the terminal shows it, too.
        variables: of its environment.
    """

    def set_size() -> None:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ours, theirs = pty.openpty()
    process = start_program(
        *arguments,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=terminal_variables(**variables),
        preexec_fn=set_size,
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, typed.encode())
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0, written
    return written.decode()


def lines_shown(written: str) -> list[str]:
    """Lines that were ever on the screen, a state of the bar each."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPE.sub("", written))]


def fits(columns: int, lines: list[str]) -> list[str]:
    """Lines that are too long for the terminal or were cut to fit."""
    return [line for line in lines if len(line) > columns or "…" in line]
