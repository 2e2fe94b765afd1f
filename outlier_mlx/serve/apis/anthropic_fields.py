"""The tables of the fields of Anthropic's API: what becomes of each, and its values."""

from outlier_mlx.serve.fields import (
    FLAG,
    LENGTH,
    LIST,
    OBJECT,
    STRING,
    Either,
    Field,
    Number,
    OneOf,
    Values,
)


def _honoured(values: Values) -> Field:
    return Field("honoured", values)


_ACCEPTED = Field("accepted")
_REFUSED = Field("refused")
_CONTENT = _honoured(Either((STRING, LIST)))

#: Of a body.
BODY: dict[str, Field] = {
    "messages": _honoured(LIST),
    "system": _CONTENT,
    "max_tokens": _honoured(LENGTH),
    "stop_sequences": _honoured(LIST),
    "stream": _honoured(FLAG),
    "temperature": _honoured(Number(0)),
    "top_p": _honoured(Number(0, 1)),
    "top_k": _honoured(Number(0, whole=True)),
    "tools": _honoured(LIST),
    "tool_choice": _honoured(OBJECT),
    "thinking": _honoured(OBJECT),
    "output_config": _honoured(OBJECT),
    "container": _REFUSED,
    "mcp_servers": Field("refused", harmless=([],)),
    "cache_control": _ACCEPTED,
    "diagnostics": _ACCEPTED,
    "inference_geo": _ACCEPTED,
    "metadata": _ACCEPTED,
    "model": _ACCEPTED,
    "service_tier": _ACCEPTED,
    "speed": _ACCEPTED,
    "user_profile_id": _ACCEPTED,
}
MESSAGE: dict[str, Field] = {"role": _honoured(OneOf(("user", "assistant", "system")))} | {
    "content": _CONTENT
}
#: Of the content blocks of each type.
BLOCKS: dict[str, dict[str, Field]] = {
    "text": {"text": _honoured(STRING), "citations": _ACCEPTED},
    "thinking": {"thinking": _honoured(STRING), "signature": _ACCEPTED},
    "redacted_thinking": {"data": _ACCEPTED},
    "tool_use": {
        "id": _honoured(STRING),
        "name": _honoured(STRING),
        "input": _honoured(OBJECT),
        "caller": _ACCEPTED,
        "toolset_name": _REFUSED,
    },
    "tool_result": {
        "tool_use_id": _honoured(STRING),
        "content": _CONTENT,
        "is_error": _honoured(FLAG),
        "toolset_name": _REFUSED,
    },
}
for _table in BLOCKS.values():
    _table |= {"type": _ACCEPTED, "cache_control": _ACCEPTED}
#: The types of blocks that a message of each role, and the result of a tool, can have.
PLACES = {
    "system": ("text",),
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "tool_result": ("text",),
}
TOOL: dict[str, Field] = {
    "name": _honoured(STRING),
    "description": _honoured(STRING),
    "input_schema": _honoured(OBJECT),
    "strict": _honoured(FLAG),
    "allowed_callers": Field("refused", harmless=(["direct"],)),
    "defer_loading": Field("refused", harmless=(False,)),
    "cache_control": _ACCEPTED,
    "eager_input_streaming": _ACCEPTED,
    "type": _ACCEPTED,
}
TOOL_CHOICE: dict[str, Field] = {
    "type": _honoured(OneOf(("auto", "none"))),
    "disable_parallel_tool_use": _honoured(FLAG),
    "name": _honoured(STRING),
}
THINKING: dict[str, Field] = {
    "type": _honoured(OneOf(("enabled", "adaptive", "disabled"))),
    "display": _honoured(OneOf(("summarized", "omitted"))),
}
OUTPUT: dict[str, Field] = {"format": _REFUSED}
