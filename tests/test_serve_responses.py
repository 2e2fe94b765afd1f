"""OpenAI's Responses API: every object and event as the types of its client have them."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.responses import INCLUDABLE, RESPONSES
from outlier_mlx.serve.apis.store import Kept, ResponseStore
from outlier_mlx.serve.pieces import Piece
from outlier_mlx.serve.replies import Reply
from tests.responses import (
    CALLS,
    RESULT,
    SURE,
    TOOL,
    USER,
    post,
    refused,
    stream,
    tokens,
    without,
)
from tests.scripted import PLAIN, TOOLS
from tests.serving import MESSAGES, Running, ServeScript

#: As Qwen's models write reasoning; mlx-lm knows the marks by the template.
REASONING = TOOLS + "{# <think></think> #}{{ messages[0].reasoning_content }}"


@pytest.fixture(scope="module")
def plain(serve_script: ServeScript) -> Running:
    return serve_script(*SURE, template=PLAIN)


@pytest.fixture(scope="module")
def calling(serve_script: ServeScript) -> Running:
    return serve_script(*CALLS)


@pytest.fixture(scope="module")
def thinking(serve_script: ServeScript) -> Running:
    """A model that reasons first."""
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    written = ("<think>", "Because", " so", "</think>", "Yes", ".")
    return serve_script(*written, template=REASONING, marks=marks)


def test_a_text(plain: Running):
    response = post(plain, metadata={"a": "b"}, instructions="Be kind")
    assert response["status"] == "completed"
    (item,) = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert [part["text"] for part in item["content"]] == ["Sure thing"]
    assert response["metadata"] == {"a": "b"}
    assert response["instructions"] == "Be kind"
    assert response["usage"]["output_tokens"] == 3
    assert response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + 3


def test_a_stream_says_what_the_whole_says(plain: Running, calling: Running, thinking: Running):
    for server, body in ((plain, {}), (calling, {"tools": [TOOL]}), (thinking, {})):
        events = stream(server, **body)
        assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
        assert events[0]["response"]["status"] == "in_progress"
        assert events[0]["response"]["output"] == []
        assert events[-1]["type"] == "response.completed"
        assert without(events[-1]["response"]) == without(post(server, **body))


def test_events_of_a_text(plain: Running):
    events = stream(plain)
    assert [event["type"].removeprefix("response.") for event in events[2:-1]] == [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert [e["delta"] for e in events if "delta" in e] == ["Sure", " thing"]
    assert events[2]["item"]["content"] == []
    assert events[-2]["item"] == events[-1]["response"]["output"][0]


def test_a_call(calling: Running):
    response = post(calling, tools=[TOOL])
    text, call = response["output"]
    assert text["content"][0]["text"] == "Let me see."
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "f", '{"x": 1}')
    events = stream(calling, tools=[TOOL])
    kinds = [event["type"].removeprefix("response.") for event in events]
    begin = kinds.index("output_item.added", 3)
    assert kinds[begin:-1] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert events[begin]["item"]["arguments"] == ""
    assert {e["output_index"] for e in events[begin:-1]} == {1}
    # Its own items, sent back with the result.
    output = [*response["output"], RESULT | {"call_id": call["call_id"]}]
    assert tokens(calling, input=[USER, *output], tools=[TOOL]) > tokens(calling, tools=[TOOL])


def test_reasoning_is_an_item_of_its_own(thinking: Running):
    response = post(thinking)
    reasoning, message = response["output"]
    assert reasoning["type"] == "reasoning"
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Because so"}]
    assert reasoning["summary"] == []
    assert message["content"][0]["text"] == "Yes."
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 3
    kinds = [event["type"].removeprefix("response.") for event in stream(thinking)]
    assert kinds[2:9] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_response_that_is_cut(thinking: Running, length: int):
    response = post(thinking, max_output_tokens=length)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["max_output_tokens"] == length
    assert response["output"][-1]["status"] == "incomplete"
    events = stream(thinking, max_output_tokens=length)
    assert events[-1]["type"] == "response.incomplete"
    assert without(events[-1]["response"]) == without(response)


def test_log_probabilities(plain: Running):
    for body in ({"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}):
        events = stream(plain, **body)
        (part,) = events[-1]["response"]["output"][0]["content"]
        assert [token["token"] for token in part["logprobs"]] == ["Sure", " thing"]
        assert bytes(part["logprobs"][0]["bytes"]).decode() == "Sure"
        counts = {len(token["top_logprobs"]) for token in part["logprobs"]}
        assert counts == {body.get("top_logprobs", 0)}
        told = [token for e in events if "delta" in e for token in e["logprobs"]]
        assert [token["token"] for token in told] == ["Sure", " thing"]
    assert "unknown" in refused(plain, include=["unknown"])["message"]
    assert tokens(plain, include=list(INCLUDABLE))


def test_a_conversation_goes_on(plain: Running):
    first = post(plain, instructions="Be kind")
    second = post(plain, input="More", previous_response_id=first["id"])
    alone = [
        USER,
        {"role": "assistant", "content": "Sure thing"},
        {"role": "user", "content": "More"},
    ]
    assert second["previous_response_id"] == first["id"]
    # Instructions are those of one response.
    assert second["usage"]["input_tokens"] == tokens(plain, input=alone)
    third = post(plain, input="x", previous_response_id=second["id"], store=False)
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]
    error = refused(plain, previous_response_id=third["id"])
    assert error["code"] == "previous_response_not_found"
    assert error["param"] == "previous_response_id"
    # Also from the middle.
    assert tokens(plain, input="More", previous_response_id=first["id"]) == tokens(
        plain, input=alone
    )
    streamed = stream(plain)[-1]["response"]
    assert tokens(plain, previous_response_id=streamed["id"]) > tokens(plain)


def test_a_model_answers_as_in_chat(served: Running):
    """Of the embedded pair, with its own template, at temperature 0."""
    text = served.chat().choices[0].message.content
    body = {"input": MESSAGES, "max_output_tokens": 12}
    response = post(served, **body)
    assert response["output"][0]["content"][0]["text"] == text
    assert response["status"] == "incomplete"
    assert without(stream(served, **body)[-1]["response"]) == without(response)


def test_what_is_kept_can_be_read_and_dropped(plain: Running):
    responses = plain.client.responses
    first = responses.create(model="x", input="hi")
    assert responses.retrieve(first.id) == first
    responses.delete(first.id)
    for again in (responses.retrieve, responses.delete):
        with pytest.raises(openai.NotFoundError, match="it was not stored, or was dropped"):
            again(first.id)
    with pytest.raises(openai.BadRequestError, match="it was not stored, or was dropped"):
        responses.create(model="x", input="hi", previous_response_id=first.id)
    status, _, answer = plain.raw(b"PUT /v1/responses/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status == 405
    assert answer["error"]["message"] == "/v1/responses/x expects GET or DELETE"


def test_the_store_is_bounded():
    store = ResponseStore(3, 1000)

    def keep(name: str, text: str) -> None:
        store.keep(Kept({"id": name}, [text]))

    for name in "abcd":
        keep(name, "x")
    assert store.get("a") is None
    assert store.get("b") is not None  # now c is the one that was not used for the longest time
    keep("e", "x")
    assert store.get("c") is None
    keep("large", "x" * 900)
    assert len(store) == 3
    keep("larger", "x" * 950)
    assert store.get("larger") is not None
    assert len(store) == 1
    keep("too large", "x" * 1000)
    assert store.get("too large") is None
    assert store.get("larger") is not None
    keep("f", "x" * 900)
    assert store.drop("f")
    assert not store.drop("f")
    keep("g", "x" * 900)
    assert store.get("g") is not None


def test_tokens_are_counted(plain: Running):
    count = plain.client.responses.input_tokens.count(model="x", input="hi")
    assert count.input_tokens == tokens(plain)
    status, _, answer = plain.post({"input": []}, f"{RESPONSES}/input_tokens")
    assert (status, answer["error"]["param"]) == (400, "input")


def test_an_error_within_a_stream(plain: Running, monkeypatch: pytest.MonkeyPatch):
    def pieces(_: Reply) -> Iterator[Piece]:
        yield Piece("Su")
        raise Refused(503, "generation failed")

    with monkeypatch.context() as patch:
        patch.setattr(Reply, "pieces", pieces)
        *_, error, failed = stream(plain)
    assert (error["type"], error["message"]) == ("error", "generation failed")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"]["message"] == "generation failed"
    assert failed["response"]["output"][0]["content"][0]["text"] == "Su"
    with pytest.raises(openai.NotFoundError):
        plain.client.responses.retrieve(failed["response"]["id"])
