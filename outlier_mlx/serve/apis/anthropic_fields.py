"""The tables of the fields of Anthropic's API: what becomes of each, and its values."""

from outlier_mlx.serve.fields import (
    ACCEPTED,
    FLAG,
    LENGTH,
    LIST,
    OBJECT,
    STRING,
    Either,
    Field,
    Number,
    OneOf,
    honoured,
    refused,
)

_CONTENT = honoured(Either((STRING, LIST)))

#: Of a body.
BODY: dict[str, Field] = {
    "messages": honoured(LIST),
    "system": _CONTENT,
    "max_tokens": honoured(LENGTH),
    "stop_sequences": honoured(LIST),
    "stream": honoured(FLAG),
    "temperature": honoured(Number(0)),
    "top_p": honoured(Number(0, 1)),
    "top_k": honoured(Number(0, whole=True)),
    "tools": honoured(LIST),
    "tool_choice": honoured(OBJECT),
    "thinking": honoured(OBJECT),
    "output_config": honoured(OBJECT),
    "container": refused(),
    "mcp_servers": refused([]),
    "thread": refused(),
    "cache_control": ACCEPTED,
    "diagnostics": ACCEPTED,
    "inference_geo": ACCEPTED,
    "metadata": ACCEPTED,
    "model": ACCEPTED,
    "service_tier": ACCEPTED,
    "speed": ACCEPTED,
    "user_profile_id": ACCEPTED,
}
MESSAGE: dict[str, Field] = {"role": honoured(OneOf(("user", "assistant", "system")))} | {
    "content": _CONTENT
}
#: Of the content blocks of each type.
BLOCKS: dict[str, dict[str, Field]] = {
    "text": {"text": honoured(STRING), "citations": ACCEPTED},
    "thinking": {"thinking": honoured(STRING), "signature": ACCEPTED},
    "redacted_thinking": {"data": ACCEPTED},
    "tool_use": {
        "id": honoured(STRING),
        "name": honoured(STRING),
        "input": honoured(OBJECT),
        "caller": ACCEPTED,
        "toolset_name": refused(),
    },
    "tool_result": {
        "tool_use_id": honoured(STRING),
        "content": _CONTENT,
        "is_error": honoured(FLAG),
        "toolset_name": refused(),
    },
}
for _table in BLOCKS.values():
    _table |= {"type": ACCEPTED, "cache_control": ACCEPTED}
#: The types of blocks that a message of each role, and the result of a tool, can have.
PLACES = {
    "system": ("text",),
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "tool_result": ("text",),
}
TOOL: dict[str, Field] = {
    "name": honoured(STRING),
    "description": honoured(STRING),
    "input_schema": honoured(OBJECT),
    "strict": honoured(FLAG),
    "allowed_callers": refused(["direct"]),
    "defer_loading": refused(False),
    "cache_control": ACCEPTED,
    "eager_input_streaming": ACCEPTED,
    "type": ACCEPTED,
}
TOOL_CHOICE: dict[str, Field] = {
    "type": honoured(OneOf(("auto", "none", "any", "tool"))),
    "disable_parallel_tool_use": honoured(FLAG),
    "name": honoured(STRING),
}
THINKING: dict[str, Field] = {
    "type": honoured(OneOf(("enabled", "adaptive", "disabled"))),
    "display": honoured(OneOf(("summarized", "omitted"))),
}
OUTPUT: dict[str, Field] = {"format": honoured(OBJECT)}
