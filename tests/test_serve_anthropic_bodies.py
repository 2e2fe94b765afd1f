"""Bodies of requests to Anthropic's API: what is refused, has no effect, and means the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.scripted import PLAIN, Script
from tests.serving import Running, ServeScript, running
from tests.test_serve_anthropic import KEY, PATH, TOOL, USER, WORDS, body, refusal, tokens


@pytest.fixture(scope="module")
def keyed(serve_script: ServeScript) -> Running:
    """Says three words, to clients that have a key."""
    return serve_script(*WORDS, api_key=KEY)


@pytest.fixture(scope="module")
def plain(serve_script: ServeScript) -> Running:
    """A template without tools and thinking."""
    return serve_script(*WORDS, template=PLAIN)


THINKS = (
    "{% for m in messages %}<|role|>{{ m.role }}:{{ m.reasoning_content }}{{ m.content }}"
    "{% endfor %}{% if enable_thinking %}thinking{% else %}quick{% endif %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)


def test_an_unreadable_body_is_refused_in_this_shape(keyed: Running):
    for raw, said in ((b"{", "is not JSON"), (b"[]", "not a JSON object")):
        status, _, answer = keyed.post(raw, PATH, X_Api_Key=KEY)
        assert (status, answer["type"]) == (400, "error")
        assert said in answer["error"]["message"]


REFUSED = {
    "no max_tokens": ({"max_tokens": None}, "max_tokens is missing"),
    "no messages": ({"messages": None}, "messages is missing"),
    "empty": ({"messages": []}, "messages must not be empty"),
    "no object": ({"messages": ["hi"]}, "messages[0] must be an object"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role must be"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    "prefill": ({"messages": [*USER, {"role": "assistant", "content": "It"}]}, "prefill"),
    "a server tool": ({"tools": [{"type": "web_search_20250305"}]}, "'web_search_20250305'"),
    "a tool without schema": ({"tools": [{"name": "f"}]}, "tools[0].input_schema is missing"),
    "a deferred tool": ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
    "servers": ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers is not supported"),
    "a thread": ({"thread": {"type": "create"}}, "thread is not supported"),
    "a container": ({"container": "x"}, "container is not supported"),
    "thinking": ({"thinking": {"type": "between_tools"}}, "thinking.type must be"),
    "stop words": ({"stop_sequences": ["x"] * 17}, "stop_sequences must be up to 16"),
    "a temperature": ({"temperature": -1}, "temperature must be a number from 0"),
    "system": ({"system": [{"type": "image"}]}, "system[0] must have one of the types text"),
}


@pytest.mark.parametrize(("fields", "said"), REFUSED.values(), ids=list(REFUSED))
def test_refused(keyed: Running, fields: dict[str, Any], said: str):
    assert said in refusal(keyed, body(**fields))


@pytest.mark.parametrize("kind", ["image", "document", "search_result", "server_tool_use", "x", 7])
def test_other_blocks_are_refused_by_name(keyed: Running, kind: Any):
    content = [{"type": "text", "text": "Look"}, {"type": kind, "source": {"type": "url"}}]
    told = refusal(keyed, body(messages=[{"role": "user", "content": content}]))
    assert told.startswith("messages[0].content[1] must have one of the types text, tool_result")
    assert repr(str(kind)) in told


def turns(**result: Any) -> list[dict[str, Any]]:
    """A conversation with a call and its result."""
    use = {"type": "tool_use", "id": "toolu_1", "name": "warmth", "input": {"city": "Lyon"}}
    answer = {"type": "tool_result", "tool_use_id": "toolu_1"} | result
    return [*USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": [answer]}]


def test_results(keyed: Running):
    def count(**result: Any) -> int:
        return tokens(keyed, messages=turns(**result))

    nothing = count()
    assert count(content="21") == count(content=[{"type": "text", "text": "21"}]) == nothing + 2
    blocks = [{"type": "text", "text": "2"}, {"type": "text", "text": "1"}]
    assert count(content=blocks) == nothing + 3  # a line break
    assert count(content="21", is_error=True) == nothing + len("Error: 21")
    told = refusal(keyed, body(messages=turns(content=[{"type": "image"}])))
    assert "messages[2].content[0].content[0] must have one of the types text; 'image'" in told
    told = refusal(keyed, body(messages=turns(tool_use_id="toolu_2")))
    assert "messages[2].content[0].tool_use_id is 'toolu_2', which no tool_use" in told


def test_system_and_turns(keyed: Running):
    assert tokens(keyed, system="ab") == tokens(keyed, system=[{"type": "text", "text": "ab"}])
    assert tokens(keyed, system="") == tokens(keyed, system=[]) == tokens(keyed)
    twice = [{"role": "user", "content": text} for text in ("ab", "cd")]
    once = [{"role": "user", "content": "ab\ncd"}]
    assert tokens(keyed, messages=twice) == tokens(keyed, messages=once)


def test_what_the_template_leaves_out_is_refused(plain: Running):
    told = refusal(plain, body(tools=[TOOL]))
    assert told == "tools is not supported: this model's chat template leaves out tools"
    told = refusal(plain, body(messages=turns(content="21")))
    assert told.startswith("messages[1] is not supported")


UNUSED = [
    ({"mystery": 1}, "mystery"),
    ({"output_config": {"effort": "high"}}, "output_config.effort"),
    ({"thinking": {"type": "adaptive"}}, "thinking"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.budget_tokens, thinking"),
    ({"tools": [TOOL | {"input_examples": []}]}, "tools.input_examples"),
    (
        {
            "messages": [
                *USER,
                {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]},
                *USER,
            ]
        },
        "messages.content.redacted_thinking",
    ),
]


@pytest.mark.parametrize(("fields", "named"), UNUSED, ids=[named for _, named in UNUSED])
def test_unused_fields_are_named(keyed: Running, fields: dict[str, Any], named: str):
    _, headers, _ = keyed.post(body(**fields), PATH, X_Api_Key=KEY)
    assert headers["X-Unused-Parameters"] == named


def test_accepted_fields_change_nothing(keyed: Running):
    cached = {"cache_control": {"type": "ephemeral"}}
    fields = {
        "metadata": {"user_id": "a"},
        "service_tier": "auto",
        "system": [{"type": "text", "text": "Be brief"} | cached],
        "tools": [TOOL | cached],
    } | cached
    status, headers, answer = keyed.post(body(**fields), PATH, X_Api_Key=KEY)
    assert status == 200
    assert "X-Unused-Parameters" not in headers
    assert tokens(keyed, **fields) == tokens(keyed, system="Be brief", tools=[TOOL])
    assert answer["content"][0]["text"] == "One two three"


def test_thinking_is_turned_on_and_off_and_given_back(tmp_path: Path):
    with running(Script(tmp_path / "model", "One", template=THINKS), strict=True) as server:
        on, off = (tokens(server, thinking={"type": kind}) for kind in ("adaptive", "disabled"))
        assert on - off == len("thinking") - len("quick")

        def back(*blocks: dict[str, Any]) -> int:
            content = [*blocks, {"type": "text", "text": "x"}]
            return tokens(
                server, messages=[*USER, {"role": "assistant", "content": content}, *USER]
            )

        thought = {"type": "thinking", "thinking": "because", "signature": "s"}
        assert back(thought) == back() + len("because")
