"""Anthropic's API through the real `anthropic` client, whose types check all that is sent."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, MessageTokensCount, ModelInfo, RawMessageStreamEvent
from pydantic import TypeAdapter

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.anthropic import MessageAnswer, error_of
from outlier_mlx.serve.apis.anthropic_fields import BLOCKS, BODY
from outlier_mlx.serve.apis.api import Usage
from outlier_mlx.serve.calls import Call
from outlier_mlx.serve.pieces import Piece
from tests.pages import blocks, run_block
from tests.program import ROOT
from tests.scripted import PLAIN, Script
from tests.serving import NAME, Running, ServeScript, running

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
KEY = "a key of clients"
USER: Any = [{"role": "user", "content": "How warm is it?"}]
TOOL: Any = {
    "name": "warmth",
    "description": "How warm it is.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '\n{"name": "warmth", "arguments": {"city": "Lyon"}}\n'
WORDS = ("One", " two", " three")
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def calling(serve_script: ServeScript) -> Running:
    """Thinks, says something, and calls a function."""
    reply = "<think>", "It asks", "</think>", "\n\n", "Let me look."
    marks = "<tool_call>", "</tool_call>"
    return serve_script(*reply, "<tool_call>", CALL, "</tool_call>", marks=marks)


@pytest.fixture(scope="module")
def keyed(serve_script: ServeScript) -> Running:
    """Says three words, to clients that have a key."""
    return serve_script(*WORDS, api_key=KEY)


@pytest.fixture(scope="module")
def plain(serve_script: ServeScript) -> Running:
    """A template without tools and thinking."""
    return serve_script(*WORDS, template=PLAIN)


def url(server: Running) -> str:
    return server.server.url.removesuffix("/v1")


def client(server: Running, **options: Any) -> anthropic.Anthropic:
    defaults: dict[str, Any] = {"api_key": KEY, "max_retries": 0, "timeout": 60}
    return anthropic.Anthropic(base_url=url(server), **defaults | options)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "max_tokens": 100, "messages": USER} | fields


def contents(message: Message) -> list[dict[str, Any]]:
    """The content blocks as JSON."""
    return [block.model_dump(mode="json", exclude_none=True) for block in message.content]


def refusal(server: Running, given: dict[str, Any], path: str = PATH) -> str:
    """What is said about a request that is refused, whole or as a stream."""
    status, headers, answer = server.post(given, path, X_Api_Key=KEY)
    assert status == 400, answer
    assert (
        anthropic.types.ErrorResponse.model_validate(answer).error.type == "invalid_request_error"
    )
    assert headers["Request-Id"].startswith("req_")
    message: str = answer["error"]["message"]
    return message


def tokens(server: Running, **fields: Any) -> int:
    given = {name: value for name, value in body(**fields).items() if name != "max_tokens"}
    status, _, answer = server.post(given, COUNT, X_Api_Key=KEY)
    assert status == 200, answer
    return MessageTokensCount.model_validate(answer, strict=True).input_tokens


def events(server: Running, given: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The names and data of the events of a stream, as they are sent."""
    raw = json.dumps(given | {"stream": True}).encode()
    with server.connect() as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {KEY}\r\n"
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        answer = connection.makefile(encoding="utf-8", newline="\n").read()
    _, _, sent = answer.partition("\r\n\r\n")
    pairs = [event.split("\n") for event in sent.strip().split("\n\n")]
    read = [(n.removeprefix("event: "), json.loads(d.removeprefix("data: "))) for n, d in pairs]
    # One comes while the prompt is processed, or none.
    assert all(data == {"type": "ping"} for name, data in read if name == "ping")
    return [(name, data) for name, data in read if name != "ping"]


def test_a_message(keyed: Running):
    message = client(keyed).messages.create(
        **body(system="Be brief", extra_body={"temperature": 0.5})
    )
    assert Message.model_validate(message.to_dict(), strict=True)
    assert [block.to_dict() for block in message.content] == [
        {"type": "text", "text": "One two three"}
    ]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.role, message.model, message.type) == ("assistant", NAME, "message")
    assert message._request_id is not None and message._request_id.startswith("req_")
    # The reply's three tokens and its end.
    assert message.usage.output_tokens == 4


def test_a_bearer_is_a_key_as_well(keyed: Running):
    bearer = anthropic.Anthropic(base_url=url(keyed), auth_token=KEY, api_key=None, max_retries=0)
    assert bearer.messages.create(**body()).content


def test_a_stream(keyed: Running):
    with client(keyed).messages.stream(**body()) as stream:
        assert list(stream.text_stream) == ["One", " two", " three"]
        message = stream.get_final_message()
    whole = client(keyed).messages.create(**body())
    assert contents(message) == contents(whole)
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == whole.usage.output_tokens
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == tokens(
        keyed
    )


