"""Answers in a demanded form: JSON of a schema, and calls that must be made."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from outlier_mlx.engine.constraint import ConstraintError, ConstraintProcessor, Grammars
from outlier_mlx.serve.structured import Form, ToolChoice
from tests.json_schemas import SCHEMAS, SMALL, record
from tests.library import Library
from tests.scripted import TOOLS, Script
from tests.serving import MESSAGES, Running, running

PARAMETERS = record(
    {"unit": {"type": "string", "enum": ["C", "F"]}},
    city={"type": "string", "minLength": 1, "maxLength": 3},
    days=SMALL | {"minimum": 1},
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "clock"}}


def form(schema: Any, name: str = "answer") -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


def assert_valid(text: str, schema: Any) -> None:
    jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)


@pytest.fixture(scope="module")
def server(library: Library) -> Iterator[Running]:
    """A server of the embedded pair."""
    with running(library.demo_tier("q4"), max_tokens=400) as server:
        yield server


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a model that wants to write something else."""
    script = Script(tmp_path_factory.mktemp("model") / "scripted", "It", " is", " warm")
    with running(script, max_tokens=200) as server:
        yield server


def ask(server: Running, **more: Any) -> Any:
    return server.chat(max_tokens=200, **more).choices[0]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema(server: Running, temperature: float) -> None:
    schema = SCHEMAS["record"]
    choice = ask(server, response_format=form(schema), temperature=temperature, seed=4)
    assert choice.finish_reason == "stop"
    assert_valid(choice.message.content, schema)


def test_nobody_waits_for_the_vocabulary(server: Running, tmp_path: Path) -> None:
    """It is read before the server answers anybody; one that cannot be is told with a schema."""
    with running(Script(tmp_path / "model", "It")) as other:
        grammars = other.server.generator.provider.limits.grammars
        made = grammars._made
        assert made is not None
        assert other.post({"messages": MESSAGES, "guided_json": {"const": 1}})[0] == 200
        assert grammars._made is made


def test_a_server_starts_where_no_answer_can_be_constrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any) -> Any:
        raise ConstraintError("the text of its tokens depends on their neighbours")

    monkeypatch.setattr(Grammars, "_bytes", refuse)
    with running(Script(tmp_path / "model", "It")) as other:
        assert other.chat().choices[0].message.content == "It"
        status, _, answer = other.post({"messages": MESSAGES, "guided_json": {"const": 1}})
        assert status == 400 and "neighbours" in answer["error"]["message"]


def test_a_stream_and_log_probabilities(server: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 100, "logprobs": True, "top_logprobs": 20}
    events = server.stream(body | {"response_format": form(SCHEMAS["tuple"])})
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert_valid(text, SCHEMAS["tuple"])
    tokens = [
        t for e in events for t in e["choices"][0].get("logprobs", {"content": []})["content"]
    ]
    assert "".join(token["token"] for token in tokens) == text
    # A token that is not allowed is no alternative.
    assert all(other["logprob"] > -1e9 for token in tokens for other in token["top_logprobs"])
    assert {other["token"] for other in tokens[0]["top_logprobs"]} <= {"[", '["', "[ ", "[\n"}


def test_any_object(server: Running) -> None:
    choice = ask(server, response_format={"type": "json_object"}, logit_bias={}, temperature=0)
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("name", ["guided_json", "json_schema"])
def test_names_of_other_servers(server: Running, name: str) -> None:
    for body, path in (
        ({"messages": MESSAGES}, "/v1/chat/completions"),
        ({"prompt": ["Vega is", "The sea"]}, "/v1/completions"),
    ):
        status, _, answer = server.post(body | {name: SCHEMAS["pattern"], "max_tokens": 60}, path)
        assert status == 200
        for choice in answer["choices"]:
            assert_valid(choice.get("text") or choice["message"]["content"], SCHEMAS["pattern"])


def test_stop_words_and_lengths_end_an_answer_early(server: Running) -> None:
    choice = ask(server, response_format=form({"const": "abcdef"}), stop=["d"])
    assert (choice.message.content, choice.finish_reason) == ('"abc', "stop")
    cut = server.chat(response_format=form({"const": "a" * 50}), max_tokens=2).choices[0]
    assert cut.finish_reason == "length" and cut.message.content.startswith('"a')


def test_the_prompt_cache_has_no_part_in_it(server: Running) -> None:
    """The same conversation with other forms, and free, from the cached prompt."""
    free = ask(server, max_completion_tokens=8, temperature=0).message.content
    for name in ("date", "record", "union"):
        choice = ask(server, response_format=form(SCHEMAS[name]))
        assert_valid(choice.message.content, SCHEMAS[name])
    assert ask(server, max_completion_tokens=8, temperature=0).message.content == free


