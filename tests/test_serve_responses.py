"""OpenAI's Responses API: every object and event as the types of its client have them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import BaseModel, TypeAdapter

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.api import Usage
from outlier_mlx.serve.apis.endpoints import ENDPOINTS, UNSUPPORTED
from outlier_mlx.serve.apis.items import ITEM_FIELDS
from outlier_mlx.serve.apis.responses import (
    INCLUDABLE,
    OWN_FIELDS,
    REASONING_FIELDS,
    RESPONSE_FIELDS,
    RESPONSES,
    TEXT_FIELDS,
    TOOL_FIELDS,
    Responses,
)
from outlier_mlx.serve.apis.store import Kept, ResponseStore
from outlier_mlx.serve.fields import FIELDS
from outlier_mlx.serve.pieces import Piece
from outlier_mlx.serve.replies import Reply
from outlier_mlx.serve.static import FILES
from tests.pages import table
from tests.program import ROOT
from tests.scripted import PLAIN, TOOLS, Script
from tests.serving import MESSAGES, Running, running

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'}
ENCRYPTED = {"type": "reasoning", "encrypted_content": "x", "summary": []}
RESULT = {"type": "function_call_output", "call_id": "1", "output": "5"}
#: As Qwen's models write reasoning; mlx-lm knows the marks by the template.
REASONING = TOOLS + "{# <think></think> #}{{ messages[0].reasoning_content }}"
#: Fields of tools that a client has no reason to send.
UNTOLD = ("defer_loading", "async", "allowed_callers", "output_schema", "namespace")
RANDOM = ("id", "call_id", "created_at", "completed_at")
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("plain") / "model"
    with running(Script(folder, "Sure", " thing", template=PLAIN)) as server:
        yield server


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model that writes a text and then a call."""
    written = ("Let me see.", "<tool_call>", '{"name": "f", "arguments": {"x": 1}}', "</tool_call>")
    with running(Script(tmp_path_factory.mktemp("calling") / "model", *written)) as server:
        yield server


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model that reasons first."""
    folder = tmp_path_factory.mktemp("thinking") / "model"
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    written = ("<think>", "Because", " so", "</think>", "Yes", ".")
    with running(Script(folder, *written, template=REASONING, marks=marks)) as server:
        yield server


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


def test_items_are_messages(plain: Running, calling: Running):
    text = [{"type": "input_text", "text": "h"}, {"type": "input_text", "text": "i"}]
    output = [{"type": "output_text", "text": "Sure", "annotations": []}]
    for server in (plain, calling):
        alone = tokens(server)
        assert tokens(server, input=[USER]) == alone
        assert tokens(server, input=[{"type": "message", "role": "user", "content": text}]) == alone
        said = {"role": "assistant", "content": "Sure"}
        parts = {"type": "message", "role": "assistant", "content": output, "id": "x"}
        assert tokens(server, input=[USER, said, USER]) == tokens(server, input=[USER, parts, USER])
        system = tokens(server, input=[{"role": "system", "content": "Be kind"}, USER])
        assert system == tokens(server, instructions="Be kind")
        assert system == tokens(server, input=[{"role": "developer", "content": "Be kind"}, USER])


def test_what_was_written_in_one_turn_is_one_message(calling: Running):
    def chat(*messages: dict[str, Any]) -> int:
        _, _, answer = calling.post({"messages": [USER, *messages]})
        count: int = answer["usage"]["prompt_tokens"]
        return count

    function = {"name": "f", "arguments": '{"x": 1}'}
    calls = [{"id": number, "type": "function", "function": function} for number in "12"]
    message = {"role": "assistant", "content": "Wait", "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": number, "content": "5"} for number in "12"]
    items: list[Any] = [{"role": "assistant", "content": "Wait"}, CALL, CALL | {"call_id": "2"}]
    items += [RESULT, RESULT | {"call_id": "2", "output": [{"type": "input_text", "text": "5"}]}]
    assert tokens(calling, input=[USER, *items]) == chat(message, *results)
    twice = [{"role": "assistant", "content": text} for text in ("a", "b")]
    assert tokens(calling, input=[USER, *twice]) == chat(*twice)


def test_reasoning_comes_back_as_the_template_has_it(tmp_path: Path):
    template = "{% for m in messages %}<|role|>{{ m.content }}{{ m.reasoning_content }}{% endfor %}"
    with running(Script(tmp_path / "model", "Sure", template=template)) as server:
        said = {"role": "assistant", "content": "x"}
        text = [{"type": "reasoning_text", "text": "because"}]
        item = {"type": "reasoning", "id": "rs_1", "summary": [], "content": text}
        summed = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "because"}]}
        alone = tokens(server, input=[USER, said])
        assert tokens(server, input=[USER, item, said]) == alone + len("because")
        assert tokens(server, input=[USER, summed, said]) == alone + len("because")
    with running(Script(tmp_path / "plain", "Sure", template=PLAIN)) as server:
        _, headers, _ = server.post({"input": [USER, item, said]}, RESPONSES)
        assert headers["X-Unused-Parameters"] == "input.reasoning"


def test_instructions_are_joined_for_a_template_that_knows_only_one(tmp_path: Path):
    template = (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with running(Script(tmp_path / "model", "Sure", template=template)) as server:
        developer = {"role": "developer", "content": "Be brief"}
        count = tokens(server, instructions="Be kind", input=[developer, USER])
        assert count == tokens(server) + len("Be kind\n\nBe brief")
        error = refused(server, instructions="Be kind", input=[USER, developer])
        assert error["message"].startswith("input[1] is not supported: this model's chat template")
        assert error["param"] == "input"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "input must be a text or a list that is not empty"),
        (None, "input must be a text or a list that is not empty"),
        ([], "input must be a text or a list that is not empty"),
        (7, "input must be a string, or a list"),
        (["hi"], "input[0] must be an object with a type"),
        (
            [{}],
            "input[0] is an item without a type; supported are message, reasoning",
        ),
        (
            [USER, {"type": "item_reference", "id": "x"}],
            "input[1] is an item of the type 'item_",
        ),
        ([{"type": ["message"]}], "input[0] is an item of the type "),
        ([{"type": "web_search_call"}], "input[0] is an item of the type 'web_search_call'"),
        ([{"role": "user"}], "input[0].content is missing"),
        (
            [{"role": "tool", "content": "x"}],
            "input[0].role must be one of user, assistant",
        ),
        ([{"role": "user", "content": 7}], "input[0].content must be a string, or a list"),
        ([{"role": "user", "content": ["x"]}], "input[0].content[0] is a part without a type"),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/x"}]}],
            "input[0].content[0] is a part of the type 'input_image'; only input_text is supported",
        ),
        (
            [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}],
            "input[0].content[0] is a part of the type 'input_file'",
        ),
        (
            [{"role": "user", "content": [{"type": "input_text"}]}],
            "input[0].content[0].text must",
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
            "input[0].content[0] is a part of the type 'refusal'; only output_text is supported",
        ),
        ([CALL | {"arguments": "{"}], "input[0].arguments must be the JSON of an object"),
        ([CALL | {"arguments": "[1]"}], "input[0].arguments must be the JSON of an object"),
        ([CALL | {"arguments": {}}], "input[0].arguments must be a string"),
        ([CALL | {"name": ""}], "input[0].name is missing"),
        ([CALL | {"namespace": "x"}], "input[0].namespace is not supported"),
        ([{"type": "function_call_output", "call_id": "1"}], "input[0].output is missing"),
        (
            [RESULT | {"output": [{"type": "input_image", "image_url": "x"}]}],
            "input[0].output[0] is a part of the type 'input_image'",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_input_is_refused_by_place(calling: Running, given: Any, told: str):
    error = refused(calling, input=given)
    assert error["message"].startswith(told)
    assert (error["param"], error["type"]) == ("input", "invalid_request_error")


def test_results_that_a_template_leaves_out(plain: Running):
    error = refused(plain, input=[USER, CALL, RESULT])
    assert error["message"].startswith("input[1] is not supported: this model's chat template")
    assert refused(plain, tools=[TOOL])["param"] == "tools"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens must be a whole number from 1"),
        ({"temperature": -1}, "temperature must be a number from 0"),
        ({"store": 1}, "store must be true or false"),
        ({"metadata": {"a": 1}}, "metadata must be up to 16 strings"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata must be up to 16 strings"),
        ({"metadata": {"x" * 65: ""}}, "metadata must be up to 16 strings"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"background": True}, "background is not supported"),
        ({"conversation": "x"}, "conversation is not supported"),
        ({"prompt": {"id": "x"}}, "prompt is not supported"),
        ({"text": {"verbosity": "low"}}, "text.verbosity is not supported"),
        ({"reasoning": {"effort": "huge"}}, 'reasoning.effort must be "none" or '),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context is not supported"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "g"}]}},
            "tool_choice: 'g' is allowed, but is no function in tools",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0] is a tool of the type 'web_search'; only"),
        ({"tools": ["f"]}, "tools[0] is a tool without a type; only functions are supported"),
        ({"tools": [TOOL | {"parameters": "x"}]}, "tools[0].parameters must be an object"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading is not supported"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name must be a string"),
        (
            {"messages": [USER]},
            f"messages is a parameter of /v1/chat/completions, not of {RESPONSES}",
        ),
        (
            {"max_tokens": 5},
            f"max_tokens is a parameter of /v1/chat/completions, not of {RESPONSES}",
        ),
        ({"n": 2}, "n is not supported"),
        ({"guided_json": {}}, "guided_json is a parameter of"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_values_are_refused_by_name(calling: Running, wrong: dict[str, Any], told: str):
    error = refused(calling, **wrong)
    assert error["message"].startswith(told)
    assert error["param"] == next(iter(wrong))
    status = calling.status({"input": "hi", "stream": True} | wrong, RESPONSES)
    assert status == 400


def test_which_tools_may_be_called(calling: Running):
    other = TOOL | {"name": "g"}
    none, one, both = (tokens(calling, tools=tools) for tools in ([], [TOOL], [TOOL, other]))
    assert none < one < both

    def chosen(choice: Any) -> int:
        return tokens(calling, tools=[TOOL, other], tool_choice=choice)

    assert chosen("auto") == both
    assert chosen("none") == none
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "f"}],
    }
    assert chosen(allowed) == one
    response = post(calling, tools=[TOOL], parallel_tool_calls=False)
    assert response["parallel_tool_calls"] is False
    assert [item["type"] for item in response["output"]] == ["message", "function_call"]


def test_effort_is_what_the_template_makes_of_it(tmp_path: Path):
    plain = "{{ messages[0].content }}"
    template = plain + "{{ reasoning_effort }}{% if enable_thinking %}<think>{% endif %}"
    with running(Script(tmp_path / "model", "Sure", template=template)) as server:
        none = tokens(server, reasoning={"effort": "none"})
        assert none == tokens(server) + len("none")
        high = tokens(server, reasoning={"effort": "high", "summary": "auto"})
        assert high == none + len("<think>")
        both = {"reasoning": {"effort": "none"}, "chat_template_kwargs": {"enable_thinking": True}}
        assert tokens(server, **both) == high
        body = {"messages": [USER], "reasoning_effort": "high"}
        assert server.post(body)[2]["usage"]["prompt_tokens"] == high
    with running(Script(tmp_path / "plain", "Sure", template=plain)) as server:
        _, headers, _ = server.post({"input": "hi", "reasoning": {"effort": "low"}}, RESPONSES)
        assert headers["X-Unused-Parameters"] == "reasoning.effort"
        _, headers, _ = server.post({"messages": [USER], "reasoning_effort": "low"})
        assert headers["X-Unused-Parameters"] == "reasoning_effort"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"text": {"color": 1}}, "text.color"),
        ({"reasoning": {"color": 1}}, "reasoning.color"),
        ({"input": [USER | {"color": 1}]}, "input.color"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "", "x": 1}]}]},
            "input.content.x",
        ),
        ({"tools": [TOOL | {"color": 1}]}, "tools.color"),
        ({"input": [USER, ENCRYPTED]}, "input.reasoning, input.encrypted_content"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_told(calling: Running, body: dict[str, Any], named: str):
    status, headers, answer = calling.post({"input": "hi"} | body, RESPONSES)
    assert status == 200, answer
    assert (
        headers["X-Unused-Parameters"] == named
        or "input.encrypted_content" in headers["X-Unused-Parameters"]
    )


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


def test_whatever_is_in_a_body_is_answered_or_refused(calling: Running):
    """A part of a right body is replaced by anything: nothing but `Refused` may be raised."""
    random = Random(7)
    junk: list[Any] = [
        None,
        True,
        0,
        -1,
        1.5,
        "",
        "x",
        [],
        [None],
        [[]],
        {},
        {"type": "x"},
        {"x": {}},
        USER,
    ]
    output = [{"type": "output_text", "text": "Sure", "annotations": [], "logprobs": []}]
    thought = {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": ""}],
    }
    said = {"type": "message", "role": "assistant", "content": output}
    right = {
        "input": [USER, thought, said, CALL, RESULT],
        "instructions": "Be kind",
        "tools": [TOOL],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "f"}]},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["message.output_text.logprobs"],
        "metadata": {"a": "b"},
        "stop": ["x"],
        "previous_response_id": None,
    }
    limits, api = calling.server.generator.provider.limits, Responses()
    kept = {"answered": 0, "refused": 0}
    for _ in range(600):
        body = deepcopy(right)
        holder: Any = body
        while True:
            key = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if not (isinstance(holder[key], dict | list) and holder[key]) or random.random() < 0.3:
                break
            holder = holder[key]
        holder[key] = deepcopy(random.choice(junk))
        try:
            requests = api.requests(body, limits)
            answer = api.answer(body, requests, "x")
        except Refused as refused:
            assert refused.status == 400
            assert refused.param is not None
            kept["refused"] += 1
            continue
        whole = answer.whole([Piece("Sure", finish_reason="stop")], Usage(1))
        TypeAdapter(Response).validate_json(json.dumps(whole), strict=True)
        kept["answered"] += 1
    assert min(kept.values()) > 50


def test_every_parameter_of_the_api_is_in_the_table():
    names = {*ResponseCreateParamsBase.__annotations__, "stream"}
    assert not [name for name in names if name not in RESPONSE_FIELDS]
    assert {name for name in names if RESPONSE_FIELDS[name].endpoint} == set()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda c: c.embeddings.create(model="x", input="a"), "/v1/embeddings"),
        (lambda c: c.moderations.create(input="a"), "/v1/moderations"),
        (lambda c: c.images.generate(prompt="a"), "/v1/images/generations"),
        (lambda c: c.audio.speech.create(model="x", input="a", voice="b"), "/v1/audio/speech"),
        (lambda c: c.files.list(), "/v1/files"),
        (lambda c: c.batches.list(), "/v1/batches"),
        (lambda c: c.conversations.create(), "/v1/conversations"),
        (lambda c: c.vector_stores.list(), "/v1/vector_stores"),
    ],
)
def test_other_endpoints_are_refused_by_name(plain: Running, call: Any, named: str):
    with pytest.raises(openai.NotFoundError) as caught:
        call(plain.new_client(max_retries=2))
    assert f"this server does not support {named}: " in caught.value.message
    assert caught.value.code == "unsupported_endpoint"


def listed(names: Iterable[str]) -> str:
    *first, last = [f"`{name}`" for name in names]
    return f"{', '.join(first)} and {last}"


def test_the_page_has_the_tables():
    text = (ROOT / "docs/apis.md").read_text(encoding="utf-8")
    page = " ".join(text.split())
    honoured = {n: f for n, f in RESPONSE_FIELDS.items() if f.use == "honoured" and not f.endpoint}
    shared = [n for n, f in honoured.items() if n in FIELDS and f.values == FIELDS[n].values]
    assert f"{listed(shared)}. These are honoured, too:" in page
    own = {name: str(field.values) for name, field in honoured.items() if name not in shared}
    assert table(text, "### Parameters of responses") == own
    assert table(text, "### Items") == {
        name: listed(n for n, field in fields.items() if field.use == "honoured")
        for name, fields in ITEM_FIELDS.items()
    }
    refused = {n: f.harmless for n, f in OWN_FIELDS.items() if f.use == "refused"}
    assert f"These are refused: {listed(n for n in refused if not refused[n])};" in page
    for name, values in refused.items():
        for value in values:
            assert f"`{name}` other than `{json.dumps(value)}`" in page
    accepted = [name for name, field in OWN_FIELDS.items() if field.use == "accepted"]
    assert f"{listed(accepted)} are accepted" in page
    for fields in (TEXT_FIELDS, REASONING_FIELDS, TOOL_FIELDS, *ITEM_FIELDS.values()):
        told = [n for n in fields if n not in UNTOLD]
        assert not [name for name in told if f"`{name}`" not in page]
    assert listed(UNSUPPORTED) in page


def test_each_endpoint_is_on_a_page():
    names = ("serve", "apis", "anthropic")
    pages = "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in names)
    for path, method in ENDPOINTS.items():
        if path not in FILES and path != "/chat/completions":
            assert f"`{method} {path}`" in pages
