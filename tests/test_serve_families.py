"""Tool calls as the models of each family write them, whole and while they are written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import make_text_state_machine

from outlier_mlx.serve.calls import CallReader, reads_calls
from outlier_mlx.serve.json_text import JsonObject
from outlier_mlx.serve.pieces import Piece, Splitter
from tests.scripted import PLAIN, Script
from tests.serving import MESSAGES, Running, running

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
    for name in ("warmth", "rain")
]
WARMTH, RAIN = ("warmth", {"city": 'L"yon{', "days": 2}), ("rain", {"city": "Nice"})


@dataclass(frozen=True)
class Family:
    """How the models of a family call functions.

    Attributes:
        line: what their chat templates have, by which the format is known.
        texts: the texts of the tokens of a reply.
        calls: the calls in it.
        special: which texts are special tokens.
        said: the text beside the calls.
        grows: whether arguments are sent while they are written.
    """

    line: str
    texts: tuple[str, ...]
    calls: tuple[tuple[str, dict[str, Any]], ...] = (WARMTH,)
    special: tuple[str, ...] = ()
    said: str = ""
    grows: bool = True


ARGUMENTS = ('{"city": "L\\"', 'yon{", "da', 'ys": 2', "}")
QWEN = "{% for tool_call in [] %}<tool_call>{{ tool_call.name }}</tool_call>{% endfor %}"
LLAMA = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and'
    " its value}."
)
MISTRAL = "{% if false %}[TOOL_CALLS]{% endif %}"
FAMILIES = {
    "Qwen2.5 and Qwen3": Family(
        QWEN,
        ("Let me", " see.\n", "<tool_call>", '\n{"name": "war', 'mth", "arguments": ', *ARGUMENTS)
        + ("}\n</tool_call>",),
        said="Let me see.\n",
    ),
    "Qwen2.5 and Qwen3, two calls": Family(
        QWEN,
        ("<tool_call>", '\n{"name": "warmth", "arguments": ', *ARGUMENTS, "}\n</tool_call>\n")
        + ('<tool_call>\n{"name": "rain", "arguments": {"city"', ': "Nice"}}\n', "</tool_call>"),
        (WARMTH, RAIN),
        said="\n",
    ),
    "Qwen3-Coder": Family(
        "{% if false %}<tool_call>\n<function=name>{% endif %}",
        ("<tool_call>", "\n<function=warmth>\n<parameter=city>\n", 'L"yon{', "\n</parameter>\n")
        + ("<parameter=days>\n2\n</parameter>\n", "</function>\n", "</tool_call>"),
        grows=False,
    ),
    "Llama 3": Family(LLAMA, ('{"', 'name": "warmth", "', 'parameters": ', *ARGUMENTS, "} ")),
    "Llama 3, two calls after its mark": Family(
        LLAMA,
        ("<|python_tag|>", '{"name": "warmth", "parameters": ', *ARGUMENTS, "}; ")
        + ('{"name": "rain", "parameters": {"city": "Nice"}}',),
        (WARMTH, RAIN),
        special=("<|python_tag|>",),
    ),
    "Mistral and Mixtral": Family(
        MISTRAL,
        ("[TOOL_CALLS]", ' [{"name": "warmth", "arguments": ', *ARGUMENTS, '}, {"name": "rain", "')
        + ('arguments": {"city": "Nice"}', "}]"),
        (WARMTH, RAIN),
        special=("[TOOL_CALLS]",),
    ),
    "Mistral, with ids": Family(
        MISTRAL,
        ("[TOOL_CALLS]", '[{"name": "warmth", "arguments": ', *ARGUMENTS, ', "id": "abcdefghi"}]'),
        special=("[TOOL_CALLS]",),
    ),
    "Mistral, from 2411 on": Family(
        MISTRAL,
        ("[TOOL_CALLS]", "warm", "th", "[ARGS]", *ARGUMENTS, "rain", '[ARGS]{"city": "Nice"}'),
        (WARMTH, RAIN),
        special=("[TOOL_CALLS]", "[ARGS]"),
    ),
    "Mistral, with call ids": Family(
        MISTRAL,
        ("[TOOL_CALLS]", "warmth", "[CALL_ID]", "abcdefghi", "[ARGS]", *ARGUMENTS),
        special=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ),
}


def script(folder: Path, family: Family) -> Script:
    """A model that writes the texts, known by its chat template."""
    tools = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    turns = (
        "{% for m in messages %}<|role|>{{ m.role }}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}{% endfor %}"
    )
    template = f"{tools}{family.line}{turns}<|start|>"
    return Script(folder, *family.texts, template=template, special=family.special, marks=())


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "max_tokens": 60, "tools": TOOLS} | fields


def named(calls: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


def streamed(server: Running, **fields: Any) -> tuple[list[list[str]], str, str]:
    """Name and parts of the arguments of each call; the text, and the finish reason."""
    calls: list[list[str]] = []
    text, events = "", [event["choices"][0] for event in server.stream(ask(**fields))]
    for delta in (event["delta"] for event in events):
        text += delta.get("content", "")
        for part in delta.get("tool_calls", []):
            function = part["function"]
            if "name" in function:
                assert (part["index"], part["type"]) == (len(calls), "function")
                calls.append([function["name"]])
            assert part["index"] == len(calls) - 1
            calls[-1].append(function["arguments"])
    return calls, text, events[-1]["finish_reason"]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_calls_of_a_family(tmp_path: Path, family: Family):
    with running(script(tmp_path / "model", family)) as server:
        [choice] = server.post(ask())[2]["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert named(choice["message"]["tool_calls"]) == list(family.calls)
        assert (choice["message"]["content"] or "") == family.said
        calls, text, reason = streamed(server)
        read = [(name, json.loads("".join(parts))) for name, *parts in calls]
        assert (read, text, reason) == (list(family.calls), family.said, "tool_calls")
        # The first call was written with several tokens, and is sent as it is written.
        assert (len([part for part in calls[0][1:] if part]) >= 3) is family.grows
        calls, _, reason = streamed(server, parallel_tool_calls=False)
        assert [name for name, *_ in calls] == [family.calls[0][0]]
        assert json.loads("".join(calls[0][1:])) == family.calls[0][1]
        assert reason == "tool_calls"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_however_a_call_is_divided(tmp_path: Path, family: Family):
    """Into letters as well: all that was written is sent, and no call that was not."""
    tokenizer = script(tmp_path / "model", family)()[1]
    assert reads_calls(tokenizer)
    text = "".join(family.texts)
    for streams in (False, True):
        for size in (1, 2, 3, 7, len(text)):
            reader = CallReader(tokenizer, TOOLS)
            machine = make_text_state_machine(tokenizer)
            splitter = Splitter(machine, "normal", reader, reads=True, streams=streams)
            whole = Piece()
            for at in range(0, len(text), size):
                whole.add(splitter.feed(text[at : at + size]))
            whole.add(splitter.end(cut=False))
            read = [(call.name, json.loads(call.arguments)) for call in whole.calls]
            assert (read, whole.text) == (list(family.calls), family.said)
            assert not whole.arguments
            assert not splitter.writing


def test_a_stream_that_is_cut(tmp_path: Path):
    """What was sent of the arguments is the beginning of an object."""
    family = FAMILIES["Qwen2.5 and Qwen3"]
    with running(script(tmp_path / "model", family)) as server:
        for cut in range(1, 9):
            calls, text, reason = streamed(server, max_tokens=cut)
            assert reason == "length"
            sent = "".join(part for call in calls for part in call[1:])
            assert "".join(ARGUMENTS).startswith(sent)
            assert (sent != "") is (cut > 5)
            assert "".join(family.texts).startswith(text)


@pytest.mark.parametrize(
    "text", ["Sure.", " {", '{"name": "other", "parameters": {}} and so on', "", "<|python", "[1]"]
)
def test_other_replies_of_llama_are_text(tmp_path: Path, text: str):
    tokenizer = script(tmp_path / "model", FAMILIES["Llama 3"])()[1]
    for streams in (False, True):
        reader = CallReader(tokenizer, TOOLS)
        machine = make_text_state_machine(tokenizer)
        splitter = Splitter(machine, "normal", reader, reads=True, streams=streams)
        whole = Piece()
        for letter in text:
            whole.add(splitter.feed(letter))
        whole.add(splitter.end(cut=False))
        assert (whole.text, whole.calls) == (text, [])


def test_a_template_without_calls_has_no_format(tmp_path: Path):
    assert not reads_calls(Script(tmp_path / "model", "Sure", template=PLAIN)()[1])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(
    value=st.dictionaries(st.text(), VALUES, max_size=4),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    size=st.integers(1, 9),
)
def test_any_object_is_followed_to_its_end(
    value: dict[str, Any], ascii_only: bool, indent: int | None, size: int
):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    follower = JsonObject()
    known = ""
    more = text + '} and "so" on'
    for at in range(0, len(more), size):
        if not follower.ended:
            known += follower.feed(more[at : at + size])
    assert known == text
    assert follower.ended
    assert not follower.failed
    assert more[len(text) :].startswith(follower.rest)


def finite(number: str) -> float:
    """The number, which may not be too large: Python's JSON makes infinity of it."""
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number} is too large")
    return value


