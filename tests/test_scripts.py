"""The scripts that set up `.venv`: what they install, when, and what they say meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.program import ROOT, Result, run_command

# In place of Python: it notes what it is asked for, and makes a .venv with itself and a command.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
    "-c "*) exit 0 ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python
        printf '#!/bin/sh\\necho "demo runs: $*"\\n' > .venv/bin/outlier-mlx
        printf '#!/bin/sh\\nexit 9\\n' > .venv/bin/ruff
        chmod +x .venv/bin/outlier-mlx .venv/bin/ruff ;;
    *"pip install"*) echo "Obtaining file:///clone"
        echo "  Installing build dependencies: started"
        echo "Collecting mlx[cpu]>=0.32.4 (from outlier-mlx==0.1.0)"
        echo "  Using cached mlx.whl (1 kB)"
        echo "Collecting mlx-lm>=0.32.2 (from outlier-mlx==0.1.0)"
        echo "Installing collected packages: mlx, mlx-lm"
        exit "${PIP_FAILS:-0}" ;;
esac
"""


class Clone:
    """A clone of the project's scripts, on a machine where nothing is really installed."""

    def __init__(self, place: Path) -> None:
        self.place = place / "clone"
        (self.place / "scripts").mkdir(parents=True)
        for name in ("demo", "test", "setup.sh"):
            shutil.copy(ROOT / "scripts" / name, self.place / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.place)
        self.log = place / "log"
        self.python = place / "python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def run(self, script: str, *arguments: str, code: int = 0, **variables: str) -> Result:
        """Run a script, or a line of bash, from another folder."""
        command = [self.place / "scripts" / script, *arguments]
        if " " in script:
            command = ["bash", "-c", script.replace("SETUP", f"{self.place}/scripts/setup.sh")]
        own = {"PYTHON": str(self.python), "LOG": str(self.log)}
        return run_command(
            *command, code=code, env=os.environ | own | variables, cwd=self.place.parent
        )

    def asked(self) -> list[str]:
        """What Python was asked for since the last time, without the search for a Python."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith("-c ")]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


PIP = "-m pip install --disable-pip-version-check --no-compile -e "


def test_the_demo_installs_what_a_user_needs_and_says_so(clone: Clone) -> None:
    shown = clone.run("demo", "--full", "--out", "my tier")
    assert shown.out == "demo runs: demo --full --out my tier\n"
    assert clone.asked() == ["-m venv .venv", PIP + "."]
    lines = shown.err.splitlines()
    assert lines[0].startswith("making .venv with ") and lines[1].startswith("installing into .v")
    assert lines[2:] == ["  mlx", "  mlx-lm", "  all are here: unpacking them"]
    again = clone.run("demo")
    assert (again.out, again.err) == ("demo runs: demo\n", "") and clone.asked() == []


def test_developers_tools_are_added_once(clone: Clone) -> None:
    for script, installed in (
        ("demo", ["-m venv .venv", PIP + "."]),
        (". SETUP dev", [PIP + ".[dev]"]),
        ("demo", []),
        (". SETUP dev", []),
        (". SETUP train", [PIP + ".[train]"]),
        (". SETUP dev; . SETUP train; . SETUP ''", []),
    ):
        clone.run(script)
        assert clone.asked() == installed, script
    (clone.place / "pyproject.toml").write_text("changed")
    clone.run(". SETUP dev")
    assert clone.asked() == [PIP + ".[dev]"]
    clone.run("demo")
    assert clone.asked() == []


def test_the_tests_need_the_developers_tools(clone: Clone) -> None:
    clone.run("test", code=9)  # the first of them, ruff, ends it
    assert clone.asked() == ["-m venv .venv", PIP + ".[dev]"]


@pytest.mark.parametrize(("types", "tests"), [(0, 0), (3, 0), (0, 4)])
def test_types_and_tests_both_count(types: int, tests: int, clone: Clone) -> None:
    """Types are checked beside the tests, and what is wrong with them is shown at the end."""
    clone.run(". SETUP dev")
    ends = {"ruff": 0, "lint-imports": 0, "mypy": types, "pytest": tests}
    for name, code in ends.items():
        program = clone.place / ".venv" / "bin" / name
        program.write_text(f"#!/bin/sh\necho {name} ran\nexit {code}\n")
        program.chmod(0o755)
    shown = clone.run("test", code=types or tests).out.splitlines()
    assert shown[-2:] == ["pytest ran", "mypy ran"]


def test_what_failed_is_tried_again(clone: Clone) -> None:
    assert clone.run("demo", code=1, PIP_FAILS="2").out == ""
    clone.asked()
    assert clone.run("demo").out == "demo runs: demo\n"
    assert clone.asked() == [PIP + "."]


def test_without_python_there_is_one_line(clone: Clone) -> None:
    clone.python.write_text("#!/bin/sh\nexit 1\n")
    for name in ("python3", *(f"python3.{n}" for n in (11, 12, 13, 14))):
        shutil.copy(clone.python, clone.python.with_name(name))
    path = f"{clone.python.parent}:{os.environ['PATH']}"
    shown = clone.run("demo", code=1, PATH=path)
    assert shown.err == "need Python 3.11 or newer with venv; set PYTHON to its name\n"
