"""What a model's chat template leaves out, found by rendering it."""

import re
from functools import cache, lru_cache
from typing import Any, Literal

from outlier_mlx.engine.templates import TemplateError, render
from outlier_mlx.upstream import TokenizerWrapper

Part = Literal[
    "tools",
    "tool calls",
    "tool results",
    "system messages",
    "system messages after the first message",
    "names of users",
]

# A word that no template writes by itself.
_SIGN = "zqxprobe"
_USER = {"role": "user", "content": "a"}
_SYSTEM = {"role": "system", "content": _SIGN}


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}}
    function = {"name": name, "description": "b", "parameters": parameters}
    return {"type": "function", "function": function}


def _called(name: str, result: str) -> list[dict[str, Any]]:
    identity = "abcdefghi"  # Mistral's templates want nine letters
    call = {"id": identity, "type": "function", "function": {"name": name, "arguments": {}}}
    return [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result, "tool_call_id": identity, "name": name},
    ]


# Conversations with the sign in one part, and their tools.
_PROBES: dict[Part, list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]] = {
    "tools": [([_USER], [_tool(_SIGN)])],
    "tool calls": [(_called(_SIGN, "c"), [_tool("d")])],
    "tool results": [(_called("d", _SIGN), [_tool("d")])],
    "system messages": [([_SYSTEM, _USER], [])],
    "system messages after the first message": [
        ([_SYSTEM | {"content": "e"}, _SYSTEM, _USER], []),
        ([_USER, {"role": "assistant", "content": "f"}, _SYSTEM, _USER], []),
    ],
    "names of users": [([_USER | {"name": _SIGN}], [])],
}


class TemplateProbes:
    """What the chat template of one model leaves out.

    Args:
        tokenizer: its template is rendered when a part is asked about for the first time.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._lost = cache(self._render)
        self._found = lru_cache(256)(self._find)

    def leaves_out(self, part: Part) -> bool:
        """Whether the template writes nothing of a part of a conversation.

        If it fails, it leaves out nothing: it fails for a request as well, and says why. Without a
        template, mlx-lm writes only system messages, and those of users and assistants.
        """
        if not self._tokenizer.has_chat_template:
            return not part.startswith("system")
        return self._lost(part)

    def mentions(self, name: str) -> bool:
        """Whether the template may use a variable or a field of this name."""
        return self._found(name)

    def _find(self, name: str) -> bool:
        template = self._tokenizer.chat_template
        if not isinstance(template, str):
            return True  # it is not known
        if name not in template:  # which takes no time, however long the name is
            return False
        return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template) is not None

    def _render(self, part: Part) -> bool:
        for messages, tools in _PROBES[part]:
            try:
                text = render(
                    self._tokenizer, messages, tools=tools or None, add_generation_prompt=True
                )
            except TemplateError:
                continue
            if _SIGN not in text:
                return True
        return False
