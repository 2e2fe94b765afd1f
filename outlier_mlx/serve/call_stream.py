"""Tool calls while they are written: the name first, then the arguments piece by piece."""

import re
from dataclasses import dataclass, replace

from outlier_mlx.serve.calls import Call, new_id
from outlier_mlx.serve.json_text import JsonObject

# Marks and a name; what is longer is not the beginning of a call.
_LONGEST_HEAD = 512
_CLOSERS = " \t\r\n,;]}"


@dataclass(frozen=True)
class _Format:
    """A format in which a call's name stands before its arguments, and those are JSON.

    Attributes:
        head: what stands before the arguments, with the name.
        tail: what stands after them.
    """

    head: re.Pattern[str]
    tail: re.Pattern[str]


_FORMATS = (
    # {"name": "f", "arguments": {}}, also in a list; Mistral's models write an id after them.
    _Format(
        re.compile(
            r'[\s,;\[]*\{\s*"name"\s*:\s*"([\w./:-]{1,256})"\s*,'
            r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
        ),
        re.compile(r'\s*(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}'),
    ),
    # f[ARGS]{}, of Mistral's later models.
    _Format(
        re.compile(r"\s*([\w-]{1,256})\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?\[ARGS\]\s*(?=\{)"),
        re.compile(""),
    ),
)


class CallStream:
    """The calls in one block of text between the marks of a call.

    Args:
        names: the functions that were offered to the model.

    Attributes:
        rest: what does not belong to a call that has begun.
        writing: whether the arguments of a call are being written.
        began: whether a call has begun.
    """

    def __init__(self, names: set[str]) -> None:
        self.rest = ""
        self.began = False
        self._names = names
        self._format: _Format | None = None  # of the call that is being written
        self._arguments: JsonObject | None = None
        self._gave_up = False

    @property
    def writing(self) -> bool:
        """Whether the arguments of a call are being written."""
        return self._arguments is not None

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """Take more text.

        Returns:
            More of the arguments of the call that was being written, and the calls that began
            since; the last of them may go on.
        """
        more = ""
        calls: list[Call] = []
        self.rest += text
        while not self._gave_up:
            if self._arguments is not None:
                known = self._continue(self._arguments)
                if calls:
                    calls[-1] = replace(calls[-1], arguments=known)
                else:
                    more += known
                if self._arguments is not None:
                    break
            if self._format is not None and not self._end(self._format):
                break
            call = self._begin()
            if call is None:
                break
            calls.append(call)
        return more, calls

    def end(self) -> str:
        """The block has ended: what is left of the arguments that are not complete."""
        if self._arguments is not None:
            return self._arguments.rest
        if self.began and not self.rest.strip(_CLOSERS):
            self.rest = ""
        return ""

    def _begin(self) -> Call | None:
        for form in _FORMATS:
            match = form.head.match(self.rest)
            if match is not None and match[1] in self._names:
                self._format, self._arguments = form, JsonObject()
                self.rest = self.rest[match.end() :]
                self.began = True
                return Call(new_id(), match[1], "")
        self._gave_up = len(self.rest) > _LONGEST_HEAD
        return None

    def _continue(self, arguments: JsonObject) -> str:
        known = arguments.feed(self.rest)
        self.rest = ""
        if arguments.ended or arguments.failed:
            self.rest = arguments.rest
            self._arguments = None
            self._gave_up = arguments.failed
        return known

    def _end(self, form: _Format) -> bool:
        match = form.tail.match(self.rest)
        if match is None:
            return False
        self.rest = self.rest[match.end() :]
        self._format = None
        return True
