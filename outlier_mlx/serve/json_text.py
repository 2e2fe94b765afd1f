"""Following the text of a JSON object while it is written."""

import math
import re

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_ATOM = re.compile(r"[-+.\w]+")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_LITERALS = ("true", "false", "null")
# Longer ones are no numbers that anybody means.
_LONGEST_ATOM = 64
# json's own limit is not much higher.
_DEEPEST = 200


class JsonObject:
    """The text of one JSON object (RFC 8259), which comes in parts that may end anywhere.

    Attributes:
        ended: whether the object is complete.
        failed: whether what followed cannot be part of an object.
        rest: text that is not yet known to be part of the object, or comes after it.
    """

    def __init__(self) -> None:
        self.ended = self.failed = False
        self.rest = ""
        self._open: list[str] = []  # the brackets that are to be closed
        self._next = "object"
        self._in_string = False

    def feed(self, text: str) -> str:
        """Take more text; returns how much more of the object is known, up to its end."""
        self.rest += text
        at = 0
        while not self.ended and not self.failed:
            start = at
            at = self._string(at) if self._in_string else self._step(at)
            if at == start:
                break
        known, self.rest = self.rest[:at], self.rest[at:]
        return known

    def _string(self, at: int) -> int:
        """Go on in a string, to its end if that is there."""
        match = _STRING.match(self.rest, at)
        assert match is not None
        at = match.end()
        if self.rest[at : at + 1] == '"':
            self._in_string = False
            return at + 1
        # An escape sequence may be incomplete.
        left = self.rest[at:]
        self.failed = bool(left) and re.fullmatch(r"\\(?:u[0-9a-fA-F]{0,3})?", left) is None
        return at

    def _step(self, at: int) -> int:
        """Go on by a bracket, a mark, the beginning of a string, or a number or literal."""
        space = _SPACE.match(self.rest, at)
        assert space is not None
        at = space.end()
        letter = self.rest[at : at + 1]
        if not letter:
            return at
        value = self._next in ("value", "value or end")
        if letter == "{" and (value or self._next == "object"):
            self._enter("}", "key or end")
        elif letter == "[" and value:
            self._enter("]", "value or end")
        elif letter in "}]" and self._open[-1:] == [letter] and self._next.endswith("end"):
            self._open.pop()
            self.ended = not self._open
            self._next = "comma or end"
        elif letter == "," and self._next == "comma or end":
            self._next = "key" if self._open[-1] == "}" else "value"
        elif letter == ":" and self._next == "colon":
            self._next = "value"
        elif letter == '"' and (value or self._next in ("key", "key or end")):
            self._in_string = True
            self._next = "comma or end" if value else "colon"
        elif value:
            return self._atom(at)
        else:
            self.failed = True
            return at
        return at + 1

    def _enter(self, closing: str, following: str) -> None:
        self._open.append(closing)
        self._next = following
        self.failed = len(self._open) > _DEEPEST

    def _atom(self, at: int) -> int:
        """A number or a literal, once what follows it is there."""
        match = _ATOM.match(self.rest, at)
        text = match[0] if match else ""
        if text and len(text) <= _LONGEST_ATOM and at + len(text) == len(self.rest):
            return at
        number = _NUMBER.fullmatch(text) and math.isfinite(float(text))
        if text not in _LITERALS and not number:
            self.failed = True
            return at
        self._next = "comma or end"
        return at + len(text)
