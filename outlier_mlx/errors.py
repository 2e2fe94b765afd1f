"""The errors that a user can act on: the command line prints them as one line."""

from collections.abc import Iterable
from difflib import get_close_matches

# Names in files can be as long as the files.
_MAX_MESSAGE = 900


class OutlierError(Exception):
    """Something is wrong with an input or with the machine; the message says what and where.

    It is one line that a terminal can show, of some hundred characters at most.
    """

    def __init__(self, message: str) -> None:
        line = one_line(message)
        if len(line) > _MAX_MESSAGE:
            half = _MAX_MESSAGE // 2
            line = f"{line[:half]} ... {line[-half:]}"
        super().__init__(line)


class CheckpointError(OutlierError):
    """A checkpoint, base or tier on disk is not what it should be."""


class OutputExistsError(OutlierError):
    """The place to write to is taken, and nobody asked to replace it."""


class CheckpointWarning(UserWarning):
    """A checkpoint holds something that is ignored and that its author may have meant."""


def did_you_mean(given: str, names: Iterable[str], form: str = "; did you mean {!r}?") -> str:
    """The end of a refusal: which of the names is the nearest, or nothing if none is near."""
    near = get_close_matches(given, list(names), 1)
    return form.format(near[0]) if near else ""


def one_line(text: str) -> str:
    """Text as one line that a terminal only prints: names in files may hold control characters."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
