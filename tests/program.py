"""The command line under test: in this process with `run`, or as a program with `run_program`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer

from outlier_mlx.cli import app, main

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(sys.executable).with_name("outlier-mlx")


def load_script(name: str) -> Any:
    """A module of scripts/, which is no package: it is loaded from its file."""
    spec = spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The program as click sees it, and the names of its commands.
GROUP: Any = typer.main.get_command(app)
COMMANDS = list(GROUP.commands)
# Packages that take long to import.
HEAVY = ["mlx", "mlx_lm", "transformers", "huggingface_hub", "numpy", "safetensors", "tokenizers"]


@dataclass(frozen=True)
class Result:
    """How a program ended: exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def both(self) -> str:
        """All that it wrote: stdout, then stderr."""
        return self.out + self.err

    @property
    def json(self) -> Any:
        """The value on stdout."""
        return json.loads(self.out)


def run(
    *arguments: object,
    code: int | None = 0,
    input: str | bytes = b"",
    env: dict[str, str] | None = None,
) -> Result:
    """Run `outlier-mlx` with these arguments in this process, without a terminal.

    Streams, `sys.argv`, warning filters and the environment are afterwards as they were.

    Args:
        arguments: of the command line; each becomes a string.
        code: the exit code to expect; None takes any.
        input: what stdin holds.
        env: variables to set meanwhile.

    Raises:
        Exception: what the program would end with a traceback for.
    """
    __tracebackhide__ = True
    data = input.encode() if isinstance(input, str) else input
    streams: dict[str, Any] = {
        "stdin": io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"),
        "stdout": io.TextIOWrapper(io.BytesIO(), encoding="utf-8"),
        "stderr": io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace"),
    }
    with (
        patch.multiple(sys, argv=[str(SCRIPT), *map(str, arguments)], **streams),
        patch.dict(os.environ, env or {}),
        warnings.catch_warnings(),
    ):
        # The interpreter's own filters in place of pytest's.
        warnings.simplefilter("default")
        for ignored in (DeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", ignored)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        try:
            main()
            ended: object = 0
        except SystemExit as exit:
            ended = exit.code or 0
    result = Result(
        ended if isinstance(ended, int) else 1,
        _written(streams["stdout"]),
        _written(streams["stderr"]) + ("" if isinstance(ended, int) else f"{ended}\n"),
    )
    assert code is None or result.code == code, (arguments, result)
    return result


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()


def assert_refused(result: Result, *words: str) -> None:
    """One line on stderr that holds all the words, nothing on stdout, exit code 1."""
    assert result.code == 1, result
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    line = result.err.removesuffix("\n")
    assert line.startswith("error: ")
    assert "Traceback" not in line
    assert len(line) < 500
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in {line!r}"


def run_program(*arguments: object, code: int | None = 0, **how: Any) -> Result:
    """Run `outlier-mlx` in a process of its own; `how` is for `subprocess.run`."""
    return run_command(SCRIPT, *arguments, code=code, **how)


def run_python(script: str, *arguments: object, code: int | None = 0, **how: Any) -> Result:
    """Run Python text in a process of its own; `how` is for `subprocess.run`."""
    return run_command(sys.executable, "-c", script, *arguments, code=code, **how)


def start_program(*arguments: object, **how: Any) -> subprocess.Popen[str]:
    """Start `outlier-mlx` in a process of its own, with pipes; `how` is for `subprocess.Popen`."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([SCRIPT, *map(str, arguments)], **pipes | how)


def run_command(*command: object, code: int | None = 0, **how: Any) -> Result:
    """Run any program to its end, without a terminal; `how` is for `subprocess.run`."""
    __tracebackhide__ = True
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if "input" not in how:
        pipes["stdin"] = subprocess.DEVNULL
    done = subprocess.run([str(word) for word in command], check=False, **pipes | how)
    result = Result(done.returncode, done.stdout or "", done.stderr or "")
    assert code is None or result.code == code, (command, result)
    return result
