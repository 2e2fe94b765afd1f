"""`/v1/completions` with several prompts, and with tokens for text."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import outlier_mlx
from outlier_mlx.serve.loop import Loop
from tests.serving import NAME, Running, running

PROMPTS = ["The heron", "stands in", "the water and", "waits"]


@pytest.fixture(scope="module")
def served(small_tier: Path) -> Iterator[Running]:
    """Fewer replies are generated together than there are prompts in a list."""
    with running(small_tier, decode_concurrency=3, max_tokens=100_000) as server:
        yield server


def complete(served: Running, **options: Any) -> Any:
    create: Any = served.client.completions.create
    return create(
        **{"model": NAME, "max_tokens": 8, "logit_bias": {"0": -100, "2": -100}} | options
    )


@pytest.fixture(scope="module")
def alone(served: Running) -> list[str]:
    return [complete(served, prompt=prompt).choices[0].text for prompt in PROMPTS]


def test_a_choice_for_each_prompt(served: Running, alone: list[str]):
    answer = complete(served, prompt=PROMPTS)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == alone
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage.completion_tokens == 4 * 8
    single = [complete(served, prompt=prompt).usage.prompt_tokens for prompt in PROMPTS]
    assert answer.usage.prompt_tokens == sum(single)


def test_streamed(served: Running, alone: list[str]):
    usage = {"include_usage": True}
    *chunks, last = complete(served, prompt=PROMPTS, stream=True, stream_options=usage)
    texts, reasons = [""] * 4, [""] * 4
    for chunk in chunks:
        (choice,) = chunk.choices
        assert not reasons[choice.index]
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or ""
    assert (texts, reasons) == (alone, ["length"] * 4)
    assert last.usage.completion_tokens == 4 * 8


def test_tokens(served: Running, small_tier: Path, alone: list[str]):
    _, tokenizer = outlier_mlx.load(small_tier)
    tokens = [tokenizer.encode(prompt) for prompt in PROMPTS]
    answer = complete(served, prompt=tokens[1])
    assert [choice.text for choice in answer.choices] == alone[1:2]
    assert answer.usage.prompt_tokens == len(tokens[1])
    answer = complete(served, prompt=[tokens[2], PROMPTS[0], tokens[3]])
    assert [choice.text for choice in answer.choices] == [alone[2], alone[0], alone[3]]


def test_many_with_a_seed(served: Running):
    """More than are generated at a time: each has random numbers of its own."""
    answer = complete(served, prompt=["same"] * 9, seed=5, temperature=1.0)
    assert len({choice.text for choice in answer.choices}) == 1
    assert [choice.index for choice in answer.choices] == list(range(9))


def test_log_probabilities(served: Running):
    answer = complete(served, prompt=PROMPTS[:2], logprobs=1, stop=[])
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == [8, 8]


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompt_that_is_too_long_fails_all(served: Running, stream: bool):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(served, prompt=["short", "!" * 600], stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert served.wait(lambda: not served.server.generator.replies)


def test_the_least_room_is_told(served: Running):
    body = {"prompt": ["short", "!" * 500], "max_tokens": 50}
    status, headers, _ = served.post(body, "/v1/completions")
    assert (status, headers["X-Max-Tokens"]) == (200, "12")


def test_a_client_that_vanishes_ends_all(served: Running):
    chunks = complete(served, prompt=PROMPTS * 3, stream=True, max_tokens=400)
    next(chunks)
    chunks.close()
    assert served.wait(lambda: not served.server.generator.replies)
    hasty: Any = served.new_client(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        hasty.completions.create(model=NAME, prompt=["x"] * 50, max_tokens=400, seed=1)
    assert served.wait(lambda: not served.server.generator.replies)
    assert complete(served, prompt=PROMPTS).usage.completion_tokens == 4 * 8


def test_generation_that_fails(served: Running, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Any, batch: Any) -> None:
        raise RuntimeError("no reason")

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", fail)
        with pytest.raises(openai.InternalServerError, match="generation failed"):
            complete(served, prompt=PROMPTS)
    assert served.wait(lambda: not served.server.generator.replies)
    assert complete(served, prompt=PROMPTS).usage.completion_tokens == 4 * 8


def test_a_prompt_that_comes_as_the_only_response_ends(served: Running):
    """It is read in the very turn in which the other gets its last token."""
    ended, before = threading.Event(), len(served.log)

    def step(loop: Loop, batch: Any) -> None:
        original(loop, batch)
        if not len(batch) and not ended.is_set():
            ended.set()
            assert served.wait(lambda: not loop.jobs.empty())
            loop._take_in()

    original = Loop._step
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(Loop, "_step", step)
        first = pool.submit(complete, served, prompt=PROMPTS[0])
        assert ended.wait(20)
        second = complete(served, prompt=PROMPTS[1])
    assert first.result().choices[0].text
    assert second.choices[0].text
    assert not [line for line in served.log[before:] if "generation failed" in line]
