"""Conversions with `--stream` that are interrupted anywhere resume there."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import outlier_mlx
from outlier_mlx.errors import CheckpointWarning, OutlierError
from outlier_mlx.writing.folders import whole_folder
from tests.folders import names, tier_contents
from tests.hub import Hub, variables
from tests.program import run_command
from tests.stream.streaming import ORDER, OVERLAY_FILE, Models, fetched, stream, unfinished


@pytest.mark.slow
def test_resumed_at_the_file_it_was_at(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    for n, name in enumerate(ORDER):
        served.requests.clear()
        kept = unfinished(tmp_path, stop_at, name)
        # All but the first are resumed, and have just one file to fetch before the next.
        assert fetched(served) == ORDER[max(0, n - 1) : n]
        assert len((kept / "journal.jsonl").read_text().splitlines()) == 1 + n
    served.down, served.on_file = False, None
    served.requests.clear()
    stream(tmp_path / "tier")
    assert fetched(served) == ORDER[-1:]
    assert tier_contents(tmp_path / "tier") == tier_contents(models.tier(1))
    # Nothing went into the hub's cache.
    assert names(tmp_path) == ["tier"]


@pytest.mark.slow
def test_interrupted_anywhere(served: Hub, models: Models, tmp_path: Path) -> None:
    """Ctrl-C at any moment: between bytes of a file, between files, while checksums are taken."""
    calls: list[int] = []
    stream(tmp_path / "first", progress=lambda done, _: calls.append(done))
    chance = random.Random(0)
    total = calls[-1]

    def interrupt_at(moment: int) -> Callable[[int, int], None]:
        def interrupt(done: int, expected: int) -> None:
            assert done <= expected == total
            if done >= moment:
                raise KeyboardInterrupt

        return interrupt

    for moment in sorted(chance.sample(calls, 3)):
        with pytest.raises(KeyboardInterrupt), pytest.warns(match="unfinished"):
            stream(tmp_path / "tier", progress=interrupt_at(moment))
    calls.clear()
    stream(tmp_path / "tier", progress=lambda done, _: calls.append(done))
    assert calls == sorted(calls) and calls[-1] == total
    assert tier_contents(tmp_path / "tier") == tier_contents(models.tier(1))


def test_a_disk_that_fills_up(
    served: Hub, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.pwrite, [20]

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    said = pytest.warns(match="unfinished")
    with pytest.raises(OutlierError, match="cannot write: No space left on device"), said:
        stream(tmp_path / "tier")
    monkeypatch.setattr(os, "pwrite", real)
    done = fetched(served)
    served.requests.clear()
    stream(tmp_path / "tier")
    assert done + fetched(served) == ORDER
    assert tier_contents(tmp_path / "tier") == tier_contents(models.tier(1))


def move(hub: Hub, models: Models, *, gone: bool) -> tuple[str, str]:
    """Let `main` of the overlay be its second commit; returns both."""
    (first,) = hub.repos["owner/overlay"].commits
    _, second = hub.add("owner/overlay", models.overlay(1), models.overlay(2))
    if gone:
        del hub.repos["owner/overlay"].commits[first]
    return first, second


@pytest.mark.parametrize("gone", [False, True])
def test_a_revision_that_moves(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None], gone: bool
) -> None:
    """An unfinished run resumes with its commit, or restarts with the other: never with both."""
    unfinished(tmp_path, stop_at, ORDER[-1])
    first, second = move(served, models, gone=gone)
    if gone:
        # The base would not fit the new overlay.
        served.repos["owner/base"].commits[served.repos["owner/base"].refs["main"]] = models.base(2)
    served.down, served.on_file = False, None
    served.requests.clear()
    said = f"main is now {second[:12]}.*{first[:12]}"
    said += ".*gone: starting again" if gone else ".*resuming with that"
    with pytest.warns(CheckpointWarning, match=said):
        stream(tmp_path / "tier")
    assert len(fetched(served)) == (4 if gone else 1)
    assert tier_contents(tmp_path / "tier") == tier_contents(models.tier(2 if gone else 1))
    manifest = json.loads((tmp_path / "tier" / "tier.json").read_text())
    assert manifest["overlay"]["revision"] == (second if gone else first)


@pytest.mark.slow
def test_an_unfinished_run_with_other_settings(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    kept = unfinished(tmp_path, stop_at, ORDER[2])
    before = (kept / "journal.jsonl").read_bytes()
    served.down, served.on_file = False, None
    (tmp_path / "alphas.json").write_text(json.dumps({"1": {"0": 2.0}}))
    others: dict[str, dict[str, Any]] = {
        "recipe": {"tier": "q8"},
        "alphas": {"alpha": tmp_path / "alphas.json"},
        "overlay": {"revision": "v1"},
    }
    for what, options in others.items():
        with pytest.raises(OutlierError, match=rf"other settings \({what}\).*--force"):
            stream(tmp_path / "tier", **options)
        assert (kept / "journal.jsonl").read_bytes() == before
    served.requests.clear()
    stream(tmp_path / "tier", tier="q8", force=True)
    assert len(fetched(served)) == 4
    expected = outlier_mlx.convert(models.overlay(1), models.base(1), tmp_path / "q8", tier="q8")
    assert tier_contents(tmp_path / "tier") == tier_contents(expected)
    assert not kept.exists()


def test_a_local_base_that_changes_under_an_unfinished_run(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    base = Path(shutil.copytree(models.base(1), tmp_path / "base"))
    stop_at(OVERLAY_FILE)
    with pytest.raises(OutlierError), pytest.warns(match="unfinished"):
        outlier_mlx.convert("owner/overlay", base, tmp_path / "tier", stream=True)
    served.down, served.on_file = False, None
    shard = sorted(base.glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 1))
    with pytest.raises(OutlierError, match=r"other settings \(files\)"):
        outlier_mlx.convert("owner/overlay", base, tmp_path / "tier", stream=True)


def test_what_an_unfinished_run_left_was_touched(
    served: Hub, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    kept = unfinished(tmp_path, stop_at, ORDER[2])
    served.down, served.on_file = False, None
    (shard,) = (kept / "whole").glob("*.safetensors")
    shard.rename(kept / "elsewhere")
    with pytest.raises(OutlierError, match="files are missing"), pytest.warns(match="unfinished"):
        stream(tmp_path / "tier")
    for text in ("nonsense\n", "[]\n", "{}\n[]\n", '{"overlay": 1}\n{"done": 1}\n'):
        (kept / "journal.jsonl").write_text(text)
        with pytest.raises(OutlierError, match="not a journal; delete"):
            stream(tmp_path / "tier")


def test_a_run_without_stream_leaves_it_alone_until_the_tier_is_there(
    served: Hub, models: Models, tmp_path: Path, stop_at: Callable[[str], None]
) -> None:
    kept = unfinished(tmp_path, stop_at, OVERLAY_FILE)
    with pytest.raises(OutlierError):
        outlier_mlx.convert(tmp_path, models.base(1), tmp_path / "tier")
    assert (kept / "journal.jsonl").exists()
    with pytest.warns(CheckpointWarning, match="tier: removed the unfinished run in"):
        outlier_mlx.convert(models.overlay(1), models.base(1), tmp_path / "tier")
    assert not kept.exists() and tier_contents(tmp_path / "tier") == tier_contents(models.tier(1))


def test_two_runs_into_one_place(served: Hub, tmp_path: Path) -> None:
    with whole_folder(tmp_path / "tier") as folder:
        with pytest.raises(OutlierError, match="another run is writing it"):
            stream(tmp_path / "tier")
        (folder / "tier.json").write_text("")
    with whole_folder(tmp_path / "other", keep=True) as folder:
        with pytest.raises(OutlierError, match="another run is writing it"):
            outlier_mlx.convert("owner/overlay", "owner/base", tmp_path / "other")
        (folder / "tier.json").write_text("")


@pytest.mark.slow
def test_killed(served: Hub, models: Models, tmp_path: Path) -> None:
    """SIGKILL while any of the files is fetched; each run goes on where the one before was."""
    script = (
        "import sys; from outlier_mlx.storage import remote; remote.SMALL_BYTES = 2000;"
        "import outlier_mlx; outlier_mlx.convert('owner/overlay', 'owner/base', sys.argv[1],"
        " stream=True)"
    )
    environment = variables(served, tmp_path / "home", TMPDIR=str(tmp_path))
    out = tmp_path / "out" / "tier"
    command = [sys.executable, "-c", script, str(out)]
    running: list[subprocess.Popen[bytes]] = []

    def kill_at(name: str) -> Callable[[str, str, str | None], None]:
        def kill(method: str, file: str, part: str | None) -> None:
            if method == "GET" and file == name and part is None:
                running[-1].kill()

        return kill

    for name in ORDER:
        served.requests.clear()
        served.on_file = kill_at(name)
        running.append(subprocess.Popen(command, env=environment))
        assert running[-1].wait() == -9
        assert len(fetched(served)) <= 2
        assert names(out.parent) == [".tier.part-kept"]
    served.on_file = None
    run_command(*command, env=environment)
    assert tier_contents(out) == tier_contents(models.tier(1))
    assert names(out.parent) == ["tier"]
