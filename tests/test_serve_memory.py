"""A request without memory waits, or is refused; when memory runs out, only it is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from outlier_mlx.serve import handler, loop
from outlier_mlx.serve.loop import Loop
from outlier_mlx.serve.memory import CacheMemory
from tests.serving import MESSAGES, NAME, Running, running

ENDLESS: dict[str, Any] = {"logit_bias": {"0": -100, "2": -100}}
TOKENS = 300


@pytest.fixture(scope="module")
def cache(small_tier: Path) -> int:
    """Bytes of a KV cache of `TOKENS` tokens."""
    with running(small_tier) as server:
        return int(server.server.generator.provider.memory._size(TOKENS))


@pytest.fixture
def tight(small_tier: Path, cache: int) -> Iterator[Running]:
    """A server with memory for one conversation of `TOKENS` tokens, or for shorter ones."""
    with running(small_tier, cache_memory=cache, max_tokens=10_000, max_context=20_000) as server:
        yield server


def said(length: int) -> Any:
    """Messages with so many tokens, and a few of the template."""
    return [{"role": "user", "content": "!" * length}]


def nothing() -> None:
    pass


def test_as_many_as_fit_with_the_longest():
    """mlx-lm pads the caches of a batch to the longest."""
    memory = CacheMemory(1000, lambda tokens: tokens)
    assert memory.tokens == 1000
    for job in "abcde":
        memory.take(job, 100, nothing)
    assert memory.rest == 500
    waited = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(memory.take, "long", 300, waited.set)
        assert waited.wait(10)
        # A shorter one that would fit waits behind it.
        short = pool.submit(memory.take, "short", 100, nothing)
        for job in "ab":
            memory.give_back(job)
            memory.give_back(job)
        assert not long.done()
        for job in "cd":
            memory.give_back(job)
        long.result(10)
        short.result(10)
    assert memory.rest == 100


def test_who_stops_waiting_leaves_the_line():
    memory = CacheMemory(100, lambda tokens: tokens)
    memory.take("first", 100, nothing)

    def vanish() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        memory.take("second", 10, vanish)
    memory.give_back("first")
    memory.take("third", 100, vanish)


@pytest.mark.parametrize(
    ("nbytes", "size", "expected"),
    [
        (None, lambda tokens: tokens, None),
        (100, lambda tokens: 0, None),  # a model whose cache is not known
        (100, lambda tokens: 3 * tokens, 33),
        (100, lambda tokens: min(tokens, 50), None),  # a sliding window
        (0, lambda tokens: tokens, 0),
    ],
)
def test_the_longest_cache(nbytes: int | None, size: Any, expected: int | None):
    assert CacheMemory(nbytes, size).tokens == expected


def test_a_request_that_never_fits_is_refused(tight: Running):
    with pytest.raises(openai.BadRequestError, match="this server has memory for 300") as caught:
        tight.chat(messages=said(TOKENS))
    assert caught.value.code == "insufficient_memory"
    assert tight.chat().usage.completion_tokens == 12


def test_the_reply_is_as_long_as_fits(tight: Running):
    status, headers, answer = tight.post(
        {"messages": said(280), "max_tokens": 5000, "top_p": 0.1} | ENDLESS
    )
    assert status == 200
    assert answer["usage"]["total_tokens"] == TOKENS
    assert headers["X-Max-Tokens"] == str(answer["usage"]["completion_tokens"])


def test_a_request_waits_for_memory(tight: Running):
    """Also one that vanishes meanwhile holds up nobody."""
    memory = tight.server.generator.provider.memory
    memory.take("another", TOKENS - 50, nothing)
    hasty: Any = tight.new_client(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        hasty.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=12)
    assert tight.wait(lambda: not memory._line)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tight.chat)
        assert tight.wait(lambda: len(memory._line) == 1)
        assert list(memory._taken) == ["another"]
        memory.give_back("another")
        assert waiting.result(30).usage.completion_tokens == 12
    assert tight.wait(lambda: not memory._taken)


def test_kept_caches_make_room(tight: Running, cache: int):
    generator = tight.server.generator
    seen = []
    rest: Any = type(generator.provider.memory).rest

    def look(self: Any) -> Any:
        seen.append((generator.prompt_cache.nbytes, rest.fget(self)))
        return seen[-1][1]

    for length in (100, 120, 140):
        tight.chat(messages=said(length), max_tokens=10)
    kept = generator.prompt_cache.nbytes
    assert 0 < kept <= cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(generator.provider.memory), "rest", property(look))
        tight.chat(messages=said(200), max_tokens=90)
    assert seen[0][0] == kept > seen[0][1] >= 0
    assert generator.prompt_cache.nbytes <= cache


def test_when_memory_runs_out_the_server_goes_on(small_tier: Path, monkeypatch: pytest.MonkeyPatch):
    """With two replies under way, which are lost. MLX raises this in the thread that generates."""
    failing = threading.Event()
    step = Loop._step

    def out_of_memory(self: Any, batch: Any) -> None:
        if failing.is_set():
            failing.clear()
            raise RuntimeError("[malloc] Unable to allocate 9876543210 bytes.")
        step(self, batch)

    monkeypatch.setattr(Loop, "_step", out_of_memory)
    with running(small_tier, max_tokens=100_000, max_context=200_000) as server:
        streams = [server.chat(stream=True, max_tokens=100_000, **ENDLESS) for _ in range(2)]
        for stream in streams:
            next(stream)
        failing.set()
        for stream in streams:
            with pytest.raises(openai.APIError, match="memory ran out"):
                list(stream)
        assert server.chat().usage.completion_tokens == 12
        assert server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
        assert server.wait(lambda: not server.server.generator.replies)
        expected = "generation failed: RuntimeError: [malloc] Unable to allocate 9876543210 bytes."
        assert expected in server.log


@pytest.mark.parametrize("error", [RuntimeError("[metal::malloc] Attempting ..."), MemoryError()])
def test_when_memory_runs_out_for_one(
    served: Running, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    """In what is done for it alone."""

    def fail(self: Any, *args: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(loop, "choice_for", fail)
        status, headers, answer = served.post({"messages": MESSAGES, "seed": 1})
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "memory ran out" in answer["error"]["message"]
    assert served.chat(seed=1).usage.completion_tokens == 12


def test_health_fails_when_generation_is_stuck(served: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(handler, "STUCK_SECONDS", 0.4)
    entered, go_on = threading.Event(), threading.Event()

    def health() -> tuple[int, Any]:
        status, _, answer = served.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return status, answer

    step = Loop._step

    def slow(self: Any, batch: Any) -> None:
        entered.set()
        assert go_on.wait(30)
        step(self, batch)

    monkeypatch.setattr(Loop, "_step", slow)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(served.chat)
        assert entered.wait(30)
        assert served.wait(lambda: health()[0] == 503)
        _, answer = health()
        assert answer["status"] == "unavailable"
        assert "no step for" in answer["reason"]
        go_on.set()
        assert reply.result(30).usage.completion_tokens == 12
    # Nothing to generate is no reason to fail.
    served.server.generator.loop.moved -= 1000
    assert health() == (200, {"status": "ok"})
