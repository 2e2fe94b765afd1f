"""The errors that a user can act on: the command line prints them as one line."""

import re
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches

# Names in files can be as long as the files.
_MAX_MESSAGE = 900
_MAX_NAME = 80
# Names that a refusal suggests, at most.
_MOST_NEAR = 5
# A layer's number in the path of a module, or in the name of a GGUF tensor.
_LAYER = re.compile(r"(\.layers\.|^blk\.)[0-9]+\.")


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
    """The output exists, and `force` is not set."""


class CheckpointWarning(UserWarning):
    """A checkpoint holds something that is ignored and that its author may have meant."""


def did_you_mean(given: str, names: Iterable[str], hint: str = "; did you mean {}?") -> str:
    """The end of a refusal: which names begin as the given one, or else the nearest one.

    Nothing if no name is near. Options are compared without their dashes, which all have.
    """
    bare = {name: name.lstrip("-/") for name in names}
    wanted = given.lstrip("-/")
    near = [name for name, word in bare.items() if wanted and word.startswith(wanted)]
    if not near:
        nearest = get_close_matches(wanted, bare.values(), 1)
        near = [name for name, word in bare.items() if word in nearest]
    return hint.format(listed(map(repr, near), _MOST_NEAR, last="or")) if near else ""


def listed(names: Iterable[object], most: int | None = None, last: str = "and") -> str:
    """Names for people: "a, b and c", "a, b and 3 more", or "none".

    Args:
        names: anything that has a text.
        most: how many are named. Names in files can be many, and long: each is cut then, too.
        last: the word before the last name.
    """
    texts = list(map(str, names))
    if most is not None:
        texts = [text if len(text) <= _MAX_NAME else text[:_MAX_NAME] + "..." for text in texts]
        if len(texts) > most:
            texts[most:] = [f"{len(texts) - most} more"]
            last = "and"
    if len(texts) < 2:
        return texts[0] if texts else "none"
    return f"{', '.join(texts[:-1])} {last} {texts[-1]}"


def counted(number: int, name: str) -> str:
    """A number of things for people: "1 token", "2 tokens"."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def by_layer(paths: Iterable[str]) -> str:
    """Names of modules for people; the same module of several layers is named once."""
    layers = Counter(_LAYER.sub(r"\1N.", path) for path in dict.fromkeys(paths))
    return listed(
        name if "N." not in name else f"{name} ({count} layer{'s' if count > 1 else ''})"
        for name, count in layers.items()
    )


def one_line(text: str) -> str:
    """Text as one line that a terminal only prints: names in files may hold control characters."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
