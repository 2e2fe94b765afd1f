"""Tool calls: read where they can be read, and text where they cannot; nothing vanishes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.generate import make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from outlier_mlx.serve.calls import Call, CallReader
from outlier_mlx.serve.pieces import Piece, Splitter
from tests.scripted import Script
from tests.serving import MESSAGES, Running, running

FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
ASK: dict[str, Any] = {
    "messages": MESSAGES,
    "max_tokens": 20,
    "tools": [{"type": "function", "function": FUNCTION}],
}
OPEN, CLOSE = "<tool_call>", "</tool_call>"

CALLS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "a call": ('\n{"name": "f", "arguments": {"x": "\\n"}}\n', [("f", {"x": "\n"})]),
    "no arguments": ('{"name": "f"}', [("f", {})]),
    "null arguments": ('{"name": "f", "arguments": null}', [("f", {})]),
    "empty arguments": ('{"name": "f", "arguments": ""}', [("f", {})]),
    "arguments as a string": ('{"name": "f", "arguments": "{\\"x\\": 1}"}', [("f", {"x": 1})]),
    "parameters": ('{"name": "f", "parameters": {"x": 1}}', [("f", {"x": 1})]),
    "a list": ('[{"name": "f", "arguments": {}}, {"name": "g"}]', [("f", {}), ("g", {})]),
    "two objects": (
        '{"name": "f"}\n{"name": "g", "arguments": {"x": 2}}',
        [("f", {}), ("g", {"x": 2})],
    ),
}
TEXTS = {
    "cut off": '{"name": "f", "arguments": {"x": ',
    "no JSON": "f\n<arg_key>x</arg_key><arg_value>1</arg_value>",
    "a string": '"f"',
    "null": "null",
    "a number": "7",
    "an empty list": "[]",
    "no name": '{"arguments": {}}',
    "a name that is a number": '{"name": 7}',
    "a sentence for a name": '{"name": "look at this"}',
    "arguments that are a list": '{"name": "f", "arguments": [1]}',
    "arguments that are no JSON": '{"name": "f", "arguments": "x=1"}',
    "a number that JSON has not": '{"name": "f", "arguments": {"x": NaN}}',
    "a number that is too large": '{"name": "f", "arguments": {"x": 1e999}}',
    "a call and words": '{"name": "f"} and so on',
    "one of two": '{"name": "f"}\n{"name": 7}',
    "deep": '{"name": "f", "arguments": {"x": ' + "[" * 20_000 + "}}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    return Script(tmp_path_factory.mktemp("calls") / "model")()[1]


def split(tokenizer: TokenizerWrapper, *texts: str, cut: bool = False, reads: bool = True) -> Piece:
    """What becomes of the texts of some tokens."""
    reader = CallReader(tokenizer, ASK["tools"])
    splitter = Splitter(make_text_state_machine(tokenizer), "normal", reader, reads=reads)
    whole = Piece()
    for text in texts:
        whole.add(splitter.feed(text))
    whole.add(splitter.end(cut=cut))
    return whole


def named(calls: list[Call]) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(("block", "calls"), CALLS.values(), ids=list(CALLS))
def test_calls(tokenizer: TokenizerWrapper, block: str, calls: list[Any]) -> None:
    piece = split(tokenizer, "Sure", OPEN, block, CLOSE)
    assert (piece.text, named(piece.calls)) == ("Sure", calls)
    assert len({call.id for call in piece.calls}) == len(calls)


@pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut"])
@pytest.mark.parametrize("block", TEXTS.values(), ids=list(TEXTS))
def test_what_cannot_be_read_as_a_call_is_text(
    tokenizer: TokenizerWrapper, block: str, cut: bool
) -> None:
    """However the text is divided into tokens, and also if the reply ends before the call does."""
    for texts in (("Sure", OPEN, block), tuple(f"Sure{OPEN}{block[:99]}"), ("", block[:-1])):
        text = "".join(texts)
        whole = split(tokenizer, *texts, CLOSE, "!", cut=cut)
        assert (whole.text, whole.calls) == (f"{text}{CLOSE}!", [])
        whole = split(tokenizer, *texts, cut=cut)
        assert (whole.text, whole.calls) == (text, [])


@pytest.mark.parametrize("end", ["<", "<tool", "<tool_call", "x</tool_call>"])
def test_what_looks_like_a_mark_is_not_lost(tokenizer: TokenizerWrapper, end: str) -> None:
    assert split(tokenizer, "a ", end).text == f"a {end}"


def test_a_call_without_an_end(tokenizer: TokenizerWrapper) -> None:
    """JSON says itself where it ends, whether the model stopped or was stopped."""
    for cut in (False, True):
        piece = split(tokenizer, OPEN, '{"name": "f"}', cut=cut)
        assert (piece.text, named(piece.calls)) == ("", [("f", {})])


def test_calls_that_nobody_asked_for_are_text(tokenizer: TokenizerWrapper) -> None:
    """And come at once, not when the call ends."""
    reader = CallReader(tokenizer, [])
    splitter = Splitter(make_text_state_machine(tokenizer), "normal", reader, reads=False)
    texts = ["a", OPEN, '{"name":', '"f"}', CLOSE, "b"]
    assert [splitter.feed(text).text for text in texts] == texts
    assert not splitter.end(cut=False)


GLM = "{% for tool in tools or [] %}{{ tool | tojson }}<arg_key>{% endfor %}"
OTHER_FORMATS = {
    "GLM's": (
        GLM,
        ("<tool_call>", "f\n<arg_key>x</arg_key><arg_value>1</arg_value>", "</tool_call>"),
        [("f", {"x": "1"})],
    ),
    "a guess about words": (GLM, ("<tool_call>", "I call f", "</tool_call>"), []),
    "a word": (GLM, ("<tool_call>", "Sorry", "</tool_call>"), []),
    "cut off": (GLM, ("<tool_call>", "f\n<arg_key>x</arg_key><arg_value>1"), []),
    "Mistral's": (
        "{# [TOOL_CALLS] #}",
        ("[TOOL_CALLS]", 'f[ARGS]{"x": 1}g[ARGS]{}'),
        [("f", {"x": 1}), ("g", {})],
    ),
    "Mistral's, cut off": ("{# [TOOL_CALLS] #}", ("[TOOL_CALLS]", 'f[ARGS]{"x": 1'), []),
    "Python's": (
        "{# <|tool_call_start|> #}",
        ("<|tool_call_start|>", "[f(x='1'), g()]", "<|tool_call_end|>"),
        [("f", {"x": "1"}), ("g", {})],
    ),
    "Python's, with a bytes object": (
        "{# <|tool_call_start|> #}",
        ("<|tool_call_start|>", "[f(x=b'1')]", "<|tool_call_end|>"),
        [],
    ),
}


@pytest.mark.parametrize("case", OTHER_FORMATS.values(), ids=list(OTHER_FORMATS))
def test_other_formats(tmp_path: Path, case: tuple[str, tuple[str, ...], list[Any]]) -> None:
    template, texts, calls = case
    tokenizer = Script(tmp_path / "model", template=template)()[1]
    piece = split(tokenizer, *texts, cut=len(texts) == 2)
    assert named(piece.calls) == calls
    assert piece.text == ("" if calls else "".join(texts))


def answers(server: Running, body: dict[str, Any]) -> list[tuple[str, str, list[Any]]]:
    """Finish reason, text and calls of the whole answer, and of the stream of the same."""
    _, _, whole = server.post(body)
    [choice] = whole["choices"]
    events = [event["choices"][0] for event in server.stream(body)]
    deltas = [event["delta"] for event in events]
    streamed = joined(deltas)
    assert not any(event["finish_reason"] for event in events[:-1])
    text = "".join(delta.get("content", "") for delta in deltas)
    return [
        (choice["finish_reason"], choice["message"]["content"] or "", told(choice["message"])),
        (events[-1]["finish_reason"], text, told({"tool_calls": streamed})),
    ]


def joined(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls in a stream, of which the first part has the name, and others more arguments."""
    calls: list[dict[str, Any]] = []
    for part in (part for delta in deltas for part in delta.get("tool_calls", [])):
        if "id" in part:
            assert part["index"] == len(calls)
            calls.append(part)
            continue
        assert part["index"] == len(calls) - 1
        assert set(part["function"]) == {"arguments"}
        calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    return calls


