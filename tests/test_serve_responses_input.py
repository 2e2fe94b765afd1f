"""What a request to the Responses API says: it becomes messages, or is refused by its place."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
from openai.types.responses import Response
from pydantic import TypeAdapter

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.api import Usage
from outlier_mlx.serve.apis.responses import RESPONSES, Responses
from outlier_mlx.serve.pieces import Piece
from tests.responses import (
    CALL,
    CALLS,
    RESULT,
    SURE,
    TOOL,
    USER,
    post,
    refused,
    tokens,
)
from tests.scripted import PLAIN, Script
from tests.serving import Running, ServeScript, running

ENCRYPTED = {"type": "reasoning", "encrypted_content": "x", "summary": []}


@pytest.fixture(scope="module")
def plain(serve_script: ServeScript) -> Running:
    return serve_script(*SURE, template=PLAIN)


@pytest.fixture(scope="module")
def calling(serve_script: ServeScript) -> Running:
    return serve_script(*CALLS)


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


@pytest.mark.slow
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
