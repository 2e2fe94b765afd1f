"""The runner that tests use in this process does what the program does."""

import os
import sys
import warnings
from pathlib import Path

import pytest

from tests.builders import write_overlay
from tests.program import run, run_program


@pytest.mark.parametrize(
    ("line", "code"), [("--version", 0), ("genrate", 2), ("info nowhere", 1), ("info overlay", 0)]
)
def test_both_end_alike(
    line: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_overlay(tmp_path / "overlay", layers=1, moe_layers=(0,))
    monkeypatch.chdir(tmp_path)
    done = run(*line.split(), code=code)
    assert done.both
    assert done == run_program(*line.split(), code=code)


def test_a_warning_is_told_each_time_and_nothing_stays(tmp_path: Path) -> None:
    overlay = write_overlay(tmp_path / "overlay", layers=1, moe_layers=(0,), tokenizer=False).path
    before = dict(os.environ), sys.argv, sys.stdout, warnings.showwarning, list(warnings.filters)
    for name in "ab":
        done = run("convert", overlay, "--out", tmp_path / name, "--quiet", env={"COLUMNS": "30"})
        assert done.err.startswith("warning: overlay: no tokenizer")
    after = dict(os.environ), sys.argv, sys.stdout, warnings.showwarning, list(warnings.filters)
    assert after == before
