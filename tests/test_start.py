"""What a command in a pipe does not wait for, and what its tables look like there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.program import ROOT, run, run_command, run_python

# Each takes tens of milliseconds to import, of a second that a short text takes.
UNUSED = ["rich", "pydantic", "lm_eval", "matplotlib", "torch", "datasets", "llguidance"]
LOOK = f"""
import atexit, gc, sys
def look():
    print([n for n in {UNUSED!r} if n in sys.modules], gc.isenabled(), file=sys.stderr)
atexit.register(look)
from outlier_mlx.cli import main
main()
"""


def test_generate_imports_what_it_uses(place: Path) -> None:
    done = run_python(LOOK, "generate", "tier", "-p", "the", "-m", 2, cwd=place)
    assert done.err.splitlines()[-1] == "[] True"
    assert "generation: 2 tokens" in done.err


@pytest.mark.parametrize(
    "line",
    [
        "info tier",
        "tiers overlay",
        "convert overlay --out {} --force",
        "routing tier --text text.txt --window 32 --windows 2",
        "bench tier -p 8 -g 2 -n 1",
    ],
)
def test_tables_have_no_trailing_blanks_in_a_pipe(
    line: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    shown = run(*line.format(tmp_path / "out").split()).both
    assert "───" in shown and not re.search(r"[ \t]+$", shown, re.MULTILINE)


@pytest.mark.slow
def test_the_comparison_with_mlx_lm(place: Path, tmp_path: Path) -> None:
    # A copy: mlx-lm runs the tier's own code, and Python keeps its bytecode beside it.
    tier = shutil.copytree(place / "tier", tmp_path / "tier")
    script = ROOT / "scripts" / "bench_start.py"
    done = run_command("python", script, tier, "--runs", 2, "--tokens", 2)
    pattern = r"{}: outlier-mlx \d+\.\d+ s, mlx_lm \d+\.\d+ s, ratio \d+\.\d+ \(.* 2 pairs\)\n"
    assert re.fullmatch("".join(map(pattern.format, ("wall", "cpu"))), done.out)
