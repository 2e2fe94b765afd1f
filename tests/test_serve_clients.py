"""Programs that people use, as they are, with this server: openai, litellm and llm."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from tests.pages import blocks_in
from tests.scripted import RESULT, TOOLS
from tests.serving import Running, ServeScript

pytestmark = pytest.mark.slow

KEY = "sesame"
KEYED = {"api_key_name": "tiny"}
WRITTEN = ("Let me see.", "<tool_call>", '{"name": "add", "arguments": {"a": 2}}', "</tool_call>")
THEN = ("The sum", " is", " 42.")
#: After the result of a tool, the model answers.
TEMPLATE = TOOLS.replace(
    "<|start|>", f"{{% if messages[-1].role == 'tool' %}}{RESULT}{{% else %}}<|start|>{{% endif %}}"
)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION: Any = {"name": "add", "description": "Adds to 40", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}
UNIT = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
STRICT: Any = {
    "type": "function",
    "function": {"name": "unit_of", "parameters": UNIT, "strict": True},
}
USER: Any = {"role": "user", "content": "What is 40 and 2?"}


@pytest.fixture(scope="module")
def server(serve_script: ServeScript) -> Running:
    """A model that calls a function, and answers once it has the result."""
    return serve_script(*WRITTEN, template=TEMPLATE, then=THEN, api_key=KEY)


@pytest.fixture(scope="module")
def plain(serve_script: ServeScript) -> Running:
    return serve_script("Over", " there", ".", api_key=KEY)


@pytest.fixture(scope="module")
def structured(serve_script: ServeScript) -> Running:
    """A model that says in words what it is asked for, unless it is held to a form."""
    return serve_script("It", " is", " warm", ".", api_key=KEY)


class Weather(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="forbid")

    sky: Literal["clear", "cloudy"]
    warm: bool


def result(call: Any) -> str:
    """What the function that was called returns."""
    assert call.name == "add"
    return str(40 + json.loads(call.arguments)["a"])


# openai


def test_openai_chat(server: Running):
    create: Callable[..., Any] = server.client.chat.completions.create
    first = create(model="tiny", messages=[USER], tools=[TOOL]).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    answer = {"role": "tool", "tool_call_id": call.id, "content": result(call.function)}
    messages = [USER, first.message, answer]
    second = create(model="tiny", messages=messages, tools=[TOOL])
    assert second.choices[0].message.content == "The sum is 42."
    chunks = list(create(model="tiny", messages=messages, tools=[TOOL], stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "The sum is 42."


def test_openai_chat_with_its_helper_for_streams(server: Running):
    stream: Callable[..., Any] = server.client.chat.completions.stream
    with stream(model="tiny", messages=[USER], tools=[TOOL]) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert final.content == "Let me see."
    assert result(final.tool_calls[0].function) == "42"


def test_openai_responses(server: Running):
    create: Callable[..., Any] = server.client.responses.create
    flat = {"type": "function", "strict": False} | FUNCTION
    first = create(model="tiny", input="What is 40 and 2?", tools=[flat])
    assert first.output_text == "Let me see."
    call = first.output[-1]
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": result(call)}
    second = create(model="tiny", input=[answer], previous_response_id=first.id, tools=[flat])
    assert second.output_text == "The sum is 42."
    # Without anything kept, with the items that came.
    items = [USER, *(item.to_dict() for item in first.output), answer]
    third = create(model="tiny", input=items, tools=[flat], store=False)
    assert third.output_text == "The sum is 42."
    assert third.usage.input_tokens == second.usage.input_tokens
    assert third.usage.input_tokens_details.cached_tokens > 0


def test_openai_responses_with_its_helper_for_streams(server: Running):
    stream: Callable[..., Any] = server.client.responses.stream
    flat = {"type": "function", "strict": False} | FUNCTION
    with stream(model="tiny", input="What is 40 and 2?", tools=[flat]) as events:
        kinds = [event.type for event in events]
        final = events.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == "Let me see."
    assert result(final.output[-1]) == "42"


def test_openai_forms(structured: Running):
    chat: Callable[..., Any] = structured.client.chat.completions.parse
    parsed = chat(model="tiny", messages=[USER], response_format=Weather)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    responses: Callable[..., Any] = structured.client.responses.parse
    assert isinstance(
        responses(model="tiny", input="x", text_format=Weather).output_parsed, Weather
    )
    stream: Callable[..., Any] = structured.client.responses.stream
    with stream(model="tiny", input="x", text_format=Weather) as events:
        assert isinstance(events.get_final_response().output_parsed, Weather)


def test_openai_forced_calls(structured: Running):
    create: Callable[..., Any] = structured.client.chat.completions.create
    forced = create(model="tiny", messages=[USER], tools=[STRICT], tool_choice="required")
    (call,) = forced.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"unit"}
    flat = {"type": "function"} | STRICT["function"]
    named = {"type": "function", "name": "unit_of"}
    respond: Callable[..., Any] = structured.client.responses.create
    (item,) = respond(model="tiny", input="x", tools=[flat], tool_choice=named).output
    assert (item.type, item.name) == ("function_call", "unit_of")
    assert json.loads(item.arguments)["unit"] in ("C", "F")


def test_openai_async(plain: Running):
    async def ask() -> list[Any]:
        client = openai.AsyncOpenAI(base_url=plain.server.url, api_key=KEY, max_retries=0)
        async with client:
            chat = client.chat.completions.create(model="tiny", messages=[USER])
            response = client.responses.create(model="tiny", input="x")
            stream = await client.responses.create(model="tiny", input="x", stream=True)
            events = [event async for event in stream]
            return [*await asyncio.gather(chat, response), events]

    chat, response, events = asyncio.run(ask())
    assert chat.choices[0].message.content == response.output_text == "Over there."
    assert events[-1].response.output_text == "Over there."


# litellm


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    """The module, which would ask the internet for prices when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        import litellm

        patch.setattr(litellm, "suppress_debug_info", True)
        yield litellm


