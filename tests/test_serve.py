"""What the server answers, through the real `openai` client."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import openai
import pytest

import outlier_mlx
from outlier_mlx.engine.detokenizer import Detokenizer
from outlier_mlx.engine.generate import Options, encode_prompt, generate_text
from outlier_mlx.engine.responses import Response
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutlierError
from outlier_mlx.serve import loop
from outlier_mlx.serve.options import ServeOptions
from outlier_mlx.serve.server import Server
from tests.builders import write_overlay
from tests.engine import tier_of
from tests.library import Library
from tests.serving import MESSAGES, NAME, Running, running

Loaded = tuple[Any, Tokenizer]
PROMPT = MESSAGES[0]["content"]


@pytest.fixture(scope="module")
def tier(library: Library) -> Path:
    return library.tier(library.overlay(layers=2, moe_layers=(1,), seed=8))


@pytest.fixture(scope="module")
def served(tier: Path) -> Iterator[Running]:
    with running(tier, max_tokens=400) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(tier: Path) -> Iterator[Running]:
    """A server that tells how much of a prompt was cached, because all clients have one key."""
    with running(tier, api_key="any") as server:
        yield server


@pytest.fixture(scope="module")
def loaded(tier: Path) -> Loaded:
    return outlier_mlx.load(tier)


@pytest.fixture(scope="module")
def alone(loaded: Loaded) -> Callable[[int], list[Response]]:
    """What the model writes without a server, so many tokens of it."""
    return cache(lambda n: list(generate_text(*loaded, PROMPT, Options(max_tokens=n))))


Alone = Callable[[int], list[Response]]


def text_of(responses: list[Response]) -> str:
    return "".join(response.text for response in responses)


def joined(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_models_and_health(served: Running):
    assert [model.id for model in served.client.models.list()] == [NAME]
    assert served.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        served.client.models.retrieve("gpt-4")
    assert served.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[2] == {"status": "ok"}


@pytest.mark.parametrize("model", [NAME, "gpt-4", "mlx-community/Qwen2.5-0.5B-Instruct-4bit"])
def test_whatever_model_is_named_the_one_answers(served: Running, alone: Alone, model: str):
    answer = served.chat(model=model)
    assert answer.model == NAME
    assert answer.choices[0].message.content == text_of(alone(12))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12


def test_streams(served: Running, alone: Alone):
    usage = {"include_usage": True}
    chunks = list(served.chat(stream=True, stream_options=usage, max_tokens=40))
    assert joined(chunks) == text_of(alone(40))
    assert len([chunk for chunk in chunks if chunk.choices]) > 5
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 40
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_text_completions(served: Running, loaded: Loaded):
    create: Any = served.client.completions.create
    options = Options(max_tokens=12, ignore_chat_template=True)
    expected = text_of(list(generate_text(*loaded, PROMPT, options)))
    answer = create(model=NAME, prompt=PROMPT, max_tokens=12)
    assert answer.choices[0].text == expected
    usage = {"include_usage": True}
    chunks = list(
        create(model=NAME, prompt=[PROMPT], max_tokens=12, stream=True, stream_options=usage)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert {chunk.object for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_words_end_the_text_wherever_tokens_do(served: Running, alone: Alone, streamed: bool):
    """Also where a word's tokens, written alone, are not those that the model writes."""
    text = text_of(alone(40))
    for start, length in ((5, 1), (9, 3), (14, 2), (20, 6)):
        word = text[start : start + length]
        answer = served.chat(stop=["never", word], max_tokens=40, stream=streamed)
        chunks = list(answer) if streamed else []
        found = joined(chunks) if streamed else answer.choices[0].message.content or ""
        last = (chunks[-1] if streamed else answer).choices[0]
        assert found == text[: text.index(word)]
        assert last.finish_reason == "stop"


def test_what_looks_like_a_stop_word_is_not_lost(served: Running, alone: Alone):
    text = text_of(alone(40))
    answer = served.chat(stop=[text[-2:] + "\0", text[7:12] + "\0"], max_tokens=40)
    assert answer.choices[0].message.content == text


