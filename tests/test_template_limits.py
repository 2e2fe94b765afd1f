"""Templates of strangers: rendered as transformers does, and ended when they take too much."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

import outlier_mlx
from outlier_mlx.engine import bounded
from outlier_mlx.engine.bounded import TemplateError, render_within_limits
from outlier_mlx.engine.templates import render
from tests.damage import edit_json
from tests.folders import copy_writable
from tests.program import assert_refused, run
from tests.serving import running

MEMORY, TIME = "it needs too much memory", "s of processor time"
DEPTH, LENGTH = "it is nested too deeply", "its text has more than"
UNSAFE = "SecurityError"
DOUBLING = (
    "{% set n = namespace(v=[1]) %}{% for i in range(40) %}{% set n.v = [n.v, n.v] %}{% endfor %}"
)
LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"

HOSTILE = {
    "{{ 'x' * 10**10 }}": MEMORY,
    "{{ '%2000000000d' % 1 }}": MEMORY,
    LOOP: TIME,
    "{{ 2 ** (10 ** 9) }}": TIME,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": DEPTH,
    "{{ 'x' * 9000000 }}": LENGTH,
    "{{ ''.__class__.__mro__ }}": UNSAFE,
}
MORE_HOSTILE = {
    "{{ ([0] * 10**10) | length }}": MEMORY,
    "{{ '%.2000000000f' % 1.5 }}": MEMORY,
    "{{ '{:2000000000}'.format(1) }}": MEMORY,
    "{{ '%*d' | format(2000000000, 1) }}": MEMORY,
    "{{ 'x' | center(10**10) }}": MEMORY,
    "{{ 'x'.ljust(2 * 10**9) }}": MEMORY,
    "{{ 'x'.zfill(2 * 10**9) }}": MEMORY,
    "{{ ('\\t' * 1000).expandtabs(10**7) }}": MEMORY,
    "{{ 'a\\nb' | indent(10**10) }}": MEMORY,
    "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}": MEMORY,
    "{{ ('x' * 100000).replace('', 'b' * 100000) }}": MEMORY,
    "{{ range(100000) | join('x' * 100000) }}": MEMORY,
    "{{ ('x' * 100000).join('a' * 100000) }}": MEMORY,
    "{{ [1] | tojson(indent=10**10) }}": MEMORY,
    "{{ range(3) | batch(10**9, 'x') | list }}": MEMORY,
    "{{ 'x'.encode() * 10**10 }}": MEMORY,
    "{{ 'x'.translate({120: 'y' * 10**9}) }}": MEMORY,
    "{% set n = namespace(v='x') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}": (
        MEMORY
    ),
    LOOP.replace("%}{% endfor", "%} text {% endfor", 1): TIME,
    "{{ 7 ** (10 ** 8) }}": TIME,
    "{% set n = namespace(v=3) %}{% for i in 'x' * 60 %}{% set n.v = n.v ** 2 %}{% endfor %}": TIME,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": (
        TIME
    ),
    DOUBLING + "{{ n.v | tojson }}": TIME,
    DOUBLING + "{{ n.v }}": TIME,
    DOUBLING + "{{ n.v | pprint }}": TIME,
    DOUBLING + "{{ n.v == [n.v[0], n.v[0]] }}{{ [n.v, 1] < [n.v, 2] }}{{ n.v | string }}": TIME,
    "{{ ([range(100000) | list] * 1000) | sum(start=[]) }}": TIME,
    "{{ range(3) | slice(10**9) | list }}": TIME,
    "{{ lipsum(n=10**6) }}": TIME,
    "{{ 1" + " + 1" * 200_000 + " }}": TIME,
    "a{{ 1 }}" * 500_000: TIME,
    "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}": DEPTH,
    "{{ " + "-" * 20_000 + "1 }}": DEPTH,
    "{{ " + "[" * 5000 + "]" * 5000 + " }}": DEPTH,
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000: DEPTH,
    "{{ a" + ".b" * 3000 + " }}": DEPTH,
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}": DEPTH,
    "{% block a %}{{ self.a() }}{% endblock %}": DEPTH,
    "{{ raise_exception('x' * 1000000) }}": "xxx",
    "{{ range(10**12) }}": "Range too big",
    "{{ 10 ** 100000 }}": "4300 digits",
    "{{ lipsum.__globals__['os'] }}": UNSAFE,
    "{{ [].append(1) }}": UNSAFE,
    "{% set n = namespace() %}{% set n.__html__ = lipsum %}{{ n }}": "cannot hold the name __",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ '\\ud800' }}": "surrogates not allowed",
}


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes of this test's own that get little."""
    bounded._end_all()
    monkeypatch.setattr(bounded, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(bounded, "MAX_MEMORY", 256 << 20)
    yield
    bounded._end_all()


def assert_ended(template: str, reason: str) -> None:
    with pytest.raises(TemplateError) as told:
        render_within_limits(template, {"messages": []})
    # How fast the machine is decides which of these limits comes first.
    reasons = (MEMORY, TIME) if reason in (MEMORY, TIME) else (reason,)
    assert any(words in str(told.value) for words in reasons)
    assert len(str(told.value)) < 500
    assert render_within_limits("{{ n + 1 }}", {"n": 1}) == "2"


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates_fail_alone(template: str) -> None:
    assert_ended(template, HOSTILE[template])


@pytest.mark.slow
@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("number", range(len(MORE_HOSTILE)))
def test_more_hostile_templates_fail_alone(number: int) -> None:
    assert_ended(*list(MORE_HOSTILE.items())[number])


def test_nothing_of_python_is_reached() -> None:
    """What Jinja's sandbox keeps back is undefined, and writes nothing."""
    for template in ("{{ x | attr('__class__') }}", "{{ raise_exception.__globals__ }}"):
        assert render_within_limits(template, {"x": ""}) == ""


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_memory_is_watched_from_outside_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, where the kernel sets no limit."""
    bounded._end_all()
    render_within_limits("", {})
    monkeypatch.setattr(bounded, "MAX_MEMORY", 100 << 20)
    assert_ended("{% set x = 'x' * 200000000 %}" + LOOP, MEMORY)


def test_time_is_limited_by_the_clock_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MAX_WAIT", 0.1)
    with pytest.raises(TemplateError, match=r"it takes longer than 0\.1 s"):
        render_within_limits(LOOP, {})


def test_an_interrupted_template_answers_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(process: int) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bounded, "_resident", interrupt)
        render_within_limits(LOOP, {})
    assert render_within_limits("next", {}) == "next"


def test_a_process_that_was_killed_is_replaced() -> None:
    render_within_limits("", {})
    (process, *_) = bounded._idle
    os.kill(process._running.pid, signal.SIGKILL)
    process._running.wait()
    assert render_within_limits("next", {}) == "next"


def test_threads_get_their_own_text() -> None:
    def many(name: int) -> bool:
        return all(
            render_within_limits("{{ name }}:{{ n }}", {"name": name, "n": n}) == f"{name}:{n}"
            for n in range(20)
        )

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(many, range(12)))
    assert len(bounded._idle) <= bounded.MAX_PROCESSES


CHATS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "user", "content": "What is <b> & 'c'?  \n"}],
    "a conversation": [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Grüße, 你好 \U0001f600"},
        {"role": "assistant", "content": " Hi ", "reasoning": "polite"},
        {"role": "user", "content": "Go on", "name": None},
    ],
    "a call": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "w", "arguments": {"at": [1, 2.5, None]}}}
            ],
        },
        {"role": "tool", "content": '{"sky": "blue"}'},
    ],
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "w", "description": "<é>", "parameters": {}}}
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "blocks": """{{- bos_token }}
{%- set ns = namespace(system='', first=true) %}
{%- for m in messages %}
    {%- if m['role'] == 'system' %}
        {%- set ns.system = m['content'] %}
    {%- endif %}
{%- endfor %}
{# a comment #}
{%- macro show(m) %}
    {%- if m.content is string %}
        {{- m.content | trim }}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
        {{- call.function | tojson }}
        {{- call.function.arguments.items() | list | length }}
    {%- endfor %}
{%- endmacro %}
{% for m in messages if m.role != 'system' %}
  {% if loop.first and ns.system %}
[{{ ns.system }}]
  {% endif %}
{{ loop.index0 }} {{ m.role | upper }}: {{ show(m) }}{{ eos_token }}
  {% generation %}{{ m.reasoning_content }}{{ m.thinking }}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}{{ '>' }}{% endif %}
""",
    "tools": "{% if tools %}{{ tools | tojson(indent=4) }}{{ tools | map(attribute='function') "
    "| map(attribute='name') | join(', ') }}{% else %}none{% endif %}{{ dict(a=1) }}"
    "{{ dict.fromkeys([1, 2]) }}{{ messages[::-1][0].role }}{{ messages[-1]['content'].split() }}",
    "controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m }}{% endfor %}"
    "{{ enable_thinking }}{{ documents is none }}{{ missing is defined }}{{ strftime_now('%Y') }}",
}


@pytest.fixture(scope="module")
def tokenizer(small_tier: Path) -> TokenizerWrapper:
    return outlier_mlx.load(small_tier)[1]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_the_text_is_transformers_own(
    tokenizer: TokenizerWrapper, template: str, chat: str
) -> None:
    """Its `apply_chat_template` renders without limits."""
    for options in ({}, {"add_generation_prompt": True}, {"tools": TOOLS, "enable_thinking": True}):
        how: Any = {"chat_template": TEMPLATES[template], "enable_thinking": False} | options
        whole = tokenizer._tokenizer.apply_chat_template(CHATS[chat], tokenize=False, **how)
        assert render(tokenizer, CHATS[chat], **how) == whole != ""


@pytest.mark.parametrize("last", ["Well,", "Well, ", "a </s> b", ""])
def test_a_reply_that_is_begun(tokenizer: TokenizerWrapper, last: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": last}]
    for template in (
        TEMPLATES["chatml"],
        "{% for m in messages %}{{ m.content.strip() }}!{% endfor %}",
    ):
        how: Any = {"chat_template": template, "continue_final_message": True}
        whole = tokenizer._tokenizer.apply_chat_template(messages, tokenize=False, **how)
        assert render(tokenizer, messages, **how) == whole
    assert messages[-1]["content"] == last


def test_what_cannot_be_continued(tokenizer: TokenizerWrapper) -> None:
    user = [{"role": "user", "content": "Hi"}]
    for template, messages in (("none of it", user), ("{{ messages }}", [{"role": "user"}])):
        with pytest.raises(TemplateError, match=r"(of the|no) last message"):
            render(tokenizer, messages, chat_template=template, continue_final_message=True)


def test_unsupported_options_are_no_variables(tokenizer: TokenizerWrapper) -> None:
    with pytest.raises(TemplateError, match="return_tensors is not supported"):
        tokenizer.apply_chat_template(CHATS["a question"], return_tensors="np")


ASKED = (
    "{% set text = messages[-1].content %}{% if text == 'memory' %}{{ 'x' * 10**10 }}"
    "{% elif text == 'time' %}" + LOOP + "{% endif %}{{ text }}"
)


@pytest.fixture
def hostile_tier(small_tier: Path, tmp_path: Path) -> Path:
    tier = copy_writable(small_tier, tmp_path / "tier")
    edit_json(tier / "tokenizer_config.json", chat_template=ASKED)
    return tier


@pytest.mark.usefixtures("small_limits")
def test_requests_that_exceed_the_limits_fail_alone(hostile_tier: Path) -> None:
    with running(hostile_tier, max_tokens=2) as server:

        def ask(text: str) -> tuple[int, Any]:
            status, _, body = server.post({"messages": [{"role": "user", "content": text}]})
            return status, body

        with ThreadPoolExecutor(8) as threads:
            words = ["time", "Hi", "memory", "Hi", "time", "Hi"]
            answers = list(threads.map(ask, words))
        assert [status for status, _ in answers] == [400, 200] * 3
        assert TIME in answers[0][1]["error"]["message"]
        assert MEMORY in answers[2][1]["error"]["message"]


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(("word", "reason"), [("memory", MEMORY), ("time", TIME)])
def test_commands_end_in_one_line(hostile_tier: Path, word: str, reason: str) -> None:
    refused = run("generate", hostile_tier, "--prompt", word, code=1)
    assert_refused(refused, "the chat template failed: ", reason)
    refused = run("chat", hostile_tier, input=f"{word}\n", code=1)
    assert_refused(refused, "the chat template failed: ", reason)
