"""A disk that fails under a paged model: one line, nothing half read, then all is right again."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import openai
import pytest
from mlx_lm.models.cache import make_prompt_cache

from outlier_mlx.engine.conversation import Conversation
from outlier_mlx.engine.generate import Options
from outlier_mlx.engine.loading import load, load_model
from outlier_mlx.engine.paging import reading
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.paged import lookahead_of, store_of
from outlier_mlx.engine.paging.reads import ExpertFiles
from outlier_mlx.errors import OutlierError
from tests.library import Library
from tests.program import Result, run
from tests.serving import running

PREADV, START = os.preadv, ExpertFiles.start
#: What each fault is told as.
FAULTS = {
    "error": "cannot be read: Input/output error",
    "short": "the file ends within this tensor",
    "removed": "was removed while the model is in use",
    "replaced": "was replaced while the model is in use",
    "cut": "while the model is in use; load the model again",
    "wedged": "no read ended for 0.2 seconds",
}
#: Those that may pass.
PASSING = ("error", "short", "removed", "wedged")


class Disk:
    """The file of a tier, on a disk that fails from a moment on."""

    def __init__(self, tier: Path, patch: pytest.MonkeyPatch) -> None:
        (self.file,) = tier.glob("*.safetensors")
        self.tier, self.inode = tier, self.file.stat().st_ino
        self.kind, self.left, self.failing = "", -1, False
        self.free = threading.Event()
        patch.setattr(reading, "TIMEOUT", 0.2)
        patch.setattr(os, "preadv", self._read)
        patch.setattr(ExpertFiles, "start", lambda *given, **how: self._start(*given, **how))

    def fail(self, kind: str, after: int) -> None:
        """Fail like this after so many experts."""
        self.kind, self.left = kind, after
        self.free.clear()

    def mend(self) -> None:
        """End a fault that may pass."""
        if self.failing and self.kind == "removed":
            (self.tier / "away").rename(self.file)
        self.left, self.failing = -1, False
        self.free.set()

    def _start(self, *given: Any, **how: Any) -> Any:
        if self.left == 0:
            self._begin()
        self.left -= 1
        return START(*given, **how)

    def _begin(self) -> None:
        self.failing = True
        if self.kind == "removed":
            self.file.rename(self.tier / "away")
        elif self.kind == "replaced":
            shutil.copy(self.file, self.tier / "copy")
            (self.tier / "copy").rename(self.file)
        elif self.kind == "cut":
            os.truncate(self.file, self.file.stat().st_size // 2)

    def _read(self, handle: int, into: list[memoryview], offset: int) -> int:
        if self.failing and os.fstat(handle).st_ino == self.inode:
            if self.kind == "error":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if self.kind == "short":
                return 0
            if self.kind == "wedged":
                self.free.wait(30)
        return PREADV(handle, into, offset)


@pytest.fixture
def disk(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    tier = tmp_path / "tier"
    shutil.copytree(library.demo_tier("q4"), tier)
    found = Disk(tier, monkeypatch)
    yield found
    found.free.set()


def assert_fails_in_one_line(ended: Result, kind: str) -> None:
    assert ended.code == 1
    error, *more = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert not more
    assert ".safetensors: " in error
    assert FAULTS[kind] in error
    assert "Traceback" not in ended.both
    assert len(error) < 500


@pytest.mark.parametrize("kind", FAULTS)
def test_generate_ends_with_one_line(disk: Disk, kind: str) -> None:
    disk.fail(kind, after=20)
    asked = "--prompt", "The heron", "--max-tokens", 60, "--expert-memory", "40%"
    assert_fails_in_one_line(run("generate", "--model", disk.tier, *asked, code=None), kind)
    assert disk.failing


@pytest.mark.parametrize("kind", FAULTS)
def test_chat_ends_with_one_line(disk: Disk, kind: str) -> None:
    disk.fail(kind, after=20)
    asked = "chat", "--model", disk.tier, "--max-tokens", 60, "--expert-memory", "40%"
    assert_fails_in_one_line(run(*asked, input="The heron\n", code=None), kind)
    assert disk.failing


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", PASSING)
def test_what_follows_is_right(disk: Disk, kind: str, early: bool) -> None:
    expected = logits(load_model(disk.tier)[0])
    model = load_model(disk.tier, expert_memory=ExpertMemory(slots=8))[0]
    lookahead = lookahead_of(model)
    assert lookahead is not None
    lookahead.probe.decide(early)
    for after in (0, 1, 7, 20):
        disk.fail(kind, after)
        with pytest.raises(OutlierError, match=FAULTS[kind]):
            logits(model)
        disk.mend()
        assert all(map(np.array_equal, logits(model), expected))
    store = store_of(model)
    assert store is not None
    assert not store._lost


def logits(model: Any) -> list[np.ndarray]:
    """Of a prompt, and of tokens that are decoded one by one."""
    cache = make_prompt_cache(model)
    given = [[[5, 9, 14, 200]], *([[7 * number % 200 + 5]] for number in range(12))]
    return [np.array(model(mx.array(tokens), cache=cache)) for tokens in given]


@pytest.mark.slow
@pytest.mark.parametrize("kind", PASSING)
def test_a_conversation_goes_on(disk: Disk, kind: str) -> None:
    model, tokenizer = load(disk.tier, expert_memory="40%")
    conversation = Conversation(model, tokenizer, Options(max_tokens=20))
    said = [*conversation.reply("The heron")]
    disk.fail(kind, after=5)
    with pytest.raises(OutlierError, match=FAULTS[kind]):
        said += conversation.reply("And then?")
    disk.mend()
    again = Conversation(*load(disk.tier), conversation.options)
    again.messages = [*conversation.messages]
    answer, expected = ("".join(r.text for r in c.reply("Why?")) for c in (conversation, again))
    assert answer == expected
    assert said


@pytest.mark.slow
@pytest.mark.parametrize("kind", PASSING)
def test_the_server_goes_on(disk: Disk, kind: str) -> None:
    def loaded() -> Any:
        return load(disk.tier, expert_memory="40%")

    with running(loaded) as server:
        before = server.chat(max_tokens=16).choices[0].message.content
        disk.fail(kind, after=5)
        with pytest.raises(openai.InternalServerError) as refused:
            server.chat(max_tokens=16)
        assert refused.value.status_code == 503
        assert "\n" not in refused.value.message
        (line,) = [line for line in server.log if FAULTS[kind] in line]
        assert disk.file.name in line
        disk.mend()
        assert server.chat(max_tokens=16).choices[0].message.content == before
