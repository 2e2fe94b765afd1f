"""Tool calls: what a model wrote between the marks of a call, read as calls of functions."""

import json
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from outlier_mlx.upstream import TokenizerWrapper

NAME = re.compile(r"[\w./:-]{1,256}")
# mlx-lm's parsers that take any text for the call of a function.
_GUESSING = "mlx_lm.tool_parsers.glm47"
# In f[CALL_ID]a1[ARGS]{}, of some of Mistral's models, mlx-lm's parser takes the id for the name.
_CALL_ID = re.compile(r"\[CALL_ID\]\s*[\w-]+\s*(?=\[ARGS\])")
_BETWEEN = " \t\r\n,;"
# The instruction in the templates of Llama 3: the whole reply is the JSON of a call.
_WHOLE_REPLY = re.compile(r"\{\W*name\W*: function name, \W*parameters\W*: dictionary")
# What such a reply begins with, after which it is text or a call.
_CODE = "<|python_tag|>"


@dataclass(frozen=True)
class Call:
    """A call of a function; `arguments` is the JSON text of an object, or its beginning."""

    id: str
    name: str
    arguments: str


def new_id() -> str:
    """The id of a call."""
    return f"call_{uuid.uuid4().hex}"


def reads_calls(tokenizer: TokenizerWrapper) -> bool:
    """Whether the format of the model's tool calls is known."""
    return bool(tokenizer.has_tool_calling) or _calls_without_marks(tokenizer)


def _calls_without_marks(tokenizer: TokenizerWrapper) -> bool:
    template = tokenizer.chat_template
    return isinstance(template, str) and _WHOLE_REPLY.search(template) is not None


class CallReader:
    """Reads tool calls in a model's own format.

    Args:
        tokenizer: mlx-lm's, which knows the marks and the parser of the model's format.
        tools: the functions that were offered to the model.

    Attributes:
        start: the mark before a call; empty if a reply is a call as a whole, or none.
        end: the mark after a call; empty if the format has none.
        names: the functions.
    """

    def __init__(self, tokenizer: TokenizerWrapper, tools: list[dict[str, Any]]) -> None:
        marked = tokenizer.has_tool_calling
        self.start: str = tokenizer.tool_call_start if marked else ""
        self.end: str = tokenizer.tool_call_end if marked else ""
        self.names = {tool["function"]["name"] for tool in tools}
        self._parse: Callable[[str, Any], Any] | None = tokenizer.tool_parser if marked else None
        self._tools = [_with_plain_schemas(tool) for tool in tools]

    def begins(self, text: str) -> str | None:
        """In a format without marks: the call in the beginning of a reply.

        Returns:
            The text; empty if there may be a call in what follows; None if there is none.
        """
        text = text.lstrip()
        if _CODE.startswith(text[: len(_CODE)]) and len(text) < len(_CODE):
            return ""
        text = text.removeprefix(_CODE).lstrip()
        return text if not text or text.startswith("{") else None

    def read(self, block: str, *, whole: bool) -> list[Call]:
        """The calls in the text between two marks; none if any of it cannot be read.

        Args:
            block: the text.
            whole: whether the model wrote it to the end. If not, a format may read as a call with
                fewer arguments, so only complete JSON counts.
        """
        readers = (self._in_own_format, _in_json) if whole else (_in_json,)
        for reader in readers:
            try:
                calls = [self._call(found) for found in reader(block)]
            except Exception:  # a parser can raise anything for what a model writes
                continue
            if calls:
                return calls
        return []

    def _in_own_format(self, block: str) -> list[Any]:
        if self._parse is None:
            return []
        found = self._parse(_CALL_ID.sub("", block), self._tools)
        found = found if isinstance(found, list) else [found]
        if self._parse.__module__ == _GUESSING and not all(c["name"] in self.names for c in found):
            raise ValueError("no function of this name")
        return found

    @staticmethod
    def _call(found: Any) -> Call:
        """A call from an object with a name and arguments.

        Raises:
            Exception: it is no such object.
        """
        name, given = found["name"], found.get("id")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError("no name of a function")
        # Llama's models write "parameters".
        arguments = found.get("arguments", found.get("parameters"))
        if isinstance(arguments, str):
            arguments = json.loads(arguments) if arguments.strip() else {}
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise ValueError("arguments are not an object")
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        identity = given if isinstance(given, str) and given else new_id()
        return Call(identity, name, text)


def _with_plain_schemas(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool for mlx-lm's parsers, which fail for parameters whose schema is no object."""
    function = tool["function"]
    parameters = function.get("parameters") or {}
    given = parameters.get("properties")
    given = given.items() if isinstance(given, dict) else ()
    known = {name: schema for name, schema in given if isinstance(schema, dict)}
    return tool | {"function": function | {"parameters": parameters | {"properties": known}}}


def _in_json(block: str) -> list[Any]:
    """JSON objects, or lists of them, that follow one another.

    Raises:
        ValueError: there is anything else.
    """
    return list(_json_objects(block))


def _json_objects(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    text = text.strip(_BETWEEN)
    while text:
        value, end = decoder.raw_decode(text)
        yield from value if isinstance(value, list) else [value]
        text = text[end:].lstrip(_BETWEEN)
