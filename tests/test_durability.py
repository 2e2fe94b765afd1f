"""What is written is on the disk before it takes its name, and before what it replaces is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.storage import output
from outlier_mlx.storage.output import write_whole
from outlier_mlx.writing import writer
from tests.folders import names, snapshot
from tests.program import run

Event = tuple[str, str]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Event]:
    """What happens to files and folders in `tmp_path`: "sync", "rename", "remove", with the name.

    Names are those that they have at that moment; a renamed one is named as before.
    """
    happened: list[Event] = []

    def note(what: str, path: object) -> None:
        text = os.fspath(path) if isinstance(path, str | Path) else str(path)
        if text.startswith(str(tmp_path)):
            happened.append((what, os.path.relpath(text, tmp_path)))

    def noted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *more: Any, **named: Any) -> Any:
            if os.path.lexists(path):
                note(what, path)
            return function(path, *more, **named)

        return call

    def fsync(handle: int) -> None:
        note("sync", name_of(handle))

    monkeypatch.setattr(os, "fsync", fsync)
    for what, name in (("rename", "rename"), ("rename", "replace"), ("remove", "unlink")):
        monkeypatch.setattr(os, name, noted(what, getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", noted("remove", shutil.rmtree))
    return happened


def name_of(handle: int) -> str:
    """The name of an open file or folder."""
    if hasattr(fcntl, "F_GETPATH"):
        return fcntl.fcntl(handle, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
    return str(Path(f"/proc/self/fd/{handle}").readlink())


def test_a_file(tmp_path: Path, events: list[Event]) -> None:
    write_whole(tmp_path / "alpha.json", "new")
    (part,) = {name for what, name in events if what == "rename"}
    assert events[:3] == [("sync", part), ("rename", part), ("sync", ".")]
    assert part.startswith(".alpha.")


def test_a_folder(place: Path, tmp_path: Path, events: list[Event]) -> None:
    tier = shutil.copytree(place / "tier", tmp_path / "tier")
    events.clear()
    run("convert", place / "overlay", "--out", tier, "--force", "--quiet")
    (run_folder,) = {name.split("/")[0] for _, name in events if name.startswith(".tier.part-")}
    whole, former = f"{run_folder}/whole", f"{run_folder}/former"
    aside, placed = events.index(("rename", "tier")), events.index(("rename", whole))
    before, between, after = events[:aside], events[aside:placed], events[placed:]
    for name in names(tier):
        assert ("sync", f"{whole}/{name}") in before, name
        assert ("sync", whole) in before[before.index(("sync", f"{whole}/{name}")) :]
    for folder in (whole, run_folder, "."):
        assert ("sync", folder) in before
    assert before[-1] == ("sync", run_folder)  # what it replaces is on record
    assert between == [("rename", "tier")]
    gone = after.index(("remove", former))
    for folder in (run_folder, "."):
        assert ("sync", folder) in after[:gone]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_late(
    place: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that only waiting for the disk brings up is no success."""
    tier = shutil.copytree(place / "tier", tmp_path / "tier")
    before = tier.stat().st_ino

    def fsync(handle: int) -> None:
        if name_of(handle).endswith(".safetensors"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    told = run("convert", place / "overlay", "--out", tier, "--force", "--quiet", code=1).err
    assert told == f"error: {tier}: cannot write: {os.strerror(code)}\n"
    assert tier.stat().st_ino == before and names(tmp_path) == ["tier"]


def test_an_error_of_the_disk_that_is_told_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush while more is written may be all that ever tells of it: the writer raises it."""
    errors = [OSError(errno.EIO, os.strerror(errno.EIO))]
    flushed = []

    def fsync(handle: int) -> None:
        flushed.append(os.fstat(handle).st_size)
        if errors:
            raise errors.pop()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(writer, "_FLUSHED", 1000)
    spec = writer.TensorSpec("weight", "U8", (3000,))
    with (
        writer.ShardedWriter(tmp_path, [spec]) as shards,
        pytest.raises(OSError, match=os.strerror(errno.EIO)),
    ):
        for _ in range(3):
            shards.write("weight", bytes(1000))
        shards.finish()
    assert flushed


def test_the_old_folder_stays_until_the_new_name_is_on_the_disk(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = shutil.copytree(place / "tier", tmp_path / "tier")
    before = snapshot(tier)

    def fsync(handle: int) -> None:
        if name_of(handle) == str(tmp_path) and list(tmp_path.glob(".tier.part-*/former")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    told = run("convert", place / "overlay", "--out", tier, "--force", "--quiet", code=1).err
    assert told == f"error: {tier}: cannot write: {os.strerror(errno.EIO)}\n"
    (former,) = tmp_path.glob(".tier.part-*/former")
    assert snapshot(former) == before


def test_a_file_system_that_cannot_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EINVAL)))
    with pytest.raises(OSError):
        write_whole(tmp_path / "a", "newer")
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a"]


def test_on_macos_the_disk_itself_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, fsync alone leaves data in the drive; network drives know nothing else."""
    asked: list[int] = []

    def control(handle: int, command: int) -> None:
        asked.append(command)
        if len(asked) > 2:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    synced: list[int] = []
    monkeypatch.setattr(output.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(output.fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", synced.append)
    write_whole(tmp_path / "a", "new")
    assert asked == [51, 51] and not synced
    write_whole(tmp_path / "a", "newer")
    assert len(synced) == 2
