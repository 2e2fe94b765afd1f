"""Items of a conversation in the Responses API, as messages of `/v1/chat/completions`."""

from itertools import takewhile
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.fields import (
    ACCEPTED,
    LIST,
    STRING,
    Either,
    Field,
    check_fields,
    honoured,
    refused,
    typed,
    wrong,
)
from outlier_mlx.storage.texts import decode_json

_CONTENT = honoured(Either((STRING, LIST)))
_SAME = {"type": honoured(STRING), "id": ACCEPTED, "status": ACCEPTED}
#: Fields of the items that are supported, by the type of item.
ITEM_FIELDS: dict[str, dict[str, Field]] = {
    "message": {"role": honoured(STRING), "content": _CONTENT} | _SAME | {"phase": ACCEPTED},
    "reasoning": {"content": honoured(LIST), "summary": honoured(LIST)} | _SAME,
    "function_call": {
        "call_id": honoured(STRING),
        "name": honoured(STRING),
        "arguments": honoured(STRING),
        **_SAME,
        "caller": ACCEPTED,
        "namespace": refused(),
    },
    "function_call_output": {
        "call_id": honoured(STRING),
        "output": _CONTENT,
        "name": honoured(STRING),
        **_SAME,
        "caller": ACCEPTED,
        "namespace": refused(),
    },
}
ROLES = ("user", "assistant", "system", "developer")


def items_of(given: Any) -> list[Any]:
    """The items of an `input`, which may be a text.

    Raises:
        Refused: 400, it is missing or empty.
    """
    items = [{"type": "message", "role": "user", "content": given}] if given else []
    items = given if isinstance(given, list) else items
    if not items:
        raise Refused(400, "input must be a text or a list that is not empty", None, "input")
    return items


class Conversation:
    """A conversation that is read item after item.

    What a model wrote in one turn is one message, whatever number of items it is.

    Attributes:
        messages: the messages so far.
        places: where the request has each message, for error messages.
        unused: names of fields that have no effect.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        self.unused: list[str] = []

    def instruct(self, instructions: str) -> None:
        """Begin with instructions."""
        self._append({"role": "system", "content": instructions}, "instructions")

    def join_instructions(self) -> None:
        """Join the system messages at the beginning, for a template that knows only one."""
        first = list(takewhile(lambda m: m["role"] in ("system", "developer"), self.messages))
        if len(first) > 1:
            joined = "\n\n".join(message["content"] for message in first)
            self.messages[: len(first)] = [first[0] | {"content": joined}]
            del self.places[1 : len(first)]

    def add(self, item: Any, where: str) -> None:
        """Add an item.

        Args:
            item: the item.
            where: its place in the request.

        Raises:
            Refused: 400, with the place of what is wrong or not supported.
        """
        if not isinstance(item, dict):
            raise wrong(where, "must be an object with a type")
        kind = item.get("type", "message" if "role" in item else None)
        known = ITEM_FIELDS.get(kind) if isinstance(kind, str) else None
        if known is None:
            told = f"is an item {typed(kind)}; supported are {', '.join(ITEM_FIELDS)}"
            raise wrong(where, told, "unsupported_content")
        read = check_fields(item, known, self.unused, where)
        if kind == "message":
            self._add_message(read, where)
        elif kind == "reasoning":
            self._add_reasoning(read, where)
        elif kind == "function_call":
            self._add_call(read, where)
        else:
            result = {"role": "tool", "content": self._text(read, "output", "input_text", where)}
            names = {"tool_call_id": read.get("call_id"), "name": read.get("name")}
            result |= {name: value for name, value in names.items() if value is not None}
            self._append(result, where)

    def _add_message(self, item: dict[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise wrong(f"{where}.role", f"must be one of {', '.join(ROLES)}")
        if role != "assistant":
            content = self._text(item, "content", "input_text", where)
            self._append({"role": role, "content": content}, where)
            return
        content = self._text(item, "content", "output_text", where)
        last = self._last_turn(where)
        if last.get("content") or last.get("tool_calls"):
            last = self._append({"role": "assistant"}, where)
        last["content"] = content

    def _add_reasoning(self, item: dict[str, Any], where: str) -> None:
        name = "content" if item.get("content") else "summary"
        kind = "reasoning_text" if name == "content" else "summary_text"
        text = self._text(item, name, kind, where)
        last = self._last_turn(where)
        if len(last) > 1:
            last = self._append({"role": "assistant"}, where)
        last["reasoning"] = text

    def _add_call(self, item: dict[str, Any], where: str) -> None:
        if not item.get("name"):
            raise wrong(f"{where}.name", "is missing")
        try:
            arguments = decode_json(item.get("arguments", "").strip() or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise wrong(f"{where}.arguments", "must be the JSON of an object")
        function = {"name": item["name"], "arguments": arguments}
        call = {"id": item.get("call_id", ""), "type": "function", "function": function}
        self._last_turn(where).setdefault("tool_calls", []).append(call)

    def _last_turn(self, where: str) -> dict[str, Any]:
        """The assistant's message that is not finished, or a new one."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") == "assistant":
            return last
        return self._append({"role": "assistant"}, where)

    def _append(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        self.messages.append(message)
        self.places.append(where)
        return message

    def _text(self, item: dict[str, Any], name: str, kind: str, where: str) -> str:
        """The text of a field that is a text, or a list of parts of one type, which are joined."""
        content = item.get(name)
        if content is None:
            raise wrong(f"{where}.{name}", "is missing")
        if isinstance(content, str):
            return content
        texts = []
        for number, part in enumerate(content):
            place = f"{where}.{name}[{number}]"
            found = part.get("type") if isinstance(part, dict) else None
            # A client may send back what was shown, such as a greeting, as if it were input.
            if found != kind and (found, kind) != ("input_text", "output_text"):
                told = f"is a part {typed(found)}; only {kind} is supported"
                raise wrong(place, told, "unsupported_content")
            if not isinstance(part.get("text"), str):
                raise wrong(f"{place}.text", "must be a string")
            texts.append(part["text"])
            known = ("type", "text", "annotations", "logprobs", "prompt_cache_breakpoint")
            self.unused += [f"input.{name}.{extra}" for extra in part if extra not in known]
        return "".join(texts)
