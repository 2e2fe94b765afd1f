"""How the server shares the model: prompts in slices, seeds in batches, caches by themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.errors import OutlierError
from outlier_mlx.serve import loop
from outlier_mlx.serve.batch import Batch
from outlier_mlx.serve.pace import Pace
from outlier_mlx.serve.single import Single
from tests.library import Library
from tests.serving import MESSAGES, Running, running

LONG: Any = [{"role": "user", "content": "!" * 400}]
ENDLESS = {"0": -100, "2": -100}
QUANTIZED: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 8}


@pytest.fixture(scope="module")
def served(small_tier: Path) -> Iterator[Running]:
    with running(small_tier, max_tokens=400) as server:
        yield server


@pytest.fixture(scope="module")
def wide(library: Library) -> Path:
    """A tier with heads of 32 values, which can share a scale."""
    return library.tier(library.overlay(layers=2, moe_layers=(1,), heads=2, kv_heads=1))


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Prompts are read 8 tokens at a time; the lengths of all slices, as they are read."""
    seen: list[list[int]] = []
    read = loop.read

    def note(model: Any, sequences: Any, slices: Any) -> None:
        seen.append([len(tokens) for tokens in slices])
        read(model, sequences, slices)

    monkeypatch.setattr(loop, "read", note)
    monkeypatch.setattr(Pace, "tokens", lambda self, shared: 8)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, QUANTIZED], ids=["plain", "quantized"])
def test_seeded_requests_give_the_same_text_among_others(
    wide: Path, options: dict[str, Any]
) -> None:
    """Also with quantized caches, which cannot be merged: each takes its turn."""
    asked = [{"seed": n, "temperature": 1.0, "top_p": 0.9, "max_tokens": 20 + n} for n in range(5)]
    with running(wide, **options) as server, ThreadPoolExecutor(5) as pool:

        def ask(body: dict[str, Any]) -> str:
            return str(server.chat(logit_bias=ENDLESS, **body).choices[0].message.content)

        alone = [ask(body) for body in asked]
        assert len(set(alone)) == 5
        assert list(pool.map(ask, asked)) == alone


def test_a_cache_that_cannot_be_quantized_is_refused_at_once(small_tier: Path) -> None:
    """Not with each request: its heads have 16 values."""
    with pytest.raises(OutlierError, match="--kv-group-size"), running(small_tier, **QUANTIZED):
        pass


def test_nobody_waits_for_a_long_text_with_a_quantized_cache(wide: Path) -> None:
    with running(wide, max_tokens=100_000, max_context=200_000, **QUANTIZED) as server:
        chunks = server.chat(stream=True, max_tokens=100_000, seed=1, logit_bias=ENDLESS)
        next(chunks)
        assert server.chat(max_tokens=5).usage.completion_tokens == 5
        assert server.wait(lambda: len(server.server.generator.replies) == 1)
        chunks.close()