def test_seeds(served: Running):
    texts = [
        served.chat(seed=seed, temperature=1.0, max_tokens=30).choices[0].message.content
        for seed in (7, 7, 8, -1)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_are_the_models(
    served: Running, loaded: Loaded, alone: Alone, streamed: bool
):
    model, tokenizer = loaded
    answer = served.chat(logprobs=True, top_logprobs=3, max_tokens=20, stream=streamed)
    if streamed:
        choices = [chunk.choices[0] for chunk in answer]
        content = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    else:
        content = answer.choices[0].logprobs.content
    tokens = [response.token for response in alone(20)]
    for entry, token in zip(content, tokens, strict=True):
        text = tokenizer.decode([token])
        partial = "\ufffd" in text
        assert entry.token == (tokenizer.convert_ids_to_tokens(token) if partial else text)
        assert entry.bytes == (None if partial else list(text.encode()))
    prompt = encode_prompt(tokenizer, PROMPT, Options())
    logits = model(mx.array([prompt + tokens]))[0, len(prompt) - 1 : -1]
    expected = np.array(nn.log_softmax(logits))
    for entry, token, row in zip(content, tokens, expected, strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-3)
        found = [top.logprob for top in entry.top_logprobs]
        assert found == pytest.approx(np.sort(row)[::-1][:3], abs=1e-3)


def test_log_probabilities_of_what_is_sampled(served: Running):
    """Not of the likeliest token: that is among the alternatives."""
    answer = served.chat(logprobs=True, top_logprobs=2, temperature=5.0, max_tokens=30, seed=1)
    content = answer.choices[0].logprobs.content
    assert any(entry.logprob < entry.top_logprobs[-1].logprob for entry in content)


def test_up_to_twenty_alternatives(served: Running):
    answer = served.chat(logprobs=True, top_logprobs=20, max_tokens=3)
    assert [len(token.top_logprobs) for token in answer.choices[0].logprobs.content] == [20] * 3


def test_log_probabilities_of_completions(served: Running):
    answer: Any = served.client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=8, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 8
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert max(logprobs.top_logprobs[0].values()) == pytest.approx(logprobs.token_logprobs[0])


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        ({"max_tokens": 400}, None),
        ({"max_tokens": 401}, "400"),
        ({"max_tokens": 10**30}, "400"),
        ({"max_completion_tokens": 401}, "400"),
        ({"max_completion_tokens": 300, "max_tokens": 500}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_more_tokens_than_allowed_are_capped(
    served: Running, asked: dict[str, int], granted: str | None, path: str
):
    """Clients send their own default. They are told how many tokens the response may have."""
    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "The heron"}
    stop = [chr(code) for code in range(ord("a"), ord("a") + 16)]  # so that it ends soon
    status, headers, _ = served.post(prompt | asked | {"stop": stop}, path)
    assert (status, headers.get("X-Max-Tokens")) == (200, granted)


def test_tokens_are_limited_by_the_context(served: Running):
    """Of 512 tokens."""
    prompt: Any = [{"role": "user", "content": "!" * 470}]
    endless = {"0": -100, "2": -100}
    body = {"messages": prompt, "max_tokens": 400, "logit_bias": endless}
    _, headers, answer = served.post(body)
    assert answer["usage"]["total_tokens"] == 512
    assert headers["X-Max-Tokens"] == str(answer["usage"]["completion_tokens"])
    with served.client.chat.completions.with_streaming_response.create(
        model=NAME, messages=prompt, max_tokens=400, stream=True
    ) as streamed:
        assert streamed.headers["X-Max-Tokens"] == headers["X-Max-Tokens"]
    with pytest.raises(openai.BadRequestError) as caught:
        served.chat(messages=[{"role": "user", "content": "!" * 600}])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("seed", [None, 1])
def test_an_answer_sent_back_as_a_prompt(keyed: Running, seed: int | None):
    """All of its tokens may be in the prompt cache; one must be left to start from."""
    create: Any = keyed.client.completions.create
    # Of single printable characters, so that the text has the tokens that were written.
    bias = {str(token): -100 for token in range(288) if not 5 <= token < 99}
    prompt = f"begin {seed} "
    for _ in range(3):
        answer = create(model=NAME, prompt=prompt, max_tokens=3, logit_bias=bias, seed=seed)
        again = create(model=NAME, prompt=prompt, max_tokens=3, logit_bias=bias, seed=seed)
        assert len(answer.choices[0].text) == 3
        assert again.choices[0].text == answer.choices[0].text
        assert again.usage.prompt_tokens_details.cached_tokens > 0
        prompt += answer.choices[0].text


def test_nobody_learns_what_others_asked(served: Running, keyed: Running):
    """The number of cached tokens would tell; a key makes sure that there are no others."""
    body = {"messages": MESSAGES, "max_tokens": 2}
    streamed = body | {"stream_options": {"include_usage": True}}
    for _ in range(2):
        assert "prompt_tokens_details" not in served.post(body)[2]["usage"]
        *_, last = served.stream(streamed)
        assert last["usage"].keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
        usage = keyed.chat(max_tokens=2).usage
    assert usage.prompt_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("seed", [None, 1])
def test_comments_in_a_stream_do_not_count_tokens(served: Running, seed: int | None):
    """They would tell how much of the prompt was cached."""
    raw = json.dumps({"messages": MESSAGES, "max_tokens": 2, "stream": True, "seed": seed})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}"
    with served.connect() as connection:
        connection.sendall(f"{head}\r\n\r\n{raw}".encode())
        lines = connection.makefile(encoding="utf-8").read().splitlines()
    comments = {line for line in lines if line.startswith(":")}
    assert comments == {": keepalive"}


