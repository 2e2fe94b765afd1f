"""The command `merge`, and merges that end early."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.errors import OutlierError
from outlier_mlx.merge import merge
from outlier_mlx.writing.writer import ShardedWriter
from tests.merging import prompts, write_merge_config, write_models
from tests.program import assert_refused, run

EXPERT = {"source_model": "./expert_0", "positive_prompts": ["a"]}
OTHER = {"source_model": "./expert_1", "positive_prompts": ["b"]}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("sound"))


def test_the_command(sound: Path, tmp_path: Path) -> None:
    held_out = [EXPERT | {"held_out": prompts(0, 2, seed=1)}, OTHER]
    file = write_merge_config(sound, experts=held_out)
    out = tmp_path / "out"
    shown = run("merge", file, "--out", out, "--bits", 4, "--group-size", 32)
    assert "\nquantization: 4 bits, groups of 32\n" in run("info", out).out
    assert shown.out == ""
    for part in ("Mixtral of 2 experts", "held-out", "condition", "note: every token", "wrote "):
        assert part in shown.err
    again = run("merge", file, "--out", out, code=1)
    assert_refused(again, "exists; --force replaces it")
    found = run("merge", file, "--out", out, "--force", "--quiet", "--json")
    assert found.err == ""
    assert found.json == json.loads((out / "merge.json").read_text())
    run("merge", file, code=2)
    run("merge", file, "--out", out, "--bits", 3, code=2)
    silent = run("merge", file, "--out", out, "--force", "--quiet", "--no-measure")
    assert silent.both == ""
    run("verify", out)
    run("info", out)


@pytest.mark.parametrize("stage", ["running the base", "routing", "writing"])
def test_ctrl_c_leaves_nothing(sound: Path, tmp_path: Path, stage: str) -> None:
    file = write_merge_config(sound)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    def stages(title: str, unit: str) -> Any:
        return nullcontext(interrupt if title == stage else lambda done, total: None)

    with pytest.raises(KeyboardInterrupt):
        merge(file, tmp_path / "deep" / "out", stages=stages)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_model(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = write_merge_config(sound), tmp_path / "out"
    merge(file, out, measure=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(self: ShardedWriter, name: str, chunk: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(OutlierError, match="No space left"):
        patched.setattr(ShardedWriter, "write", full)
        merge(file, out, measure=False, bits=4, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(OutlierError, match=r"takes .* kB, but only 1 B"):
        merge(file, tmp_path / "new", stages=lambda title, unit: pytest.fail(title))


def test_a_source_is_never_replaced(tmp_path: Path) -> None:
    write_models(tmp_path)
    with pytest.raises(OutlierError, match="not a"):
        merge(write_merge_config(tmp_path), tmp_path / "base", measure=False, force=True)
