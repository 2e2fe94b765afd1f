"""Agents that call functions and go on with the results: `openai-agents`, and plain loops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import agents
import anthropic
import openai
import pytest

from tests.scripted import RESULT, START, TOOLS, Written
from tests.serving import NAME, Running, ServeScript, running

pytestmark = pytest.mark.slow

AGAIN = "<|again|>"
#: The second result is followed by the last reply.
TEMPLATE = TOOLS.replace(
    "<|start|>",
    "{% set results = messages | selectattr('role', 'equalto', 'tool') | list | length %}"
    f"{{% if results >= 2 %}}{AGAIN}{{% elif results %}}{RESULT}{{% else %}}<|start|>{{% endif %}}",
)
# Besides the marks of reasoning, a call in several tokens; then one in a single token.
FIRST = (
    *("<think>", "Two cities", "</think>", "<tool_call>", '{"name": "warmth", '),
    *('"arguments": {"city"', ': "Lyon"}}', "</tool_call>"),
)
SECOND = ('<tool_call>{"name": "difference", "arguments": {"a": 21, "b": 4}}\n</tool_call>',)
LAST = ("It is 17 degrees", " warmer in Lyon.")
ANSWER = "".join(LAST)
ASKED = "How much warmer than in Oslo, where it has 4 degrees, is it in Lyon?"


@pytest.fixture(scope="module")
def served(serve_script: ServeScript) -> Running:
    return serve_script(*FIRST, template=TEMPLATE, then=SECOND, after={AGAIN: LAST})


class Functions:
    """The functions of the agent, which keep what they were called with."""

    def __init__(self) -> None:
        self.called: list[tuple[str, dict[str, Any]]] = []

    def warmth(self, city: str) -> str:
        """How warm it is in a city."""
        self.called.append(("warmth", {"city": city}))
        return json.dumps({"degrees": 21})

    def difference(self, a: int, b: int) -> str:
        """The difference of two numbers."""
        self.called.append(("difference", {"a": a, "b": b}))
        return str(a - b)


CALLED = [("warmth", {"city": "Lyon"}), ("difference", {"a": 21, "b": 4})]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same calls, written with ordinary tokens, as a grammar can hold a model to them."""
    first, last = "".join(FIRST[3:]), "".join(LAST)
    replies = {START: first, RESULT: "".join(SECOND), AGAIN: last}
    folder = tmp_path_factory.mktemp("written") / "model"
    with running(Written(folder, TEMPLATE, replies)) as server:
        yield server


@pytest.mark.parametrize("strict", [False, True], ids=["free", "strict"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "kind",
    [agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel],
    ids=["chat", "responses"],
)
def test_an_agent_of_openai(
    served: Running, ordinary: Running, kind: Any, streams: bool, strict: bool
):
    """It calls two functions, one after the result of the other, and finishes.

    Functions of `agents` are strict unless it is told otherwise.
    """
    how: Any = {} if strict else {"strict_mode": False}
    served = ordinary if strict else served
    functions = Functions()

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=served.server.url, api_key="any") as client:
            agent = agents.Agent(
                name="Thermometer",
                instructions="Answer with the help of the functions.",
                model=kind(model=NAME, openai_client=client),
                tools=[
                    agents.function_tool(functions.warmth, **how),
                    agents.function_tool(functions.difference, **how),
                ],
            )
            config = agents.RunConfig(tracing_disabled=True)
            if not streams:
                return await agents.Runner.run(agent, ASKED, max_turns=4, run_config=config)
            result = agents.Runner.run_streamed(agent, ASKED, max_turns=4, run_config=config)
            async for _ in result.stream_events():
                pass
            return result

    result = asyncio.run(run())
    assert result.final_output == ANSWER
    assert functions.called == CALLED
    kinds = [type(item).__name__ for item in result.new_items]
    calls = ["ToolCallItem", "ToolCallOutputItem"] * 2
    assert [kind for kind in kinds if kind != "ReasoningItem"] == [*calls, "MessageOutputItem"]


def test_a_loop_with_anthropic(served: Running):
    """The client's own loop runs the functions until the message ends without a call."""
    functions = Functions()
    url = served.server.url.removesuffix("/v1")
    client = anthropic.Anthropic(base_url=url, api_key="any", max_retries=0)
    runner = client.beta.messages.tool_runner(
        model=NAME,
        max_tokens=100,
        messages=[{"role": "user", "content": ASKED}],
        tools=[anthropic.beta_tool(functions.warmth), anthropic.beta_tool(functions.difference)],
    )
    reasons = [message.stop_reason for message in runner]
    assert reasons == ["tool_use", "tool_use", "end_turn"]
    assert functions.called == CALLED


def test_a_loop_over_a_stream(served: Running):
    """A plain loop: it joins the parts of calls, and sends reasoning back as it came."""
    functions, messages = Functions(), [{"role": "user", "content": ASKED}]
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
        for name in ("warmth", "difference")
    ]
    for _ in range(4):
        turn: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": ""}
        for chunk in served.chat(messages=messages, tools=tools, max_tokens=100, stream=True):
            delta = chunk.choices[0].delta
            turn["content"] += delta.content or ""
            turn["reasoning_content"] += getattr(delta, "reasoning_content", "")
            for part in delta.tool_calls or []:
                calls = turn.setdefault("tool_calls", [])
                if part.id:
                    calls.append(part.model_dump(exclude={"index"}))
                else:
                    calls[part.index]["function"]["arguments"] += part.function.arguments
        messages.append(turn)
        if "tool_calls" not in turn:
            break
        for call in turn["tool_calls"]:
            function = call["function"]
            made = getattr(functions, function["name"])(**json.loads(function["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": made})
    assert messages[-1]["content"] == ANSWER
    assert functions.called == CALLED
    assert messages[1]["reasoning_content"] == "Two cities"
