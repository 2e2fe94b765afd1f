"""Requests to OpenAI's Responses API, whose answers are checked by the types of its client."""

from __future__ import annotations

import json
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from outlier_mlx.serve.apis.responses import RESPONSES
from tests.serving import Running

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'}
RESULT = {"type": "function_call_output", "call_id": "1", "output": "5"}
#: What the scripted models write: a text; a text and then a call.
SURE = ("Sure", " thing")
CALLS = ("Let me see.", "<tool_call>", '{"name": "f", "arguments": {"x": 1}}', "</tool_call>")
RANDOM = ("id", "call_id", "created_at", "completed_at")
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def exact(value: Any) -> None:
    """Check that a model of the openai package has no field that its type does not have."""
    if isinstance(value, BaseModel):
        assert not value.model_extra, (type(value), value.model_extra)
        for name in type(value).model_fields:
            exact(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            exact(item)


def post(server: Running, **body: Any) -> dict[str, Any]:
    status, _, answer = server.post({"input": "hi"} | body, RESPONSES)
    assert status == 200, answer
    exact(TypeAdapter(Response).validate_json(json.dumps(answer), strict=True))
    response: dict[str, Any] = answer
    return response


def stream(server: Running, **body: Any) -> list[dict[str, Any]]:
    """The events, each checked by its type."""
    raw = json.dumps({"input": "hi", "stream": True} | body).encode()
    with server.connect() as connection:
        head = f"POST {RESPONSES} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        answer = connection.makefile(encoding="utf-8", newline="").read()
    head, _, sent = answer.partition("\r\n\r\n")
    assert "text/event-stream" in head
    events = []
    blocks = [block for block in sent.split("\n\n") if block and not block.startswith(":")]
    for number, block in enumerate(blocks):
        named, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert named == f"event: {event['type']}"
        assert event["sequence_number"] == number
        exact(EVENTS.validate_json(json.dumps(event), strict=True))
        events.append(event)
    return events


def refused(server: Running, status: int = 400, **body: Any) -> dict[str, Any]:
    found, _, answer = server.post({"input": "hi"} | body, RESPONSES)
    assert found == status, answer
    error: dict[str, Any] = answer["error"]
    return error


def tokens(server: Running, **body: Any) -> int:
    count: int = post(server, **body)["usage"]["input_tokens"]
    return count


def without(value: Any) -> Any:
    """An object without ids and times."""
    if isinstance(value, dict):
        left = {name: without(item) for name, item in value.items()}
        return {k: v for k, v in left.items() if k not in RANDOM}
    return [without(item) for item in value] if isinstance(value, list) else value
