"""Bodies as large as the server allows: the work for each grows with its size, not faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis import anthropic_request
from outlier_mlx.serve.apis.items import Conversation
from outlier_mlx.serve.messages import MAX_NAME, MAX_TOOLS
from outlier_mlx.serve.structured import tool_choice
from tests.scripted import Script
from tests.serving import MESSAGES, Running, running

USER = {"role": "user", "content": "x"}
# It took several times as long when the work grew with the square.
SECONDS = 1.5


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(Script(tmp_path_factory.mktemp("model") / "scripted", "Sure")) as server:
        yield server


def took(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of this thread alone, and the result."""
    begun = time.thread_time()
    result = work()
    return time.thread_time() - begun, result


def tools(path: str, count: int, name: str = "f") -> dict[str, Any]:
    """A body with so many tools."""
    named = [{"name": f"{name}{number}"} for number in range(count)]
    if path.startswith("/v1/messages"):
        own = [one | {"input_schema": {"type": "object"}} for one in named]
        return {"messages": [USER], "max_tokens": 1, "tools": own}
    if path.startswith("/v1/responses"):
        return {"input": "x", "tools": [one | {"type": "function"} for one in named]}
    return {"messages": [USER], "tools": [{"type": "function", "function": one} for one in named]}


PATHS: tuple[str, ...] = (
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/responses/input_tokens",
    "/v1/messages",
)
PATHS += ("/v1/messages/count_tokens",)


@pytest.mark.parametrize("path", PATHS)
def test_tools_are_bounded(served: Running, path: str) -> None:
    for count in (MAX_TOOLS + 1, 30_000):
        status, _, answer = served.post(tools(path, count), path)
        assert status == 400
        expected = f"tools are {count}; at most {MAX_TOOLS} are supported"
        assert answer["error"]["message"] == expected
    status, _, answer = served.post(tools(path, 1, "f" * MAX_NAME), path)
    assert status == 400 and f"of up to {MAX_NAME} characters" in answer["error"]["message"]
    assert served.post(tools(path, MAX_TOOLS), path)[0] == 200


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_as_many_tools_as_there_can_be_have_a_form(served: Running, choice: str) -> None:
    body = tools("/v1/chat/completions", MAX_TOOLS)
    for tool in body["tools"]:
        tool["function"]["strict"] = True
    begun = time.monotonic()
    status, _, answer = served.post(body | {"tool_choice": choice, "max_tokens": 2})
    assert status == 200 or "tool" in answer["error"]["message"]
    assert time.monotonic() - begun < 20


def test_many_allowed_tools() -> None:
    known = tools("/v1/chat/completions", MAX_TOOLS)["tools"]
    last = {"name": f"f{MAX_TOOLS - 1}"}
    choice = {"type": "allowed_tools", "tools": [last] * 60_000}
    seconds, chosen = took(lambda: tool_choice(choice, known))
    assert seconds < SECONDS
    assert chosen.tools == known[-1:]
    wrongs: list[Any] = [{"name": "none"}, {"name": []}, {"name": {}}, [], None, {}]
    for wrong in wrongs:
        with pytest.raises(Refused, match="is no function in tools"):
            tool_choice({"type": "allowed_tools", "tools": [wrong]}, known)


def test_many_system_messages() -> None:
    conversation = Conversation()
    for number in range(100_000):
        conversation.add({"role": "developer", "content": str(number)}, f"input[{number}]")
    conversation.add(USER, "input[100000]")
    seconds, _ = took(conversation.join_instructions)
    assert seconds < SECONDS
    assert [message["role"] for message in conversation.messages] == ["developer", "user"]
    joined = "\n\n".join(map(str, range(100_000)))
    assert conversation.messages[0]["content"] == joined
    assert conversation.places == ["input[0]", "input[100000]"]


BLOCKS: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": "a" * 30},
    "tool_use": {"type": "tool_use", "id": "1", "name": "f", "input": {}},
    "thinking": {"type": "thinking", "thinking": "b" * 30, "signature": ""},
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_many_blocks_of_one_message(kind: str) -> None:
    count = 60_000
    message = {"role": "assistant", "content": [BLOCKS[kind]] * count}
    conversation = anthropic_request._Conversation(anthropic_request._Reader())
    seconds, _ = took(lambda: conversation.add_all([USER, message, USER]))
    assert seconds < SECONDS
    made = conversation.messages[1]
    if kind == "tool_use":
        assert len(made["tool_calls"]) == count
    else:
        text = made["content" if kind == "text" else "reasoning_content"]
        assert text == "\n".join(["ab"[kind == "thinking"] * 30] * count)


def test_empty_texts_at_the_beginning_are_left_out(served: Running) -> None:
    texts = [{"type": "text", "text": text} for text in ("", "", "a", "", "b")]
    body = {"messages": [{"role": "user", "content": texts}], "max_tokens": 1}
    api = served.server.generator.provider.service.apis["/v1/messages"]
    (request,) = api.requests(body, served.server.generator.provider.limits)
    assert request.messages == [{"role": "user", "content": "a\n\nb"}]


def test_variables_of_the_template_are_bounded(served: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1}
    many = {f"name{number}": 1 for number in range(100_000)}
    status, _, answer = served.post(body | {"chat_template_kwargs": many})
    assert status == 400 and "at most 64 variables" in answer["error"]["message"]
    probes = served.server.generator.provider.limits.reader.probes
    seconds, found = took(lambda: probes.mentions("a[" * 1_500_000))
    assert seconds < 0.2 and not found
