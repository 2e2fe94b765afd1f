"""Messages and tools of a chat request, as the chat template gets them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.fields import MESSAGE_FIELDS, check_fields, outer_field
from outlier_mlx.serve.probes import Part, TemplateProbes
from outlier_mlx.storage.texts import decode_json

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}

# Two names of the same, of which the server sends both; that which most templates have comes first.
REASONING = ("reasoning_content", "reasoning")
MAX_TOOLS = 1024
MAX_NAME = 256


@dataclass(frozen=True)
class MessageReader:
    """Reads messages and tools, and refuses what the model's chat template leaves out.

    Attributes:
        probes: what the template leaves out.
        reads_calls: whether the model's format of tool calls is known.
    """

    probes: TemplateProbes
    reads_calls: bool

    def messages(
        self, given: list[Any], places: Sequence[str] | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Messages for the chat template, with texts as contents.

        Args:
            given: messages in the format of `/v1/chat/completions`.
            places: where the request has each; None: in the list `messages`.

        Returns:
            The messages, and the names of fields that have no effect.

        Raises:
            Refused: 400, with the place of what is wrong.
        """
        if not given:
            raise Refused(400, "messages must be a list that is not empty", None, "messages")
        if places is None:
            places = [f"messages[{number}]" for number in range(len(given))]
        messages: list[dict[str, Any]] = []
        unused = []
        for message, where in zip(given, places, strict=True):
            read, names = self._message(message, where, first=not messages)
            messages.append(read)
            unused += names
        return messages, unused

    def tools(self, given: list[Any]) -> list[dict[str, Any]]:
        """Tools for the chat template.

        Raises:
            Refused: 400, with the place of what is wrong.
        """
        if len(given) > MAX_TOOLS:
            raise _refused("tools", f"are {len(given)}; at most {MAX_TOOLS} are supported")
        for number, tool in enumerate(given):
            where = f"tools[{number}]"
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or tool.get("type", "function") != "function":
                raise _refused(where, "must be an object of the type 'function'")
            name = function.get("name")
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
                text = f"must be a string of up to {MAX_NAME} characters"
                raise _refused(f"{where}.function.name", text)
            if not isinstance(function.get("parameters") or {}, dict):
                raise _refused(f"{where}.function.parameters", "must be an object")
        if given:
            self._need("tools", "tools")
            if not self.reads_calls:
                text = "are not supported: the format of this model's tool calls is not known"
                raise _refused("tools", text)
        return given

    def _message(
        self, message: Any, where: str, *, first: bool
    ) -> tuple[dict[str, Any], list[str]]:
        if not isinstance(message, dict):
            raise _refused(where, "must be an object with a role")
        read, unused = check_fields(message, MESSAGE_FIELDS, where)
        role = ROLES.get(read.get("role", "missing"))
        if role is None:
            text = f"must be one of {', '.join(ROLES)}; it is {read.get('role', 'missing')[:40]!r}"
            raise _refused(f"{where}.role", text)
        read["role"] = role
        if role == "system":
            self._need("system messages", where)
            if not first:
                self._need("system messages after the first message", where)
        if role == "tool":
            self._need("tool results", where)
        if role != "assistant" and "content" not in read:
            raise _refused(f"{where}.content", "is missing")
        read["content"], names = _text(read.get("content", ""), f"{where}.content")
        unused += names
        if calls := read.pop("tool_calls", []):
            self._need("tool calls", where)
            if role != "assistant":
                raise _refused(f"{where}.tool_calls", f"is not for the role {role}")
            places = (f"{where}.tool_calls[{number}]" for number in range(len(calls)))
            read["tool_calls"] = [_call(*pair) for pair in zip(calls, places, strict=True)]
        unused += self._name_reasoning(read)
        if "name" in read and role != "tool" and self.probes.leaves_out("names of users"):
            unused.append("messages.name")
        return read, unused

    def _name_reasoning(self, message: dict[str, Any]) -> list[str]:
        """Give reasoning the name that the template has for it, in place.

        Returns:
            The names of fields that have no effect.
        """
        given = [name for name in REASONING if name in message]
        used = [name for name in REASONING if self.probes.mentions(name)]
        unused = given
        if given and used:
            message[used[0]] = message[given[0]]
            for name in given:
                if name not in used:
                    del message[name]
            unused = []
        if "thinking" in message and not self.probes.mentions("thinking"):
            unused = [*unused, "thinking"]
        return [f"messages.{name}" for name in unused]

    def _need(self, part: Part, where: str) -> None:
        if self.probes.leaves_out(part):
            text = f"is not supported: this model's chat template leaves out {part}"
            raise _refused(where, text)


def _refused(where: str, text: str) -> Refused:
    return Refused(400, f"{where} {text}", "unsupported_value", outer_field(where))


def _text(content: str | list[Any], where: str) -> tuple[str, list[str]]:
    """The text of a content, and the names of fields that have no effect."""
    if isinstance(content, str):
        return content, []
    texts, unused = [], []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind == "text" else None
        if kind != "text":
            # mlx-lm would download an image from any URL.
            named = f"of the type {str(kind)[:40]!r}" if kind is not None else "without a type"
            told = f"{where}[{number}] is a part {named}; only text is supported"
            raise Refused(400, told, "unsupported_content", outer_field(where))
        if not isinstance(text, str):
            raise _refused(f"{where}[{number}].text", "must be a string")
        texts.append(text)
        unused += [f"messages.content.{name}" for name in part if name not in ("type", "text")]
    return "".join(texts), unused


def _call(call: Any, where: str) -> dict[str, Any]:
    """An earlier tool call, with its arguments as an object, which templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise _refused(where, "must be an object of the type 'function'")
    if not isinstance(function.get("name"), str):
        raise _refused(f"{where}.function.name", "must be a string")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = decode_json(arguments.strip() or "{}")
        except ValueError:
            arguments = "not JSON"
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise _refused(f"{where}.function.arguments", "must be a JSON object")
    return call | {"function": function | {"arguments": arguments}}