@settings(max_examples=60, deadline=None)
@given(
    value=st.dictionaries(st.text(), VALUES, max_size=4),
    place=st.integers(0, 200),
    wrong=st.sampled_from([*'{}[],:"\\\n', "x", "-", "0", "", "\\u12"]),
)
@example({"x": 1.5e308}, 7, "")
def test_what_is_known_is_always_the_beginning_of_an_object(
    value: dict[str, Any], place: int, wrong: str
):
    """Whatever is changed in a text: what ends is JSON for Python as well."""
    text = json.dumps(value)
    place %= len(text)
    changed = text[:place] + wrong + text[place + 1 :]
    follower = JsonObject()
    known = follower.feed(changed)
    assert changed.startswith(known)
    try:
        _, end = json.JSONDecoder(parse_float=finite).raw_decode(changed)
    except ValueError:
        assert not follower.ended
        return
    if changed.startswith("{"):
        assert follower.ended
        assert known == changed[:end]


@pytest.mark.parametrize(
    "text", ['{"x": NaN}', '{"x": 1e999}', '{"x": 01}', "{'x': 1}", '{"x": 1,}', '{"x" 1}', "[1]"]
)
def test_what_is_no_json_fails(text: str):
    follower = JsonObject()
    known = follower.feed(text)
    assert follower.failed
    assert text.startswith(known)


def test_depth_is_bounded():
    follower = JsonObject()
    follower.feed('{"x": ' + "[" * 100_000)
    assert follower.failed
