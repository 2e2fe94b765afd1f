"""Bodies and parameters that are not what they should be: refused, and nothing ends over them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx.serve.fields import FIELDS
from tests.serving import MESSAGES, Running

GOOD = json.dumps({"messages": MESSAGES, "max_tokens": 3}).encode()
BAD_BODIES = {
    "no JSON": b"{",
    "another encoding": GOOD.decode().encode("utf-16"),
    "not UTF-8": b'{"messages": "\xff"}',
    "a list": b"[1]",
    "nothing": b"",
    "deep": b"[" * 15_000,
    "not a number": b'{"prompt": "x", "temperature": NaN}',
    "a long number": b'{"max_tokens": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=list(BAD_BODIES))
def test_malformed_bodies(served: Running, body: bytes):
    status, headers, answer = served.post(body)
    assert status == 400
    assert headers["Content-Type"] == "application/json"
    assert answer["error"]["type"] == "invalid_request_error"
    assert re.match("the body is not", answer["error"]["message"])


BAD_PARAMETERS: list[dict[str, Any]] = [
    {"messages": "hello"},
    {"messages": []},
    {"messages": {}},
    {"messages": ["hello"]},
    {"messages": [{"content": "no role"}]},
    {"messages": [{"role": "user", "content": 7}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///x"}]}]},
    {"temperature": "hot"},
    {"temperature": -1},
    {"temperature": 1e999},
    {"temperature": 10**400},
    {"top_p": 2},
    {"top_k": -1},
    {"min_p": True},
    {"max_tokens": 0},
    {"max_tokens": 2.5},
    {"max_tokens": True},
    {"xtc_threshold": 0.6, "xtc_probability": 0.5, "temperature": 1},
    {"repetition_penalty": 1e-320},
    {"repetition_context_size": 10**30, "repetition_penalty": 2},
    {"logit_bias": {"288": 1}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"9" * 5000: 1}},
    {"logit_bias": {"1": 1e300}},
    {"logit_bias": [1]},
    {"top_logprobs": 21},
    {"top_logprobs": -1},
    {"top_logprobs": 1.0},
    {"stop": 7},
    {"stop": [7]},
    {"stop": ["x"] * 17},
    {"stop": "x" * 257},
    {"stream": "yes"},
    {"stream": True, "stream_options": 1},
    {"n": 2},
    {"response_format": {"type": "json_object"}, "guided_json": {}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
    {"guided_json": {"$ref": "#"}},
    {"json_schema": {"type": "array", "minItems": 10**9}},
    {"adapters": "somebody/lora"},
    {"draft_model": "somebody/model"},
    {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    {"chat_template_kwargs": {"padding": "max_length", "max_length": 10**12}},
    {"chat_template_kwargs": {"x": [1]}},
    {"seed": "lucky"},
]


@pytest.mark.parametrize("changed", BAD_PARAMETERS, ids=lambda p: str(p)[:50])
def test_bad_parameters(served: Running, changed: dict[str, Any]):
    body = {"messages": MESSAGES, "max_tokens": 3} | changed
    status, _, answer = served.post(body)
    assert status == 400
    assert answer["error"]["message"]


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 11, 0.5, 1e-320, 1e308, 10**30, 2**31, "", "x", "\ud800"),
    *([], [1], ["a"], {}, {"a": 1}, {"0": 1}, {"287": -100}, {"include_usage": True}),
    [{"role": "system", "content": "only"}],
    [{"role": "user", "content": "\ud800"}],
    [{"role": "tool", "content": []}],
    [{"role": "assistant", "content": None, "tool_calls": [1]}],
    [{"type": "function", "function": {"name": "f"}}],
)


@given(name=st.sampled_from(list(FIELDS)), value=st.sampled_from(VALUES), chat=st.booleans())
@settings(max_examples=80, deadline=None)
def test_no_parameter_ends_generation(served: Running, name: str, value: Any, chat: bool):
    body: dict[str, Any] = {"messages": MESSAGES} if chat else {"prompt": "hello"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = body | {"max_tokens": 3} | {name: value}
    assert served.status(body, path) in (200, 400)
    assert not [line for line in served.log if "failed" in line or "Error" in line]


BAD_PROMPTS: list[Any] = [
    *(None, "", 7, {}, [], [""], ["a", ""], [[]], [[1], []], [True], [1.0], [[1.0]], [["a"]]),
    *([1, "a"], [None], [-1], [288], [[1], [10**30]], ["a"] * 129),
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=lambda p: str(p)[:40])
def test_bad_prompts(served: Running, prompt: Any):
    status, _, answer = served.post({"prompt": prompt}, path="/v1/completions")
    assert status == 400
    assert "prompt" in answer["error"]["message"]


@pytest.mark.parametrize(
    "harmless",
    [
        {"temperature": None, "stop": None, "seed": None, "tools": None, "n": None},
        {"n": 1, "response_format": {"type": "text"}, "user": "me", "store": False},
        {"top_k": 10**6, "temperature": 1},
        {"xtc_probability": 1, "xtc_threshold": 0},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"seed": 1 << 80},
        {"stop": []},
        {"stop": ""},
        {"stop": ["", "\0"]},
        {"top_logprobs": 0},
    ],
    ids=str,
)
def test_harmless_parameters(served: Running, harmless: dict[str, Any]):
    endless = {"0": -100, "2": -100}
    body = {"messages": MESSAGES, "max_tokens": 3, "logit_bias": endless} | harmless
    status, _, answer = served.post(body)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 3


def test_after_all_that_it_still_serves(served: Running):
    assert served.chat(max_tokens=3).usage.completion_tokens == 3
    assert not [line for line in served.log if "failed" in line]
