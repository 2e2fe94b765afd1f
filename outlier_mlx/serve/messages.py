"""Messages and tools of a chat request, as the chat template gets them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.fields import MESSAGE_FIELDS, check_fields, typed, wrong
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
        self, given: list[Any], unused: list[str], places: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Messages for the chat template, with texts as contents.

        Args:
            given: messages in the format of `/v1/chat/completions`.
            unused: gets the names of fields that have no effect.
            places: where the request has each; None: in the list `messages`.

        Raises:
            Refused: 400, with the place of what is wrong.
        """
        if not given:
            raise Refused(400, "messages must be a list that is not empty", None, "messages")
        if places is None:
            places = [f"messages[{number}]" for number in range(len(given))]
        messages: list[dict[str, Any]] = []
        for message, where in zip(given, places, strict=True):
            messages.append(self._message(message, where, unused, first=not messages))
        return messages

    def tools(self, given: list[Any]) -> list[dict[str, Any]]:
        """Tools for the chat template.

        Raises:
            Refused: 400, with the place of what is wrong.
        """
        if len(given) > MAX_TOOLS:
            raise wrong("tools", f"are {len(given)}; at most {MAX_TOOLS} are supported")
        for number, tool in enumerate(given):
            where = f"tools[{number}]"
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or tool.get("type", "function") != "function":
                raise wrong(where, "must be an object of the type 'function'")
            name = function.get("name")
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
                text = f"must be a string of up to {MAX_NAME} characters"
                raise wrong(f"{where}.function.name", text)
            if not isinstance(function.get("parameters") or {}, dict):
                raise wrong(f"{where}.function.parameters", "must be an object")
        if given:
            self._need("tools", "tools")
            if not self.reads_calls:
                text = "are not supported: the format of this model's tool calls is not known"
                raise wrong("tools", text)
        return given

    def _message(
        self, message: Any, where: str, unused: list[str], *, first: bool
    ) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise wrong(where, "must be an object with a role")
        read = check_fields(message, MESSAGE_FIELDS, unused, where)
        role = ROLES.get(read.get("role", "missing"))
        if role is None:
            text = f"must be one of {', '.join(ROLES)}; it is {read.get('role', 'missing')[:40]!r}"
            raise wrong(f"{where}.role", text)
        read["role"] = role
        if role == "system":
            self._need("system messages", where)
            if not first:
                self._need("system messages after the first message", where)
        if role == "tool":
            self._need("tool results", where)
        if role != "assistant" and "content" not in read:
            raise wrong(f"{where}.content", "is missing")
        read["content"] = _text(read.get("content", ""), f"{where}.content", unused)
        if calls := read.pop("tool_calls", []):
            self._need("tool calls", where)
            if role != "assistant":
                raise wrong(f"{where}.tool_calls", f"is not for the role {role}")
            places = (f"{where}.tool_calls[{number}]" for number in range(len(calls)))
            read["tool_calls"] = [_call(*pair) for pair in zip(calls, places, strict=True)]
        unused += self._name_reasoning(read)
        if "name" in read and role != "tool" and self.probes.leaves_out("names of users"):
            unused.append("messages.name")
        return read

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
            raise wrong(where, text)


def _text(content: str | list[Any], where: str, unused: list[str]) -> str:
    """The text of a content; `unused` gets the names of fields that have no effect."""
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind == "text" else None
        if kind != "text":
            # mlx-lm would download an image from any URL.
            told = f"is a part {typed(kind)}; only text is supported"
            raise wrong(f"{where}[{number}]", told, "unsupported_content")
        if not isinstance(text, str):
            raise wrong(f"{where}[{number}].text", "must be a string")
        texts.append(text)
        unused += [f"messages.content.{name}" for name in part if name not in ("type", "text")]
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """An earlier tool call, with its arguments as an object, which templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise wrong(where, "must be an object of the type 'function'")
    if not isinstance(function.get("name"), str):
        raise wrong(f"{where}.function.name", "must be a string")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = decode_json(arguments.strip() or "{}")
        except ValueError:
            arguments = "not JSON"
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise wrong(f"{where}.function.arguments", "must be a JSON object")
    return call | {"function": function | {"arguments": arguments}}
