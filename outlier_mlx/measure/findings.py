"""A finding of `doctor`: a number or a word, where it comes from, and what is wrong with it."""

from dataclasses import dataclass
from typing import Any

# Where a finding comes from.
MEASURED, REPORTED, PUBLISHED = "measured here", "reported by the system", "published"
GIVEN, COMPUTED, UNKNOWN = "given", "computed", "not known"


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        key: its name for programs.
        name: its name for people.
        value: a value of JSON; None: not known.
        shown: the value for people.
        source: where it comes from, one of the words above.
        about: how it was found; or why it is not known, and what helps.
        problem: what is wrong, and what to do; None: nothing.
    """

    key: str
    name: str
    value: Any
    shown: str
    source: str
    about: str = ""
    problem: str | None = None

    @property
    def line(self) -> str:
        """The value and its source, for people."""
        if self.value is None:
            return f"{UNKNOWN}: {self.about or self.problem}"
        return f"{self.shown} ({self.source}{f': {self.about}' if self.about else ''})"

    def as_json(self) -> dict[str, Any]:
        """Value, source and how it was found; the problem, if there is one."""
        found = {"value": self.value, "source": self.source, "about": self.about}
        return found if self.problem is None else found | {"problem": self.problem}


def unknown(key: str, name: str, about: str, problem: str | None = None) -> Finding:
    """A finding that has no value."""
    return Finding(key, name, None, UNKNOWN, UNKNOWN, about, problem)
