"""Every command on the pages about chat and serve runs as it stands there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.builders import write_overlay
from tests.engine import tier_of
from tests.pages import blocks, run_block, variables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    built = write_overlay(tmp_path / "overlay", layers=2, moe_layers=(1,))
    tier_of(built.path, None, tmp_path / "my-tier")
    return tmp_path


@pytest.mark.slow
def test_chat(folder: Path) -> None:
    for language, text in blocks("docs/chat.md"):
        run_block(language, text, folder)
    assert (folder / "replies.txt").read_text(encoding="utf-8").count("\n") >= 2


class Serving:
    """A block that serves; it listens once this is made."""

    def __init__(self, text: str, folder: Path, port: str) -> None:
        self.process = subprocess.Popen(
            ["bash", "-euc", text],
            cwd=folder,
            env=variables(),
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(port))).close()
                return
            except ConnectionRefusedError:
                assert self.process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(20) == 0


@pytest.mark.slow
def test_serve(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    serving: Serving | None = None
    try:
        for language, text in blocks("docs/serve.md"):
            if "outlier-mlx serve" in text:
                if serving:
                    serving.end()
                serving = Serving(f"{text.rstrip()} --port {port}", folder, port)
            else:
                printed = run_block(language, text.replace("8080", port), folder).out
                assert printed and "error" not in printed
    finally:
        if serving:
            serving.end()
