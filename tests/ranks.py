"""Several processes on the loopback device, as `mlx.launch` starts them, and what they wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.program import SCRIPT, Result

TIMEOUT = 120


def start_ranks(
    size: int, folder: Path, *command: object, each: Mapping[int, tuple[object, ...]] | None = None
) -> list[subprocess.Popen[str]]:
    """Start processes that MLX's ring connects.

    Args:
        size: how many.
        folder: where the hostfile is written.
        command: what all of them run.
        each: what single ranks run instead.
    """
    with ExitStack() as ports:
        taken = [ports.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(size)]
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in taken]
    file = folder / "hosts.json"
    file.write_text(json.dumps(hosts))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [str(word) for word in (each or {}).get(rank, command)],
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)},
            stdin=subprocess.PIPE,
            **pipes,
        )
        for rank in range(size)
    ]


def ended(started: list[subprocess.Popen[str]], input: str | None = None) -> list[Result]:
    """How the processes ended, by rank; `input` is what rank 0 gets on stdin."""
    found = []
    try:
        for rank, process in enumerate(started):
            out, err = process.communicate("" if rank else input, timeout=TIMEOUT)
            found.append(Result(process.returncode, out, err))
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


def run_ranks(size: int, folder: Path, *arguments: object) -> list[Result]:
    """Run `outlier-mlx` on several ranks; all must succeed."""
    results = ended(start_ranks(size, folder, SCRIPT, *arguments))
    assert [result.code for result in results] == [0] * size, results
    for result in results[1:]:
        assert result.both == "", result
    return results


def run_python_ranks(size: int, folder: Path, script: str, *arguments: object) -> list[Any]:
    """Run Python text on several ranks; returns the JSON that each wrote."""
    started = start_ranks(size, folder, sys.executable, "-c", script, *arguments)
    results = ended(started)
    assert [result.code for result in results] == [0] * size, results
    return [result.json for result in results]


def assert_ended(results: list[Result], *words: str) -> None:
    """All ranks ended with 1, and rank 0 alone said why, in one line."""
    assert [result.code for result in results] == [1] * len(results), results
    errors = [line for line in results[0].err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), results
    assert "Traceback" not in results[0].err
    assert all(result.both == "" for result in results[1:]), results