def many(server: Running, names: list[str], temperature: float) -> None:
    def one(name: str) -> None:
        asked = {"response_format": form(SCHEMAS[name]), "max_tokens": 400}
        choice = server.chat(temperature=temperature, **asked).choices[0]
        assert choice.finish_reason == "stop", name
        assert_valid(choice.message.content, SCHEMAS[name])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, names))


def test_several_forms_in_a_batch(server: Running) -> None:
    many(server, ["date", "record", "tuple", "enum", "linked list", "null"], 1)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1])
def test_all_schemas_in_batches(server: Running, temperature: float) -> None:
    many(server, list(SCHEMAS), temperature)


@pytest.mark.parametrize(
    "schema, told",
    [
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' is not supported"),
        (record(next={"$ref": "#"}), "ever ends"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
        ({"$ref": "http://localhost/x.json"}, "is not in the schema"),
    ],
    ids=str,
)
def test_schemas_that_cannot_be_had(server: Running, schema: Any, told: str) -> None:
    body = {"messages": MESSAGES, "response_format": form(schema)}
    status, _, answer = server.post(body)
    assert status == 400
    assert answer["error"]["message"].startswith("response_format: ")
    assert told in answer["error"]["message"]
    assert answer["error"]["param"] == "response_format"


def test_a_form_that_becomes_too_hard_later(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is told what it demanded itself, and is not asked to try again."""
    allowed = ConstraintProcessor._allowed

    def fail(self: Any) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps > 5:
            self._fail("too many states")
        return allowed(self)

    monkeypatch.setattr(ConstraintProcessor, "_allowed", fail)
    told = "the answer cannot be continued under its constraint: too many states"
    schema = {"const": "a" * 30}
    body = {"messages": MESSAGES, "max_tokens": 50, "response_format": form(schema)}
    for more in ({}, {"seed": 3}):
        status, headers, answer = server.post(body | more)
        assert status == 400 and "Retry-After" not in headers
        assert answer["error"]["message"] == told
        assert answer["error"]["code"] == "invalid_json_schema"
    prompts = {"prompt": ["a", "b"], "guided_json": schema, "max_tokens": 50}
    assert server.post(prompts, "/v1/completions")[0] == 400
    output = {"format": {"type": "json_schema", "schema": schema}}
    message = {"messages": MESSAGES, "max_tokens": 50, "output_config": output}
    status, _, answer = server.post(message, "/v1/messages")
    assert (status, answer["error"]) == (400, {"type": "invalid_request_error", "message": told})
    with pytest.raises(openai.APIError, match="too many states"):
        list(server.chat(response_format=form(schema), max_tokens=50, stream=True))
    assert server.chat(max_tokens=3).usage.completion_tokens == 3


def test_others_do_not_wait_for_a_hard_schema(server: Running) -> None:
    hard = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(300)}}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            server.post, {"messages": MESSAGES, "max_tokens": 3, "guided_json": hard}
        )
        begun = time.perf_counter()
        server.chat(max_tokens=3)
        assert time.perf_counter() - begun < 5
        assert asked.result()[0] in (200, 400)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str
)
def test_a_call_that_must_be_made(tooled: Running, choice: Any) -> None:
    answered = ask(tooled, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert answered.finish_reason == "tool_calls"
    (call,) = answered.message.tool_calls
    assert call.function.name == "weather" and not answered.message.content
    assert_valid(call.function.arguments, PARAMETERS)


def test_a_function_by_its_name_among_others(tooled: Running) -> None:
    named = {"type": "function", "function": {"name": "clock"}}
    answered = ask(tooled, tools=[TOOL, OTHER], tool_choice=named, parallel_tool_calls=False)
    (call,) = answered.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("clock", "{}")


def test_a_stream_of_a_forced_call(tooled: Running) -> None:
    body = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "max_tokens": 150}
    events = tooled.stream(body | {"parallel_tool_calls": False})
    calls = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "weather"
    assert_valid("".join(c["function"].get("arguments", "") for c in calls), PARAMETERS)


def test_strict_arguments_of_a_call_that_is_free(tmp_path: Path) -> None:
    """The model writes a text, a call with wrong arguments, and its end."""
    parts = ("Well", "<tool_call>", '{"name": "weather", "argu', 'ments": {}}', "</tool_call>")
    strict = {"type": "function", "function": TOOL["function"] | {"strict": True}}  # type: ignore[operator]
    with running(Script(tmp_path / "model", *parts), max_tokens=200) as server:
        free = ask(server, tools=[TOOL]).message
        assert [call.function.arguments for call in free.tool_calls] == ["{}"]
        held = ask(server, tools=[strict], parallel_tool_calls=False)
        assert held.message.content == "Well"
        (call,) = held.message.tool_calls
        assert_valid(call.function.arguments, PARAMETERS)


def test_a_free_text_stays_what_it_is_with_strict_tools(tooled: Running) -> None:
    strict = {"type": "function", "function": TOOL["function"] | {"strict": True}}  # type: ignore[operator]
    assert ask(tooled, tools=[strict]).message.content == "It is warm"


@pytest.mark.parametrize("opened", [True, False])
def test_thinking_is_free(opened: bool, tmp_path: Path) -> None:
    """Whether the template opens it, or the model."""
    parts = ("<think>", "Let me", " think", "</think>", "It is")
    template = TOOLS + "<think>" if opened else TOOLS
    script = Script(tmp_path / "model", *parts, template=template, marks=("<think>", "</think>"))
    with running(script, max_tokens=60) as server:
        schema = record(answer={"enum": ["a", "b"]})
        body = {"messages": MESSAGES, "response_format": form(schema)}
        status, _, answer = server.post(body)
        assert status == 200
        message = answer["choices"][0]["message"]
        assert "Let me think" in message.values()
        assert_valid(message["content"], schema)
        # A cut within thinking leaves no answer.
        cut = server.post(body | {"max_tokens": 2})[2]["choices"][0]
        assert (cut["finish_reason"], cut["message"]["content"]) == ("length", None)


def test_a_schema_or_a_call(tooled: Running) -> None:
    answered = ask(tooled, tools=[TOOL], response_format=form(ANSWER := {"enum": ["no"]}))
    if answered.message.tool_calls:
        assert_valid(answered.message.tool_calls[0].function.arguments, PARAMETERS)
    else:
        assert_valid(answered.message.content, ANSWER)


@pytest.mark.parametrize(
    "more, told",
    [
        ({"tool_choice": "required"}, "there are no tools"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "look at this"}}],
                "tool_choice": "required",
            },
            "is no plain name",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"not": {}}, "strict": True},
                    }
                ]
            },
            "tools: f: #/not: the keyword 'not' is not supported",
        ),
    ],
    ids=["no tools", "name", "schema"],
)
def test_calls_that_cannot_be_forced(tooled: Running, more: Any, told: str) -> None:
    status, _, answer = tooled.post({"messages": MESSAGES} | more)
    assert status == 400 and told in answer["error"]["message"]


def test_no_form_needs_no_grammar() -> None:
    assert Form(choice=ToolChoice([TOOL, OTHER])).constraint(None) is None  # type: ignore[arg-type]


def test_the_responses_api(server: Running, tooled: Running) -> None:
    client = server.client.responses
    text: Any = {"format": {"type": "json_schema", "name": "r", "schema": SCHEMAS["record"]}}
    answer = client.create(model="tiny", input="Who?", text=text, max_output_tokens=200)
    assert_valid(answer.output_text, SCHEMAS["record"])
    tool: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    choice: Any = {"type": "function", "name": "weather"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [choice]}
    choices: list[Any] = ["required", choice, allowed]
    for chosen in choices:
        made = tooled.client.responses.create(
            model="tiny",
            input="Who?",
            tools=[tool],
            tool_choice=chosen,
            parallel_tool_calls=False,
            max_output_tokens=150,
        )
        (call,) = made.output
        assert call.type == "function_call" and call.name == "weather"
        assert_valid(call.arguments, PARAMETERS)
    wrong = {"input": "x", "text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}
    status, _, refused = server.post(wrong, "/v1/responses")
    assert status == 400 and refused["error"]["param"] == "text.format"


def test_the_messages_api(server: Running, tooled: Running) -> None:
    path = "/v1/messages"
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 150}
    output = {"format": {"type": "json_schema", "schema": SCHEMAS["record"]}}
    status, _, answer = server.post(body | {"output_config": output}, path)
    assert status == 200
    assert_valid(answer["content"][0]["text"], SCHEMAS["record"])
    tools = [{"name": "weather", "input_schema": PARAMETERS}, {"name": "x", "input_schema": {}}]
    one = {"disable_parallel_tool_use": True}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        status, _, answer = tooled.post(body | {"tools": tools, "tool_choice": choice | one}, path)
        assert status == 200 and answer["stop_reason"] == "tool_use"
        (call,) = answer["content"]
        schema = {"weather": PARAMETERS, "x": {"type": "object"}}[call["name"]]
        assert_valid(json.dumps(call["input"]), schema)
    for choice in ({"type": "tool"}, {"type": "tool", "name": "none"}):
        status, _, answer = tooled.post(body | {"tools": tools, "tool_choice": choice}, path)
        assert status == 400 and "tool_choice" in answer["error"]["message"]