def test_many_at_once_get_what_each_would_get_alone(served: Running):
    prompts = [[{"role": "user", "content": f"{'long ' * n}number {n}"}] for n in range(6)]

    def ask(messages: Any) -> str:
        return served.chat(messages=messages, max_tokens=24).choices[0].message.content

    one_by_one = [ask(messages) for messages in prompts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, prompts))
    assert together == one_by_one


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_client_that_vanishes_frees_its_slot(tier: Path, streamed: bool, seed: int | None):
    """With a context that would take the model minutes to fill."""
    endless = {"max_tokens": 100_000, "temperature": 1.0, "seed": seed}
    with running(tier, max_tokens=100_000, max_context=200_000) as server:
        if streamed:
            chunks = server.chat(stream=True, logit_bias={"0": -100, "2": -100}, **endless)
            for _ in range(3):
                next(chunks)
            assert server.server.generator.replies
            chunks.close()
        else:
            hasty: Any = server.new_client(timeout=1.5)
            with pytest.raises(openai.APITimeoutError):
                hasty.chat.completions.create(
                    model=NAME, messages=MESSAGES, logit_bias={"0": -100, "2": -100}, **endless
                )
        assert server.wait(lambda: not server.server.generator.replies)
        started = time.monotonic()
        assert server.chat(seed=seed).usage.completion_tokens == 12
        assert time.monotonic() - started < 10
        assert any("the client disconnected before" in line for line in server.log)