def test_a_prompt_in_slices_gives_the_same_text(
    small_tier: Path, served: Running, slices: list[list[int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "tokens", lambda self, shared: 2048)
        expected = served.chat(messages=LONG).choices[0].message.content
    assert len(slices) == 1
    with running(small_tier) as other:
        assert other.chat(messages=LONG).choices[0].message.content == expected
    assert len(slices) > 50 and max(slices[1:]) == [8]


def test_a_short_prompt_overtakes_a_long_one(
    small_tier: Path, slices: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the long one still has its turns."""
    go_on = threading.Event()
    read = loop.read

    def wait(*arguments: Any) -> None:
        read(*arguments)
        if len(slices) == 5:
            assert go_on.wait(30)

    monkeypatch.setattr(loop, "read", wait)
    with running(small_tier) as server, ThreadPoolExecutor(2) as pool:
        long = pool.submit(server.chat, messages=LONG, max_tokens=5)
        assert server.wait(lambda: len(slices) == 5)
        short = pool.submit(server.chat, max_tokens=3)
        assert server.wait(lambda: not server.server.generator.loop.jobs.empty())
        go_on.set()
        assert short.result(30).usage.completion_tokens == 3
        assert len(slices) < 40 and not long.done()
        assert long.result(30).usage.completion_tokens == 5


def test_nobody_reads_on_for_a_client_that_vanished(
    small_tier: Path, slices: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    read = loop.read

    def wait(*arguments: Any) -> None:
        read(*arguments)
        assert len(slices) < 3 or go_on.wait(30)

    monkeypatch.setattr(loop, "read", wait)
    with running(small_tier) as server:
        raw = b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"!" * 400)
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        )
        connection = server.connect()
        connection.sendall(head % len(raw) + raw)
        assert server.wait(lambda: len(slices) == 3)
        connection.close()
        assert server.wait(lambda: not server.server.generator.replies)
        go_on.set()
        assert server.chat(max_tokens=2).usage.completion_tokens == 2
        assert len(slices) < 20
        assert not server.server.generator.loop._waiting


def test_short_prompts_are_read_together(small_tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    read, take_in = loop.read, loop.Loop._take_in
    go_on = threading.Event()

    def note(model: Any, sequences: Any, slices: Any) -> None:
        seen.append(len(sequences))
        read(model, sequences, slices)

    def wait(self: Any) -> None:
        if go_on.wait(0.02):
            take_in(self)

    monkeypatch.setattr(loop, "read", note)
    monkeypatch.setattr(loop.Loop, "_take_in", wait)
    monkeypatch.setattr(Pace, "tokens", lambda self, shared: 512)
    prompts = [[{"role": "user", "content": word}] for word in ("a", "few", "words", "or so")]
    with running(small_tier) as server, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.chat, messages=prompt, max_tokens=9) for prompt in prompts]
        assert server.wait(lambda: server.server.generator.loop.jobs.qsize() == 4)
        go_on.set()
        together = [answer.result(30).choices[0].message.content for answer in answers]
        assert seen[0] == 4
        single = [server.chat(messages=prompt, max_tokens=9) for prompt in prompts]
    assert [answer.choices[0].message.content for answer in single] == together


def test_what_is_chosen_for_one_fails_for_one(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logits processor that fails, in the middle of others' texts."""
    make = loop.choice_for
    expected = served.chat(max_tokens=60, logit_bias=ENDLESS).choices[0].message.content

    def choice_for(request: Any, *arguments: Any) -> Any:
        choice = make(request, *arguments)
        if request.seed != 13:
            return choice

        def fail(tokens: Any, logits: Any) -> Any:
            if len(tokens) > 40:
                raise ValueError("no token is allowed")
            return logits

        return type(choice)(choice.sampler, (fail,))

    monkeypatch.setattr(loop, "choice_for", choice_for)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(served.chat, max_tokens=60, logit_bias=ENDLESS)
        body = {"messages": MESSAGES, "seed": 13, "max_tokens": 60, "logit_bias": ENDLESS}
        assert served.post(body)[0] == 503
        assert other.result(30).choices[0].message.content == expected


def test_a_prompt_is_read_while_the_last_token_of_another_text_comes(
    small_tier: Path, slices: list[list[int]]
) -> None:
    """In the turn in which a text that is generated alone ends, a prompt may be read to its end."""
    with running(small_tier) as server, ThreadPoolExecutor(2) as pool:
        for length in range(1, 13):
            first = pool.submit(server.chat, max_tokens=length, logit_bias=ENDLESS)
            messages = [{"role": "user", "content": "!" * (9 * length)}]
            second = pool.submit(server.chat, messages=messages, max_tokens=2, logit_bias=ENDLESS)
            assert first.result(30).usage.completion_tokens == length
            assert second.result(30).usage.completion_tokens == 2
        assert not server.server.generator.loop._batches


def test_what_fails_between_reading_and_generating_is_told(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, sequence: Any) -> Any:
        raise RuntimeError("no reason")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_single", fail)
        assert served.post({"messages": MESSAGES, "max_tokens": 3})[0] == 503
    assert served.chat(max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize(
    "place", [(Single, "pending"), (Batch, "go_on"), (Batch, "pending"), (Batch, "add")], ids=str
)
def test_whatever_fails_between_two_ways_to_generate_is_told_to_all(
    small_tier: Path, place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that is generated alone is taken from there, and is not in the batch yet."""
    failed = threading.Event()

    def fail(*arguments: Any) -> Any:
        failed.set()
        raise RuntimeError("no reason")

    with running(small_tier, max_tokens=100_000, max_context=200_000) as server:
        with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
            patch.setattr(*place, fail)
            body = {"messages": MESSAGES, "logit_bias": ENDLESS}
            long = pool.submit(server.post, body | {"max_tokens": 100_000})
            assert server.wait(lambda: bool(server.server.generator.loop._batches))
            assert server.post(body | {"max_tokens": 9})[0] in (200, 503)
            assert failed.wait(10)
            assert long.result(30)[0] == 503
        assert server.chat(max_tokens=3).usage.completion_tokens == 3
        # A client has its answer before the server has done with the reply.
        assert server.wait(lambda: not server.server.generator.replies)


def test_errors_that_are_no_clients_are_not_told_to_one(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even those of this project, which can name files of the server."""

    def fail(*arguments: Any) -> Any:
        raise OutlierError("/home/me/model/config.json: damaged")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "choice_for", fail)
        status, _, answer = served.post({"messages": MESSAGES, "max_tokens": 3})
    assert (status, answer["error"]["message"]) == (503, loop.FAILED)
    assert any("damaged" in line for line in served.log)


def test_a_thread_that_ends_leaves_nobody_waiting(
    small_tier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no reason")

    monkeypatch.setattr(threading, "excepthook", lambda *arguments: None)
    with running(small_tier) as server, monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_turn", fail)
        patch.setattr(loop.Loop, "_start_over", fail)
        assert server.post({"messages": MESSAGES, "max_tokens": 3})[0] == 503
        status, _, _ = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status == 503
