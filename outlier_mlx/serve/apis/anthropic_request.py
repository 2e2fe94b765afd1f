"""The body of a request in Anthropic's API, as a checked `Request`."""

from itertools import dropwhile
from operator import not_
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.anthropic_fields import (
    BLOCKS,
    BODY,
    MESSAGE,
    OUTPUT,
    PLACES,
    THINKING,
    TOOL,
    TOOL_CHOICE,
)
from outlier_mlx.serve.fields import Field, check_fields, wrong
from outlier_mlx.serve.limits import Limits
from outlier_mlx.serve.request import Request
from outlier_mlx.serve.structured import Form, ToolChoice, schema_of_format

#: Variable of chat templates that turns thinking on or off.
SWITCH = "enable_thinking"


def request_of(body: dict[str, Any], limits: Limits, *, counts: bool) -> Request:
    """The request in a body.

    Args:
        body: the body.
        limits: limits of the server.
        counts: whether only the tokens of the prompt are counted; then `max_tokens` may be missing.

    Raises:
        Refused: 400, with the place of what is wrong.
    """
    reader = _Reader()
    required = ("messages",) if counts else ("messages", "max_tokens")
    given = reader.fields(body, BODY, "", required)
    output = reader.fields(given.get("output_config", {}), OUTPUT, "output_config")
    conversation = _Conversation(reader)
    conversation.system(given.get("system", ""))
    conversation.add_all(given["messages"])
    tools = limits.reader.tools(
        [_tool(reader, *pair) for pair in enumerate(given.get("tools", []))]
    )
    unused: list[str] = []
    messages = limits.reader.messages(conversation.messages, unused, conversation.places)
    # The template decides which earlier thinking the model sees: with some, none.
    reader.unused += [name for name in unused if name != "messages.reasoning_content"]
    asked = given.get("tool_choice", {"type": "auto"})
    asked = reader.fields(asked, TOOL_CHOICE, "tool_choice", ("type",))
    choice = _choice(asked, tools)
    several = not asked.get("disable_parallel_tool_use", False)
    schema = schema_of_format(output.get("format", {"type": "text"}), "output_config.format")
    form = Form(schema, "output_config.format", choice, several)
    length = given.get("max_tokens", 1)
    return Request(
        messages=messages,
        tools=choice.tools,
        parallel_calls=several,
        constraint=None if counts else form.constraint(limits.grammars),
        template=_thinking(reader, given.get("thinking"), limits),
        stop=limits.stop_words(given.get("stop_sequences", []), "stop_sequences"),
        max_tokens=min(length, limits.max_tokens),
        asked_tokens=length,
        sampling=limits.sampling_of(given),
        stream=given.get("stream", False),
        unused=tuple(dict.fromkeys(reader.unused)),
    )


def _choice(asked: dict[str, Any], tools: list[dict[str, Any]]) -> ToolChoice:
    """Which tools may be used."""
    if asked["type"] == "none":
        return ToolChoice()
    if asked["type"] == "tool" and "name" not in asked:
        raise _wrong("tool_choice.name", "is missing")
    return ToolChoice(
        tools, asked["type"] in ("any", "tool"), asked["name"] if asked["type"] == "tool" else None
    )


