"""Chat templates that refuse messages, or fail: one line, wherever a template is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import outlier_mlx
from outlier_mlx.engine.templates import TemplateError, render
from tests.damage import edit_json
from tests.evaluating import GENERATE, write_task
from tests.folders import copy_writable
from tests.program import assert_refused, run
from tests.serving import running

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
FAILING = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ messages[0].content.nothing.at_all }}": "no attribute 'nothing'",
    "{{ 1 / 0 }}": "division by zero",
    "{% for m in messages %}": "Unexpected end of template",
    "{{ raise_exception('two\nlines') }}": "two lines",
    "{{ messages[9].role }}": "has no element 9",
}
WithTemplate = Callable[[str], Path]


@pytest.fixture
def with_template(small_tier: Path, tmp_path: Path) -> WithTemplate:
    """A tier with another chat template."""

    def make(template: str) -> Path:
        tier = copy_writable(small_tier, tmp_path / "tier")
        edit_json(tier / "tokenizer_config.json", chat_template=template)
        return tier

    return make


@pytest.mark.parametrize("template", FAILING, ids=FAILING.values())
def test_what_failed_is_told_in_one_line(with_template: WithTemplate, template: str) -> None:
    _, tokenizer = outlier_mlx.load(with_template(template))
    with pytest.raises(TemplateError) as told:
        render(tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    line = str(told.value)
    assert line.startswith("the chat template failed: ") and "\n" not in line
    assert FAILING[template] in line


def test_a_tokenizer_renders_through_the_same_function(small_tier: Path) -> None:
    _, tokenizer = outlier_mlx.load(small_tier)
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    text = "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, messages, add_generation_prompt=True) == text
    apply = tokenizer.apply_chat_template
    assert apply(messages, tokenize=False, add_generation_prompt=True) == text
    tokens = apply(messages, add_generation_prompt=True)
    assert tokens == tokenizer.encode(text, add_special_tokens=False)


def test_generate(with_template: WithTemplate) -> None:
    ask = ("generate", with_template(NO_SYSTEM), "--prompt", "Hi", "--max-tokens", 2)
    run(*ask)
    refused = run(*ask, "--system-prompt", "Brief", code=1)
    assert_refused(refused, "the chat template failed: System role not supported")


def test_chat(with_template: WithTemplate) -> None:
    tier = with_template(NO_SYSTEM)
    run("chat", tier, "--max-tokens", 2, input="Hi\n")
    refused = run("chat", tier, "--system-prompt", "Brief", input="Hi\n", code=1)
    assert_refused(refused, "the chat template failed: System role not supported")


def test_serve(with_template: WithTemplate) -> None:
    user = {"role": "user", "content": "Hi"}
    with running(with_template(NO_SYSTEM)) as server:
        body = {"messages": [{"role": "system", "content": "Brief"}, user], "max_tokens": 2}
        status, _, answer = server.post(body)
        assert status == 400
        told = answer["error"]["message"]
        assert told == "the chat template failed: System role not supported"
        assert server.post(body | {"messages": [user]})[0] == 200


def test_a_template_sees_only_what_a_request_says(with_template: WithTemplate) -> None:
    """Not the message without content with which mlx-lm finds the end of the system prompt."""
    tier = with_template(
        "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "system", "content": "Brief"}, {"role": "user", "content": "Hi"}]
    with running(tier) as server:
        assert server.post({"messages": messages, "max_tokens": 2})[0] == 200
        messages[1]["content"] = ""
        assert server.post({"messages": messages, "max_tokens": 2})[0] == 400


@pytest.mark.usefixtures("offline")
def test_eval(with_template: WithTemplate, tmp_path: Path) -> None:
    task = write_task(tmp_path, "asked", [{"question": "Hi", "answer": "x"}], GENERATE % "'a'")
    tier = with_template("{{ raise_exception('no messages, please') }}")
    refused = run("eval", tier, "--tasks", task, "--apply-chat-template", code=1)
    assert_refused(refused, "the chat template failed: no messages, please")
