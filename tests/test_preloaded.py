"""Commands in forks: to who calls them, they are programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.preloaded import preloaded
from tests.program import Result, run_command

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="a fork has no GPU")

PROGRAM = """
import atexit, colorsys, os, sys
atexit.register(print, "the end")
colorsys.runs = getattr(colorsys, "runs", 0) + 1
print(sys.argv[1:], os.getcwd(), os.environ.get("OWN"), sys.stdin.read(), colorsys.runs)
print(__name__, file=sys.stderr)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), 9)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    program = tmp_path_factory.mktemp("bin") / "told"
    program.write_text(f"#!{sys.executable}{PROGRAM}")
    program.chmod(0o755)
    folder = tmp_path_factory.mktemp("preloaded")
    with preloaded(program, folder, dict(os.environ), ["colorsys"]) as variables:
        yield variables


def shell(text: str, variables: dict[str, str], folder: Path, code: int) -> Result:
    return run_command("bash", "-euc", text, env=variables, cwd=folder, code=code)


def test_arguments_streams_and_exit_code(variables: dict[str, str], tmp_path: Path) -> None:
    """Twice, and the second knows nothing of the first."""
    for _ in range(2):
        done = shell("echo hi | told 'a b' 3", variables, tmp_path, 3)
        assert done.out == f"['a b', '3'] {tmp_path} None hi\n 1\nthe end\n"
        assert done.err == "__main__\n"


def test_redirections(variables: dict[str, str], tmp_path: Path) -> None:
    done = shell("told x 0 </dev/null >out 2>err", variables, tmp_path, 0)
    assert done.both == "" and (tmp_path / "err").read_text() == "__main__\n"
    assert (tmp_path / "out").read_text().endswith("the end\n")


def test_programs_at_the_same_time(variables: dict[str, str], tmp_path: Path) -> None:
    done = shell("echo a | told b 0 | told c 0", variables, tmp_path, 0)
    assert "['b', '0']" in done.out and done.out.startswith("['c', '0']")


def test_one_that_is_killed(variables: dict[str, str], tmp_path: Path) -> None:
    assert "the end" not in shell("told kill 0", variables, tmp_path, 128 + 9).out


def test_variables_of_its_own(variables: dict[str, str], tmp_path: Path) -> None:
    done = shell("OWN=1 told x 4 </dev/null", variables, tmp_path, 4)
    assert f"['x', '4'] {tmp_path} 1  1\n" in done.out