class _Reader:
    """Checks objects by tables.

    Attributes:
        unused: names of fields that have no effect.
    """

    def __init__(self) -> None:
        self.unused: list[str] = []

    def fields(
        self, given: Any, table: dict[str, Field], where: str, required: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """The honoured fields of an object.

        Raises:
            Refused: 400; also if a required field is missing.
        """
        if not isinstance(given, dict):
            raise _wrong(where, "must be an object")
        honoured = check_fields(given, table, self.unused, where)
        for name in required:
            if name not in honoured:
                raise _wrong(f"{where}.{name}" if where else name, "is missing")
        return honoured

    def blocks(self, content: str | list[Any], kind: str, where: str) -> list[dict[str, Any]]:
        """Content blocks, of the types that there can be in this kind of place.

        Raises:
            Refused: 400; also for images, documents and other types, which are named.
        """
        if isinstance(content, str):
            return [{"type": "text", "text": content, "where": where}]
        blocks = []
        for number, block in enumerate(content):
            place = f"{where}[{number}]"
            type_ = block.get("type") if isinstance(block, dict) else None
            if type_ not in PLACES[kind]:
                text = f"must have one of the types {', '.join(PLACES[kind])}"
                raise _wrong(place, f"{text}; {str(type_)[:40]!r} is not supported")
            table = BLOCKS[type_]
            needed = [name for name in table if name not in ("content", "is_error")]
            needed = [name for name in needed if table[name].use == "honoured"]
            read = self.fields(block, table, place, tuple(needed))
            blocks.append(read | {"type": type_, "where": place})
        return blocks

    def text(self, content: str | list[Any], kind: str, where: str) -> str:
        """The text of content that can have no other blocks."""
        return "\n".join(block["text"] for block in self.blocks(content, kind, where))


class _Conversation:
    """Messages of Anthropic's API, as messages of OpenAI's, which chat templates know.

    Blocks of text that follow one another are divided by a line break, as are messages of the same
    role, which Anthropic's API combines.

    Attributes:
        places: where each message came from.
    """

    def __init__(self, reader: _Reader) -> None:
        self.places: list[str] = []
        self._reader = reader
        # The role of each message, and the parts of its fields, which are joined at the end.
        self._turns: list[tuple[str, dict[str, list[Any]]]] = []
        self._names: dict[str, str] = {}  # of the functions, by the ids of their calls

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages."""
        return [
            {"role": role} | {name: _joined(parts) for name, parts in fields.items()}
            for role, fields in self._turns
        ]

    def system(self, content: str | list[Any]) -> None:
        """Add the system prompt; none if it is empty."""
        if text := self._reader.text(content, "system", "system"):
            self._add("system", "system", content=text)

    def add_all(self, given: list[Any]) -> None:
        """Add all messages.

        Raises:
            Refused: 400; also if the last one is the assistant's.
        """
        role = "missing"
        for number, message in enumerate(given):
            where = f"messages[{number}]"
            read = self._reader.fields(message, MESSAGE, where, ("role", "content"))
            role, content = read["role"], f"{where}.content"
            if role == "system":
                text = self._reader.text(read["content"], role, content)
                self._add(role, where, content=text)
                continue
            for block in self._reader.blocks(read["content"], role, content):
                self._block(role, block)
        if not given:
            raise _wrong("messages", "must not be empty")
        if role == "assistant":
            text = "must not end with a message of the assistant: prefill is not supported"
            raise _wrong("messages", text)

    def _block(self, role: str, block: dict[str, Any]) -> None:
        where = block["where"]
        match block["type"]:
            case "text":
                self._add(role, where, content=block["text"])
            case "thinking":
                self._add(role, where, reasoning_content=block["thinking"])
            case "redacted_thinking":
                self._add(role, where)
                self._reader.unused.append("messages.content.redacted_thinking")
            case "tool_use":
                self._names[block["id"]] = block["name"]
                function = {"name": block["name"], "arguments": block["input"]}
                call = {"id": block["id"], "type": "function", "function": function}
                self._add(role, where, tool_calls=call)
            case "tool_result":
                self._result(block, where)

    def _result(self, block: dict[str, Any], where: str) -> None:
        identity = block["tool_use_id"]
        if identity not in self._names:
            text = f"is {identity[:40]!r}, which no tool_use in an earlier message has"
            raise _wrong(f"{where}.tool_use_id", text)
        text = self._reader.text(block.get("content", ""), "tool_result", f"{where}.content")
        if block.get("is_error", False):
            text = f"Error: {text}"
        name = self._names[identity]
        self._add("tool", where, content=text, tool_call_id=identity, name=name)

    def _add(self, role: str, where: str, **fields: Any) -> None:
        if role in ("tool", "system") or not self._turns or self._turns[-1][0] != role:
            self._turns.append((role, {}))
            self.places.append(where.partition(".")[0])
        for name, value in fields.items():
            self._turns[-1][1].setdefault(name, []).append(value)


def _joined(parts: list[Any]) -> Any:
    """The text of parts that are texts, from the first that is not empty; or the list of calls."""
    return "\n".join(dropwhile(not_, parts)) if isinstance(parts[0], str) else parts


def _tool(reader: _Reader, number: int, tool: Any) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    where = f"tools[{number}]"
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind not in (None, "custom"):
        text = (
            f"is {str(kind)[:40]!r}, a tool of Anthropic's servers; only custom ones are supported"
        )
        raise _wrong(where, text)
    read = reader.fields(tool, TOOL, where, ("name", "input_schema"))
    function = {"name": read["name"], "parameters": read["input_schema"]}
    rest = {name: read[name] for name in ("description", "strict") if name in read}
    return {"type": "function", "function": function | rest}


def _thinking(reader: _Reader, given: Any, limits: Limits) -> dict[str, Any]:
    """The variables of the chat template that turn thinking on or off.

    How many tokens the model thinks cannot be limited, so a budget has no effect.
    """
    if given is None:
        return {}
    on = reader.fields(given, THINKING, "thinking", ("type",))["type"] != "disabled"
    if limits.reader.probes.mentions(SWITCH):
        return {SWITCH: on}
    reader.unused.append("thinking")
    return {}


def _wrong(where: str, text: str) -> Refused:
    """A request that is refused for what is wrong at a place in its body."""
    return wrong(where, text, "invalid_value")