def test_a_client_that_vanishes_while_it_waits(tier: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is read for it while all places are taken."""
    seen: list[int] = []
    read = loop.read

    def count(model: Any, sequences: Any, slices: Any) -> None:
        seen.append(len(sequences))
        read(model, sequences, slices)

    monkeypatch.setattr(loop, "read", count)
    endless = {"max_tokens": 100_000, "logit_bias": {"0": -100, "2": -100}, "seed": 1}
    options: dict[str, Any] = {"max_tokens": 100_000, "max_context": 200_000}
    options["decode_concurrency"] = 1
    with running(tier, **options) as server:
        chunks = server.chat(stream=True, **endless)
        next(chunks)
        hasty: Any = server.new_client(timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            hasty.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "other"}], **endless
            )
        assert server.wait(lambda: len(server.server.generator.replies) == 1)
        chunks.close()
        assert server.chat(seed=2).usage.completion_tokens
    assert seen == [1]  # the third prompt is in the prefix cache


def test_a_reply_whose_text_fails_fails_alone(
    served: Running, alone: Alone, monkeypatch: pytest.MonkeyPatch
):
    """The others do not notice, and the server goes on."""
    chunks = iter(served.chat(stream=True, max_tokens=200))
    first = [next(chunks) for _ in range(3)]

    class Failing(Detokenizer):
        def add_token(self, token: int) -> None:
            raise KeyError("x é")

    tokenizer = served.server.generator.provider.tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "_detokenizer", Failing(tokenizer._tokenizer))
        with pytest.raises(openai.InternalServerError, match=r"the text of token \d+ .* KeyError"):
            served.chat()
    assert joined([*first, *chunks]) == text_of(alone(200))
    assert served.chat().choices[0].message.content == text_of(alone(12))
    assert not [line for line in served.log if "generation failed" in line]


def test_generation_outlives_a_failure(served: Running, monkeypatch: pytest.MonkeyPatch):
    failed = threading.Event()
    read = loop.Loop._read

    def fail_once(self: Any) -> None:
        if self._waiting and not failed.is_set():
            failed.set()
            raise RuntimeError("out of memory, say")
        read(self)

    monkeypatch.setattr(loop.Loop, "_read", fail_once)
    with pytest.raises(openai.InternalServerError, match="generation failed; try again"):
        served.chat(messages=[{"role": "user", "content": "What was not asked before"}])
    assert served.chat().usage.completion_tokens == 12
    assert "generation failed: RuntimeError: out of memory, say" in served.log


def test_a_model_that_cannot_be_loaded(tmp_path: Path):
    with pytest.raises(OutlierError, match="no config"), running(tmp_path):
        pass


def test_what_a_model_computes_when_it_is_made(tmp_path: Path):
    """YaRN's frequencies are lazy, and so must be made in the thread that generates."""
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    built = write_overlay(tmp_path / "overlay", layers=2, moe_layers=(1,), seed=8, yarn=yarn)
    tier = tier_of(built.path, None, tmp_path / "tier")
    expected = generate_text(*outlier_mlx.load(tier), PROMPT, Options(max_tokens=12))
    with running(tier) as server:
        assert server.chat().choices[0].message.content == text_of(list(expected))


def test_a_port_that_is_taken(served: Running):
    options = ServeOptions(port=served.server.server_port)
    with pytest.raises(OutlierError, match="choose another --port"):
        Server(NAME, lambda: None, options, print, print)  # type: ignore[arg-type, return-value]


def test_nothing_of_mlx_lms_server_is_used():
    package = Path(outlier_mlx.__file__).parent
    importing = re.compile(r"^\s*(from|import) mlx_lm.*\bserver\b", re.MULTILINE)
    assert not [path for path in package.rglob("*.py") if importing.search(path.read_text())]


@pytest.mark.slow
def test_sixteen_clients_for_a_while(tier: Path):
    """Streaming, seeded, stopped, failing and vanishing ones: all are answered, nothing is left."""
    until = time.monotonic() + 15
    with running(tier, max_tokens=200) as server:
        expected = server.chat(max_tokens=30).choices[0].message.content

        def work(number: int) -> int:
            done = 0
            while time.monotonic() < until:
                kind = (number + done) % 5
                if kind == 0:
                    assert server.chat(max_tokens=30).choices[0].message.content == expected
                elif kind == 1:
                    assert joined(server.chat(max_tokens=30, stream=True)) == expected
                elif kind == 2:
                    assert server.chat(seed=done, temperature=1.0).usage.completion_tokens <= 12
                elif kind == 3:
                    with pytest.raises(openai.BadRequestError):
                        server.chat(top_p=7)
                else:
                    chunks = server.chat(stream=True, max_tokens=200)
                    next(chunks)
                    chunks.close()
                done += 1
            return done

        with ThreadPoolExecutor(16) as pool:
            answered = list(pool.map(work, range(16)))
        assert min(answered) > 5
        assert server.wait(lambda: not server.server.generator.replies)
        assert server.chat(max_tokens=30).choices[0].message.content == expected
        assert not [line for line in server.log if "failed" in line or "Error" in line]
