"""Folders that are named by "." or "..": messages and tables call them by their own names."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlier_mlx import open_overlay
from outlier_mlx.engine import memory
from outlier_mlx.engine.machine import Budget
from outlier_mlx.errors import CheckpointWarning
from outlier_mlx.storage.hub import resolve
from outlier_mlx.storage.paths import named
from outlier_mlx.terminal import count, size
from tests.builders import Built
from tests.damage import add_tensor
from tests.folders import copy_writable
from tests.program import assert_refused, run
from tests.refusals import shape


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "sub")
    assert named(".") == tmp_path / "model" / "sub" and named("..") == tmp_path / "model"
    assert named("../sub/..") == tmp_path / "model"
    assert named("sub") == Path("sub") and named("../sub") == Path("../sub")
    assert resolve("..").folder.name == resolve("..").name == "model"


def test_the_current_folder_is_called_by_its_name(
    tier: Path, overlay: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = copy_writable(tier, tmp_path / "here")
    monkeypatch.chdir(here)
    assert run("info", ".").out.startswith("here: ")
    assert run("verify", ".").out.startswith(f"{here}: whole")
    with monkeypatch.context() as patch:
        patch.setattr(memory, "budget", lambda: Budget(10, "this machine"))
        assert "here needs" in run("generate", ".", "-p", "x", code=1).err
    there = copy_writable(overlay.path, tmp_path / "there")
    add_tensor(there, "model.extra.weight", shape(2))
    monkeypatch.chdir(there)
    with pytest.warns(CheckpointWarning, match="^there: ignored: unknown tensors"):
        open_overlay(".")
    (there / "config.json").unlink()
    assert_refused(run("import", ".", "--out", "../out", code=1), "there: no config.json")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (999_999_999, "1.00 GB"),
        (12_345_678_901, "12.35 GB"),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
    assert count(999_999) == "1.0 M"
