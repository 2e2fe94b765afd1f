"""A folder that another program has locked is waited for, and a line tells of it."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.builders import write_overlay
from tests.folders import names
from tests.program import run
from tests.refusals import DIMS


@contextmanager
def locked(folder: Path, seconds: float, then: Callable[[], None] | None = None) -> Iterator[None]:
    """Lock a folder as another program would. After a while it is unlocked, or `then` called."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    timer = threading.Timer(seconds, then or partial(fcntl.flock, handle, fcntl.LOCK_UN))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        os.close(handle)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    write_overlay(tmp_path / "overlay", **DIMS)
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs"


def test_a_line_names_the_folder_that_is_waited_for(outputs: Path) -> None:
    with locked(outputs, 1.0):
        told = run("convert", outputs.parent / "overlay", "--out", outputs / "tier", "--quiet")
    line = f"warning: {outputs}: locked by another program: waiting until it is unlocked\n"
    assert told.both == line and names(outputs) == ["tier"]


def test_a_lock_of_an_instant_is_not_told(outputs: Path) -> None:
    with locked(outputs, 0.15):
        told = run("convert", outputs.parent / "overlay", "--out", outputs / "tier", "--quiet")
    assert told.both == "" and names(outputs) == ["tier"]


def test_ctrl_c_ends_the_wait(outputs: Path) -> None:
    with locked(outputs, 1.0, lambda: os.kill(os.getpid(), signal.SIGINT)):
        told = run(
            "convert", outputs.parent / "overlay", "--out", outputs / "tier", "--quiet", code=130
        )
    assert told.err.splitlines()[1:] == ["interrupted"] and names(outputs) == []