def told(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of calls."""
    calls = message.get("tool_calls", [])
    assert all(call["type"] == "function" and call["id"] for call in calls)
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


def test_answers_with_calls(tmp_path: Path) -> None:
    two = '{"name": "f"}\n{"name": "f", "arguments": {"x": 2}}'
    reply = ("Sure", OPEN, two, CLOSE, "Bye")
    calls = [("f", {}), ("f", {"x": 2})]
    text = "".join(reply)
    with running(Script(tmp_path / "model", *reply)) as server:
        assert answers(server, ASK) == [("tool_calls", "SureBye", calls)] * 2
        assert answers(server, ASK | {"seed": 1}) == [("tool_calls", "SureBye", calls)] * 2
        # The first call ends the reply.
        one = ASK | {"parallel_tool_calls": False}
        assert answers(server, one) == [("tool_calls", "Sure", calls[:1])] * 2
        # Nobody asked for calls.
        for body in (ASK | {"tool_choice": "none"}, {"messages": MESSAGES, "max_tokens": 20}):
            assert answers(server, body) == [("stop", text, [])] * 2
        assert answers(server, ASK | {"max_tokens": 2}) == [("length", f"Sure{OPEN}", [])] * 2
        # Plain text has no calls.
        body = {"prompt": "<|start|>", "max_tokens": 20}
        [choice] = server.post(body, "/v1/completions")[2]["choices"]
        assert (choice["finish_reason"], choice["text"]) == ("stop", text)
        assert answers(server, ASK | {"stop": "Bye"}) == [("tool_calls", "Sure", calls)] * 2


def test_answers_with_broken_calls(tmp_path: Path) -> None:
    reply = ("Sure", OPEN, '{"name": "f", "arguments": {"x": ', CLOSE)
    with running(Script(tmp_path / "model", *reply)) as server:
        [choice] = server.post(ASK)[2]["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "".join(reply))
        assert "tool_calls" not in choice["message"]
        # In a stream, the name had been sent before it was clear that the call is broken.
        events = [event["choices"][0] for event in server.stream(ASK)]
        [call] = joined([event["delta"] for event in events])
        assert call["function"] == {"name": "f", "arguments": '{"x": '}
        assert events[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_call_that_is_cut_is_whole_or_text(tmp_path: Path, path: str) -> None:
    """By the largest number of tokens, at each place, and by a stop word in the arguments."""
    reply = (OPEN, '{"name": "f", "argu', 'ments": ', '{"x": ', '"a', 'b"', "}", " }", CLOSE, "Bye")
    schema = {"type": "object"}
    body: dict[str, Any] = {"tools": [{"name": "f", "input_schema": schema}], "messages": MESSAGES}
    length, stop = "max_tokens", "stop_sequences"
    if path == "/v1/responses":
        tools = [{"type": "function", "name": "f", "parameters": schema}]
        body, length, stop = {"input": "x", "tools": tools}, "max_output_tokens", "stop"
    with running(Script(tmp_path / "model", *reply)) as server:
        cuts: list[dict[str, Any]] = [{length: count} for count in range(1, 12)]
        cuts += [{length: 20, stop: [word]} for word in ("argu", '"x', "b", "}", "Bye")]
        called = 0
        for cut in cuts:
            status, _, answer = server.post(body | cut, path)
            assert status == 200, cut
            for block in answer.get("content", answer.get("output")):
                if block["type"] in ("tool_use", "function_call"):
                    called += 1
                    given = block.get("input") or json.loads(block["arguments"])
                    assert given == {"x": "ab"}
        assert called
