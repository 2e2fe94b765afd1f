"""Nothing that a request says is passed over: it is honoured, refused by name, or told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams

from outlier_mlx.serve.fields import CHAT, FIELDS, MESSAGE_FIELDS, STREAM_OPTIONS, TEXT, Field
from tests.pages import table
from tests.program import ROOT
from tests.scripted import PLAIN, Script
from tests.serving import Running, ServeScript, running

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "5"}
OTHER_TEXT_PARTS = [
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "image_url", "image_url": {"url": "https://page.example/x.png"}},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    {"type": "file", "file": {"file_id": "x"}},
    {"type": "refusal", "refusal": "no"},
    {"type": "input_text", "text": "x"},
]


@pytest.fixture(scope="module")
def tooled(serve_script: ServeScript) -> Running:
    """A template with tools and any role."""
    return serve_script("Sure")


@pytest.fixture(scope="module")
def plain(serve_script: ServeScript) -> Running:
    """A template of system, user and assistant alone."""
    return serve_script("Sure", template=PLAIN)


def prompt_tokens(server: Running, *messages: dict[str, Any], **fields: Any) -> int:
    status, _, answer = server.post({"messages": list(messages or [USER])} | fields)
    assert status == 200, answer
    tokens: int = answer["usage"]["prompt_tokens"]
    return tokens


def refused(server: Running, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    """The error of a request that is refused before a stream begins as well."""
    status, _, answer = server.post(body, path)
    assert status == 400, answer
    assert server.status(body | {"stream": True}, path) == 400
    error: dict[str, Any] = answer["error"]
    assert error["type"] == "invalid_request_error"
    return error


def test_every_parameter_of_the_api_is_in_the_table():
    for params, endpoint in ((ChatParams, CHAT), (TextParams, TEXT)):
        names = {*params.__annotations__, "stream"}
        assert not [name for name in names if name not in FIELDS]
        assert not [name for name in names if FIELDS[name].endpoint not in (None, endpoint)]


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.use == "refused"])
@pytest.mark.parametrize("endpoint", [CHAT, TEXT])
def test_what_cannot_be_done_is_refused_by_name(tooled: Running, name: str, endpoint: str):
    prompt = {"messages": [USER]} if endpoint == CHAT else {"prompt": "hi"}
    for value in (7, {"x": [1]}):
        error = refused(tooled, prompt | {name: value}, endpoint)
        assert error["message"] == f"{name} is not supported"
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    for harmless in (None, *FIELDS[name].harmless):
        status, headers, _ = tooled.post(prompt | {name: harmless}, endpoint)
        assert status == 200
        assert "X-Unused-Parameters" not in headers


def test_false_is_not_zero(tooled: Running):
    assert refused(tooled, {"messages": [USER], "n": True})["param"] == "n"
    assert refused(tooled, {"messages": [USER], "ignore_eos": 0})["param"] == "ignore_eos"
    assert prompt_tokens(tooled, n=1.0)


@pytest.mark.parametrize(
    "name", [name for name, field in FIELDS.items() if field.use == "accepted"]
)
def test_what_changes_no_response_is_accepted(tooled: Running, name: str):
    for value in ("x", True, {"a": [1]}):
        status, headers, _ = tooled.post({"messages": [USER], name: value})
        assert status == 200
        assert "X-Unused-Parameters" not in headers


def test_parameters_of_the_other_endpoint(tooled: Running):
    error = refused(tooled, {"messages": [USER], "prompt": "x"})
    assert error["message"] == f"prompt is a parameter of {TEXT}, not of {CHAT}"
    error = refused(tooled, {"prompt": "x", "tools": [TOOL]}, TEXT)
    assert error["message"] == f"tools is a parameter of {CHAT}, not of {TEXT}"
    assert "logprobs" in refused(tooled, {"messages": [USER], "logprobs": 2})["message"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"temperature": "hot"}, "temperature must be a number from 0"),
        ({"top_p": 1.5}, "top_p must be a number from 0 to 1"),
        ({"top_k": 0.5}, "top_k must be a whole number from 0"),
        ({"repetition_penalty": 0.001}, "repetition_penalty must be a number from 0.01, or 0"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls must be true or false"),
        ({"stop": 7}, "stop must be a string, or a list"),
        (
            {"stream_options": {"include_usage": 1}},
            "stream_options.include_usage must be true or f",
        ),
        (
            {"tool_choice": "must"},
            'tool_choice must be "auto" or "none" or "required", or an object',
        ),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice must be"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice: there is no",
        ),
        ({"response_format": "json"}, "response_format must be an object"),
        ({"response_format": {"type": "xml"}}, "response_format.type must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format has no schema"),
        ({"logprobs": 21}, "logprobs must be true or false, or a whole number from 0 to 20"),
    ],
    ids=str,
)
def test_values_are_refused_by_name(tooled: Running, wrong: dict[str, Any], told: str):
    error = refused(tooled, {"messages": [USER], "tools": [TOOL]} | wrong)
    assert error["message"].startswith(told)
    assert error["param"] == next(iter(wrong))


def test_a_developer_is_the_system(tooled: Running, plain: Running):
    for server in (tooled, plain):
        system = prompt_tokens(server, {"role": "system", "content": "SECRET"}, USER)
        developer = prompt_tokens(server, {"role": "developer", "content": "SECRET"}, USER)
        assert developer == system > prompt_tokens(server, USER) + 6


@pytest.mark.parametrize("role", ["User", "function", "bot", "", 7, None])
def test_unknown_roles(tooled: Running, role: Any):
    error = refused(tooled, {"messages": [USER, {"role": role, "name": "f", "content": "x"}]})
    assert error["message"].startswith("messages[1].role must be ")
    assert error["param"] == "messages"


def test_tools(tooled: Running, plain: Running):
    alone = prompt_tokens(tooled)
    with_tools = prompt_tokens(tooled, tools=[TOOL])
    assert with_tools == prompt_tokens(tooled, tools=[TOOL], tool_choice="auto") > alone
    assert prompt_tokens(tooled, tools=[TOOL], tool_choice="none") == alone
    assert prompt_tokens(tooled, tools=[]) == alone
    error = refused(plain, {"messages": [USER], "tools": [TOOL]})
    assert error["message"] == (
        "tools is not supported: this model's chat template leaves out tools"
    )
    assert prompt_tokens(plain, tools=[], tool_choice="none")


@pytest.mark.parametrize(
    ("tool", "place"),
    [
        ("f", "tools[0]"),
        ({"type": "function"}, "tools[0]"),
        ({"type": "custom", "custom": {"name": "f"}}, "tools[0]"),
        ({"type": "function", "function": {}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": ["f"]}}, "tools[0].function.name"),
        ({"function": {"name": "f", "parameters": "x"}}, "tools[0].function.parameters"),
    ],
    ids=str,
)
def test_tools_that_are_none(tooled: Running, tool: Any, place: str):
    error = refused(tooled, {"messages": [USER], "tools": [tool]})
    assert error["message"].startswith(f"{place} ")
    assert error["param"] == "tools"


def test_tools_whose_calls_could_not_be_read(tmp_path: Path):
    template = "{{ tools | tojson if tools }}" + PLAIN
    with running(Script(tmp_path / "model", "Sure", template=template, marks=())) as server:
        error = refused(server, {"messages": [USER], "tools": [TOOL]})
        assert "the format of this model's tool calls is not known" in error["message"]


def test_a_model_without_a_template(tmp_path: Path):
    with running(Script(tmp_path / "model", "Sure", template=None)) as server:
        assert prompt_tokens(server, {"role": "developer", "content": "x"}, USER)
        error = refused(server, {"messages": [USER], "tools": [TOOL]})
        assert "leaves out tools" in error["message"]
        error = refused(server, {"messages": [USER, RESULT]})
        assert "leaves out tool results" in error["message"]


def test_earlier_calls_and_results(tooled: Running, plain: Running):
    def tokens(call: dict[str, Any], **fields: Any) -> int:
        message = {"role": "assistant", "content": None, "tool_calls": [call]} | fields
        return prompt_tokens(tooled, USER, message, RESULT, tools=[TOOL])

    function: dict[str, Any] = CALL["function"]  # type: ignore[assignment]
    as_text = tokens(CALL)
    assert tokens(CALL | {"function": function | {"arguments": {"x": 1}}}) == as_text
    assert tokens(CALL, refusal=None, audio=None, function_call=None, annotations=[]) == as_text
    empty = tokens(CALL | {"function": function | {"arguments": {}}})
    for arguments in ("", " ", "{}", None):
        assert tokens(CALL | {"function": function | {"arguments": arguments}}) == empty
    assert tokens({"function": {"name": "f"}}) == empty
    none = prompt_tokens(tooled, USER, {"role": "assistant", "content": "x"})
    calls: Any
    for calls in ([], None):
        message = {"role": "assistant", "content": "x", "tool_calls": calls}
        assert prompt_tokens(tooled, USER, message) == none
    parts = RESULT | {"content": [{"type": "text", "text": "5"}]}
    message = {"role": "assistant", "tool_calls": [CALL]}
    assert prompt_tokens(tooled, USER, message, parts, tools=[TOOL]) == as_text
    for messages, told in (
        ([USER, message], "messages[1] is not supported: this model's chat template leaves out to"),
        ([USER, RESULT], "messages[1] is not supported: this model's chat template leaves out to"),
    ):
        assert refused(plain, {"messages": messages})["message"].startswith(told)


@pytest.mark.parametrize(
    ("call", "place"),
    [
        (1, ""),
        ({}, ""),
        ({"type": "custom", "custom": {}}, ""),
        ({"function": {}}, ".function.name"),
        ({"function": {"name": "f", "arguments": "{not json"}}, ".function.arguments"),
        ({"function": {"name": "f", "arguments": "[1]"}}, ".function.arguments"),
        ({"function": {"name": "f", "arguments": [1]}}, ".function.arguments"),
        ({"function": {"name": "f", "arguments": "{" * 9999}}, ".function.arguments"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_earlier_calls_that_are_none(tooled: Running, call: Any, place: str):
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    error = refused(tooled, {"messages": messages})
    assert error["message"].startswith(f"messages[1].tool_calls[0]{place} must be ")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("hi", "messages[1] must be an object with a role"),
        ({"role": "user"}, "messages[1].content is missing"),
        ({"role": "user", "content": 7}, "messages[1].content must be a string, or a list"),
        ({"role": "user", "content": {}}, "messages[1].content must be a string, or a list"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0] is a part without a type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text must be a"),
        ({"role": "assistant", "refusal": "no"}, "messages[1].refusal is not supported"),
        ({"role": "assistant", "audio": {"id": "x"}}, "messages[1].audio is not supported"),
        ({"role": "assistant", "function_call": {}}, "messages[1].function_call is not supported"),
        (USER | {"tool_calls": [CALL]}, "messages[1].tool_calls is not for the role user"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_messages_are_refused_by_place(tooled: Running, message: Any, told: str):
    error = refused(tooled, {"messages": [USER, message]})
    assert error["message"].startswith(told)
    assert error["param"] == "messages"


@pytest.mark.parametrize("part", OTHER_TEXT_PARTS, ids=lambda part: part["type"])
@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_parts_other_than_text(tooled: Running, part: dict[str, Any], role: str):
    content = [{"type": "text", "text": "What is this?"}, part]
    error = refused(tooled, {"messages": [USER, {"role": role, "content": content}]})
    assert error["message"] == (
        f"messages[1].content[1] is a part of the type '{part['type']}'; only text is supported"
    )
    assert error["code"] == "unsupported_content"


def test_text_parts_are_joined(tooled: Running):
    parts = [{"type": "text", "text": text} for text in ("a", "", "b\n", "c")]
    joined = prompt_tokens(tooled, {"role": "user", "content": "ab\nc"})
    assert prompt_tokens(tooled, {"role": "user", "content": parts}) == joined


def test_system_messages_that_a_template_leaves_out(tmp_path: Path):
    """As do those that look at the first message only, or at none."""
    system = {"role": "system", "content": "SECRET"}
    first = (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with running(Script(tmp_path / "first", "Sure", template=first)) as server:
        assert prompt_tokens(server, system, USER) > prompt_tokens(server, USER)
        for messages in ([system, system, USER], [USER, system]):
            error = refused(server, {"messages": messages})
            assert "[1] is not supported" in error["message"]
            assert "leaves out system messages after the first message" in error["message"]
    none = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with running(Script(tmp_path / "none", "Sure", template=none)) as server:
        error = refused(server, {"messages": [system, USER]})
        assert error["message"] == (
            "messages[0] is not supported: this model's chat template leaves out system messages"
        )


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"frobnicate": 1}, "frobnicate"),
    ({"b": 0, "a": {}}, "b, a"),
    ({"stream_options": {"include_usage": True, "frobnicate": 1}}, "stream_options.frobnicate"),
    ({"chat_template_kwargs": {"frobnicate": 1}}, "chat_template_kwargs.frobnicate"),
    ({"messages": [USER | {"color": 1}, USER | {"color": 2}]}, "messages.color"),
    ({"messages": [USER | {"name": "Ann"}]}, "messages.name"),
    ({"messages": [{"role": "assistant", "reasoning": "x"}]}, "messages.reasoning"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache": 1}]}]},
        "messages.content.cache",
    ),
    ({"a\r\nSet-Cookie: x\u00e9": 1}, "a??Set-Cookie??x?"),
    ({"x" * 100: 1}, "x" * 64),
]


@pytest.mark.parametrize(("fields", "named"), UNKNOWN, ids=lambda value: str(value)[:40])
def test_what_has_no_effect_is_told(tooled: Running, fields: dict[str, Any], named: str):
    status, headers, _ = tooled.post({"messages": [USER]} | fields)
    assert (status, headers["X-Unused-Parameters"]) == (200, named)
    body: Any = {"model": "x", "messages": [USER], "stream": True, "extra_body": fields}
    create: Any = tooled.client.chat.completions.with_streaming_response.create
    with create(**body) as streamed:
        assert streamed.headers["X-Unused-Parameters"] == named


def test_what_has_no_effect_is_logged_once(tooled: Running):
    for _ in range(3):
        tooled.post({"messages": [USER], "mystery": 1})
    lines = [line for line in tooled.log if "mystery" in line]
    assert lines == ["a request has the parameter mystery, which has no effect"]
    for number in range(1100):
        tooled.server.service.named.add(str(number))
    tooled.post({"messages": [USER], "another": 1})
    assert not [line for line in tooled.log if "another" in line]


def test_what_has_an_effect_is_not_told(tmp_path: Path):
    template = "{{ messages[0].name }}{{ tone }}{{ messages[0].content }}"
    with running(Script(tmp_path / "model", "Sure", template=template)) as server:
        body = {"messages": [USER | {"name": "Ann"}], "chat_template_kwargs": {"tone": "x"}}
        _, headers, _ = server.post(body)
        assert "X-Unused-Parameters" not in headers


def test_reasoning_comes_back_as_the_template_has_it(tmp_path: Path):
    template = "{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{% endfor %}"
    with running(Script(tmp_path / "model", "Sure", template=template)) as server:

        def tokens(**fields: Any) -> int:
            return prompt_tokens(server, USER, {"role": "assistant", "content": "x"} | fields)

        assert tokens(reasoning="because") == tokens(reasoning_content="because") > tokens() + 6
        _, headers, _ = server.post({"messages": [{"role": "assistant", "thinking": "because"}]})
        assert headers["X-Unused-Parameters"] == "messages.thinking"


def test_strict(tmp_path: Path):
    with running(Script(tmp_path / "model", "Sure"), strict=True) as server:
        for fields, named in UNKNOWN:
            error = refused(server, {"messages": [USER]} | fields)
            assert error["message"] == f"these parameters would have no effect: {named}"
            assert error["code"] == "unknown_parameter"
        everything = {name: "x" for name, field in FIELDS.items() if field.use == "accepted"}
        assert prompt_tokens(server, **everything | {"temperature": 0})


def honoured(fields: dict[str, Field]) -> dict[str, str]:
    return {name: str(f.values) for name, f in fields.items() if f.use == "honoured"}


def test_the_page_has_the_table():
    page = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
    assert table(page, "### Parameters that are honoured") == honoured(FIELDS)
    assert table(page, "### Messages") == honoured(MESSAGE_FIELDS)
    assert table(page, "### Parameters that are refused") == {
        name: " or ".join(f"`{json.dumps(value)}`" for value in field.harmless)
        for name, field in FIELDS.items()
        if field.use == "refused" and field.harmless
    }
    never = [name for name, f in FIELDS.items() if f.use == "refused" and not f.harmless]
    accepted = [name for name, f in FIELDS.items() if f.use == "accepted"]
    for introduction, names in (
        ("These are refused", never),
        ("They change no response", accepted),
    ):
        *first, last = [f"`{name}`" for name in names]
        assert f"{introduction}: {', '.join(first)} and {last}." in " ".join(page.split())
    assert not [name for name in MESSAGE_FIELDS | STREAM_OPTIONS if f"`{name}`" not in page]
