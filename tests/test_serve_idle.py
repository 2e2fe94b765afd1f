"""A model that nobody asks is unloaded, and loaded again for the next request."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import outlier_mlx
from outlier_mlx.engine.needs import needs_of
from outlier_mlx.errors import OutlierError
from tests.library import Library
from tests.memory import at_rest
from tests.program import run
from tests.serving import Running, running

SECOND = 1 / 60
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


def state(served: Running) -> str:
    status, _, answer = served.raw(HEALTH)
    assert status == 200
    return str(answer["state"])


@pytest.mark.slow
def test_memory_is_free_until_the_next_request(small_tier: Path) -> None:
    weights = needs_of(small_tier, on_cpu=True).weights
    before = at_rest()
    with running(small_tier, idle_unload=SECOND) as served:
        assert state(served) == served.raw(MODELS)[2]["data"][0]["state"] == "loaded"
        first = served.chat().choices[0].message.content
        loaded = mx.get_active_memory()
        assert loaded >= before + weights
        assert served.wait(lambda: state(served) == "unloaded")
        assert served.log[-1].startswith(("the model is unloaded", "127.0.0.1"))
        assert mx.get_active_memory() <= before + weights / 20
        assert served.chat().choices[0].message.content == first
        assert state(served) == "loaded"
        assert any("the model is loaded again" in line for line in served.log)
        # It is not unloaded once for all.
        assert served.wait(lambda: state(served) == "unloaded")
    assert not served.wait(lambda: mx.get_active_memory() > before + weights / 20, 0.1)


def slow(model: Path, calls: list[float], fails: Callable[[int], bool] = lambda n: False) -> Any:
    """A function that loads a model, which takes time, and may fail."""

    def load() -> Any:
        calls.append(time.monotonic())
        if len(calls) > 1:
            time.sleep(0.3)
        if fails(len(calls)):
            raise OutlierError("no memory")
        return outlier_mlx.load(model)

    return load


def test_requests_wait_while_it_is_loaded_and_none_is_lost(small_tier: Path) -> None:
    calls: list[float] = []
    answers: list[Any] = []
    with running(slow(small_tier, calls), idle_unload=SECOND / 2) as served:
        assert served.wait(lambda: state(served) == "unloaded")
        asking = [
            threading.Thread(target=lambda: answers.append(served.chat(max_tokens=4)))
            for _ in range(4)
        ]
        for thread in asking:
            thread.start()
        assert served.wait(lambda: state(served) == "loading", 2)
        for thread in asking:
            thread.join()
        assert len(answers) == 4 and len(calls) == 2
        assert len({answer.choices[0].message.content for answer in answers}) == 1


@pytest.mark.slow
def test_a_failure_to_load_again_ends_the_request_alone(small_tier: Path) -> None:
    calls: list[float] = []
    load = slow(small_tier, calls, lambda number: number == 2)
    with running(load, idle_unload=SECOND / 2) as served:
        assert served.wait(lambda: state(served) == "unloaded")
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        status, _, answer = served.post(body)
        assert status == 503 and "could not be loaded again" in answer["error"]["message"]
        assert any("no memory" in line for line in served.log)
        assert state(served) == "unloaded"
        assert served.post(body)[0] == 200


def test_a_long_reply_is_no_idleness(small_tier: Path) -> None:
    calls: list[float] = []
    with running(slow(small_tier, calls), idle_unload=SECOND / 10) as served:
        served.chat(max_tokens=300)
        assert len(calls) <= 2  # it may have been unloaded before, and never meanwhile


def test_without_the_option_nothing_is_unloaded(small_tier: Path) -> None:
    with running(small_tier) as served:
        assert served.raw(HEALTH)[2] == {"status": "ok"}
        assert "state" not in served.raw(MODELS)[2]["data"][0]


def test_the_option_of_the_command(small_tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(
        "outlier_mlx.serve.serve",
        lambda name, load, options, say, note, **_: served.append(options),
    )
    run("serve", small_tier, "--idle-unload", "15")
    assert served[0].idle_unload == 15
    assert "is less than" in run("serve", small_tier, "--idle-unload", "0", code=2).err


@pytest.mark.slow
def test_a_paged_model_is_unloaded_with_its_files(library: Library) -> None:
    tier = library.demo_tier("q4")
    handles = Path("/proc/self/fd")

    def opened() -> int:
        """How often the tier's files are open."""
        links = (os.path.realpath(link) for link in handles.iterdir())
        return sum(link.startswith(str(tier.resolve())) for link in links)

    def load() -> Any:
        return outlier_mlx.load(tier, expert_memory="50%")

    with running(load, idle_unload=SECOND) as served:
        first = served.chat().choices[0].message.content
        assert not handles.exists() or opened() > 0
        assert served.wait(lambda: state(served) == "unloaded")
        assert not handles.exists() or served.wait(lambda: opened() == 0)
        assert served.chat().choices[0].message.content == first