def where(server: Running) -> dict[str, Any]:
    return {"model": "openai/tiny", "api_base": server.server.url, "api_key": KEY, "max_retries": 0}


def test_litellm_chat(server: Running, litellm: Any):
    first = litellm.completion(messages=[USER], tools=[TOOL], **where(server)).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    answer = {"role": "tool", "tool_call_id": call.id, "content": result(call.function)}
    messages = [USER, first.message, answer]
    second = litellm.completion(messages=messages, tools=[TOOL], **where(server))
    assert second.choices[0].message.content == "The sum is 42."
    chunks = list(litellm.completion(messages=[USER], tools=[TOOL], stream=True, **where(server)))
    built = litellm.stream_chunk_builder(chunks).choices[0].message
    assert built.content == "Let me see."
    assert result(built.tool_calls[0].function) == "42"


# litellm counts the tokens in its own way, and then warns of it.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_litellm_responses(server: Running, litellm: Any):
    flat = {"type": "function"} | FUNCTION
    first = litellm.responses(input="What is 40 and 2?", tools=[flat], **where(server))
    call = first.output[-1]
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": result(call)}
    more: dict[str, Any] = {"previous_response_id": first.id, "tools": [flat]}
    events = list(litellm.responses(input=[answer], stream=True, **more, **where(server)))
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == "The sum is 42."
    assert events[-1].response.output[0].content[0].text == "The sum is 42."


def test_litellm_forms_and_forced_calls(structured: Running, litellm: Any):
    formed = litellm.completion(messages=[USER], response_format=Weather, **where(structured))
    Weather.model_validate_json(formed.choices[0].message.content)
    forced: dict[str, Any] = {"tools": [STRICT], "tool_choice": "required"}
    (call,) = (
        litellm.completion(messages=[USER], **forced, **where(structured))
        .choices[0]
        .message.tool_calls
    )
    assert json.loads(call.function.arguments)["unit"] in ("C", "F")


def test_litellm_s_errors(plain: Running, litellm: Any):
    with pytest.raises(litellm.BadRequestError, match="temperature must be a number from 0"):
        litellm.completion(messages=[USER], temperature=-1, **where(plain))
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=[USER], **where(plain) | {"api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError, match="does not support /v1/embeddings"):
        litellm.embedding(input=["x"], **where(plain))


# llm


@pytest.fixture(scope="module")
def llm(
    server: Running,
    plain: Running,
    structured: Running,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., str]]:
    """Runs llm's program with an entry for each server and API; returns what it prints."""
    from click.testing import CliRunner
    from llm.cli import cli

    folder = tmp_path_factory.mktemp("llm")
    # As the page has it, apart from the address.
    (entry,) = yaml.safe_load(blocks_in("yaml", "docs/apis.md")[0])
    servers = {"calling": server, "plain": plain, "structured": structured}
    entries = [
        entry | {"model_id": f"{name}{api}", "api_base": serves.server.url} | KEYED | responses
        for name, serves in servers.items()
        for api, responses in (("", {}), ("-responses", {"responses": True}))
    ]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(entries))  # JSON is YAML
    (folder / "keys.json").write_text(json.dumps({"tiny": KEY}))

    def run(*arguments: str, stdin: str = "") -> str:
        done = CliRunner().invoke(cli, arguments, input=stdin, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output.strip()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_USER_PATH", str(folder))
        yield run


@pytest.mark.parametrize("model", ["plain", "plain-responses"])
def test_llm(llm: Callable[..., str], model: str):
    assert llm("-m", model, "Where is Vega?") == "Over there."
    assert llm("-m", model, "Where is Vega?", "--no-stream", "-s", "Be kind") == "Over there."
    assert llm("-c", "And Deneb?") == "Over there."
    (logged,) = json.loads(llm("logs", "list", "-n", "1", "--json"))
    assert logged["prompt"] == "And Deneb?"
    assert logged["input_tokens"] > 40  # with what was said before
    chat = llm("chat", "-m", model, stdin="Hi\nAgain\nexit\n")
    assert chat.count("Over there.") == 2


@pytest.mark.parametrize("model", ["calling", "calling-responses"])
@pytest.mark.parametrize("stream", [(), ("--no-stream",)])
def test_llm_with_a_tool(llm: Callable[..., str], model: str, stream: tuple[str, ...]):
    function = "def add(a: int) -> str:\n    return str(40 + a)\n"
    printed = llm("-m", model, "What is 40 and 2?", "--functions", function, *stream)
    assert printed.endswith("The sum is 42.")
    (*_, logged) = json.loads(llm("logs", "list", "-n", "2", "--json"))
    assert "42" in json.dumps(logged)


@pytest.mark.parametrize("model", ["structured", "structured-responses"])
def test_llm_with_a_schema(llm: Callable[..., str], model: str):
    schema = json.dumps(Weather.model_json_schema())
    for stream in ((), ("--no-stream",)):
        Weather.model_validate_json(llm("-m", model, "How is it?", "--schema", schema, *stream))