def test_the_async_client(keyed: Running):
    async def ask() -> tuple[str, str]:
        options: dict[str, Any] = {"api_key": KEY, "max_retries": 0}
        async with anthropic.AsyncAnthropic(base_url=url(keyed), **options) as asking:
            message = await asking.messages.create(**body())
            async with asking.messages.stream(**body()) as stream:
                text = "".join([part async for part in stream.text_stream])
            block = message.content[0]
            assert block.type == "text"
            return block.text, text

    assert asyncio.run(ask()) == ("One two three", "One two three")


def test_events(calling: Running):
    """Every event is one of the API's, in its order; thinking, text and calls have blocks."""
    sent = events(calling, body(tools=[TOOL]))
    for name, data in sent:
        assert name == data["type"]
        EVENT.validate_python(data, strict=True)
    kinds = [
        (name, data.get("content_block", data.get("delta", {})).get("type")) for name, data in sent
    ]
    assert kinds == [
        ("message_start", None),
        ("content_block_start", "thinking"),
        ("content_block_delta", "thinking_delta"),
        ("content_block_delta", "signature_delta"),
        ("content_block_stop", None),
        ("content_block_start", "text"),
        ("content_block_delta", "text_delta"),
        ("content_block_stop", None),
        ("content_block_start", "tool_use"),
        ("content_block_delta", "input_json_delta"),
        ("content_block_stop", None),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert [data["index"] for _, data in sent if "index" in data] == [0] * 4 + [1] * 3 + [2] * 3


def test_a_tool_and_its_result(calling: Running):
    asking = client(calling)
    first = asking.messages.create(**body(tools=[TOOL]))
    with asking.messages.stream(**body(tools=[TOOL])) as stream:
        streamed = stream.get_final_message()
    thought, text, use = first.content
    assert (thought.type, text.type, use.type) == ("thinking", "text", "tool_use")
    assert thought.thinking == "It asks"
    details = first.usage.output_tokens_details
    assert details is not None
    assert 0 < details.thinking_tokens < first.usage.output_tokens
    assert text.text == "\n\nLet me look."
    assert (use.name, use.input) == ("warmth", {"city": "Lyon"})
    assert first.stop_reason == streamed.stop_reason == "tool_use"
    assert [b.type for b in streamed.content] == [b.type for b in first.content]
    assert contents(streamed)[2]["input"] == {"city": "Lyon"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "21 degrees"}
    said = {"role": "assistant", "content": contents(first)}
    turns = [*USER, said, {"role": "user", "content": [result]}]
    second = asking.messages.create(**body(tools=[TOOL], messages=turns))
    assert second.usage.input_tokens == tokens(calling, tools=[TOOL], messages=turns)
    assert second.usage.input_tokens > first.usage.input_tokens + len("21 degrees")


def test_calls_one_at_a_time(calling: Running):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = client(calling).messages.create(**body(tools=[TOOL], tool_choice=choice))
    assert message.stop_reason == "tool_use"
    without = client(calling).messages.create(**body(tools=[TOOL], tool_choice={"type": "none"}))
    assert without.stop_reason == "end_turn"
    assert without.content[-1].text.endswith("</tool_call>")


def test_thinking_that_is_not_shown(calling: Running):
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    message = client(calling).messages.create(**body(thinking=thinking))
    assert message.content[0].thinking == ""
    sent = events(calling, body(thinking=thinking))
    assert "thinking_delta" not in [data.get("delta", {}).get("type") for _, data in sent]


@pytest.mark.parametrize(("word", "text"), [(" two", "One"), ("ne t", "O"), ("three", "One two ")])
def test_stop_sequences(keyed: Running, word: str, text: str):
    given = body(stop_sequences=["nowhere", word, "!"])
    message = client(keyed).messages.create(**given)
    assert message.content[0].text == text
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)
    with client(keyed).messages.stream(**given) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", word)
    assert contents(streamed) == contents(message)


def test_max_tokens(keyed: Running):
    message = client(keyed).messages.create(**body(max_tokens=2))
    assert message.content[0].text == "One two"
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 2


def test_what_was_cached(keyed: Running):
    system = "Something that no other test of this file says"
    first = client(keyed).messages.create(**body(system=system)).usage
    again = client(keyed).messages.create(**body(system=system)).usage
    assert first.cache_read_input_tokens is not None
    assert again.cache_read_input_tokens
    assert again.cache_read_input_tokens + again.input_tokens == tokens(keyed, system=system)


def test_count_tokens(keyed: Running):
    counted = client(keyed).messages.count_tokens(model=NAME, messages=USER, system="Be brief")
    with_tools = client(keyed).messages.count_tokens(model=NAME, messages=USER, tools=[TOOL])
    assert (
        counted.input_tokens == tokens(keyed) + len("<|role|>system:Be brief") - len("<|role|>") + 1
    )
    assert with_tools.input_tokens > tokens(keyed) + len(TOOL["description"])


def test_models(keyed: Running):
    models = list(client(keyed).models.list())
    assert [model.id for model in models] == [NAME]
    model = client(keyed).models.retrieve(NAME)
    assert ModelInfo.model_validate(model.to_dict(mode="python"), strict=True) == models[0]
    assert model.max_tokens == 4096
    with pytest.raises(anthropic.NotFoundError):
        client(keyed).models.retrieve("another")


def test_errors_have_their_classes(keyed: Running):
    asking = client(keyed)
    for call, kind, name in (
        (lambda: client(keyed, api_key="no").messages.create(**body()), "Authentication", ""),
        (lambda: asking.messages.create(**body(max_tokens=0)), "BadRequest", "invalid_request"),
        (lambda: asking.post("/v1/messages/batches", cast_to=object), "NotFound", "not_found"),
        (lambda: asking.messages.create(**body(system="x" * 4_200_000)), "ContentTooLarge", ""),
    ):
        with pytest.raises(getattr(anthropic, f"{kind}Error", anthropic.APIStatusError)) as raised:
            call()
        error: Any = raised.value
        assert type(error).__name__ == f"{kind}Error"
        assert error.body["type"] == "error"
        assert error.request_id.startswith("req_")
        assert name in error.body["error"]["type"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (408, "invalid_request_error"),
        (413, "request_too_large"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_kinds_of_errors(status: int, kind: str):
    error = {"type": kind, "message": "no"}
    assert error_of(Refused(status, "no")) == {"type": "error", "error": error}


def test_an_error_in_a_stream(keyed: Running, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> Any:
        raise Refused(503, "memory ran out")

    monkeypatch.setattr(MessageAnswer, "events", fail)
    with pytest.raises(anthropic.APIStatusError) as raised:
        list(client(keyed).messages.create(**body(stream=True)))
    assert raised.value.body == error_of(Refused(503, "memory ran out"))
    names = [name for name, _ in events(keyed, body())]
    assert names == ["message_start", "error"]


def test_a_full_server_is_overloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with running(Script(tmp_path / "model", "One")) as server:
        monkeypatch.setattr(server.server.service.connections, "check_room", _full)
        with pytest.raises(anthropic.APIStatusError) as raised:
            client(server).messages.create(**body())
        assert type(raised.value).__name__ == "OverloadedError"
        assert raised.value.response.headers["Retry-After"] == "1"


def _full(*_: Any) -> None:
    raise Refused(503, "the server answers as many requests as it can")


def test_the_page_has_the_table():
    page = (ROOT / "docs/anthropic.md").read_text(encoding="utf-8")
    below = page.partition("\n## Parameters\n\n|")[2].partition("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in below.splitlines()[2:]]
    honoured = {name: str(f.values) for name, f in BODY.items() if f.use == "honoured"}
    assert {name.strip("`"): values for name, values, *_ in cells} == honoured
    assert not [name for name in BODY | BLOCKS if f"`{name}`" not in page]


@pytest.mark.slow
def test_the_page_runs_as_it_stands(plain: Running, tmp_path: Path):
    place = url(plain).removeprefix("http://")
    serve, *requests = blocks("docs/anthropic.md")
    assert serve[1].startswith("outlier-mlx serve ")  # as `plain` does
    for language, text in requests:
        block = text.replace("127.0.0.1:8080", place)
        assert block != text
        printed = run_block(language, block, tmp_path, dict(os.environ)).out
        assert "One two three" in printed or "input_tokens" in printed


def test_blanks_alone_are_no_block():
    """Models write line breaks between thinking and a call."""
    call = Call("call_1", "warmth", "{}")
    pieces = [Piece(reasoning="So"), Piece("\n"), Piece("\n"), Piece(calls=[call, call])]
    answer = MessageAnswer(NAME, shows_thinking=True)
    sent = [event.data for piece in pieces for event in answer.events(0, piece)]
    kinds = [e["content_block"]["type"] for e in sent if "content_block" in e]  # type: ignore[index]
    assert kinds == ["thinking", "tool_use", "tool_use"]
    whole = Piece()
    for piece in pieces:
        whole.add(piece)
    content = MessageAnswer(NAME, shows_thinking=True).whole([whole], Usage(1))["content"]
    assert [block["type"] for block in content] == kinds


def test_keep_alive_is_a_ping():
    assert MessageAnswer.ping == b'event: ping\ndata: {"type": "ping"}\n\n'


def test_web_pages_may_send_its_headers(tmp_path: Path):
    with running(
        Script(tmp_path / "model", "One"), allow_origins=("http://page.example",)
    ) as server:
        head = f"OPTIONS {PATH} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://page.example\r\n\r\n"
        status, headers, _ = server.raw(head.encode())
        assert status == 204
        allowed = headers["Access-Control-Allow-Headers"].lower().split(", ")
        assert {"x-api-key", "anthropic-version", "content-type", "authorization"} <= set(allowed)
