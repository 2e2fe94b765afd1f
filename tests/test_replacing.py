"""Folders are replaced only when they are ours, and nothing is lost if the run is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.errors import OutlierError, OutputExistsError
from outlier_mlx.writing.folders import check_free, remove_folder, whole_folder
from outlier_mlx.writing.interrupts import undivided
from outlier_mlx.writing.manifest import check_files, find_manifest
from tests.folders import names, snapshot, text_of, write_ours
from tests.program import run

# What changes a disk; of files that are opened, those for writing.
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")
INTERRUPTED = 130


def dies_at(
    step: int,
    work: Callable[[], object],
    changes: Sequence[str] = CHANGES,
    number: int = signal.SIGKILL,
    times: int = 1,
) -> bool:
    """Do some work in a process that gets a signal before its change number `step` to the disk.

    Args:
        step: which change, from 1 on.
        work: what to do.
        changes: what counts, as Python's audit events call it.
        number: the signal: SIGKILL, or SIGINT as for Ctrl-C.
        times: how often it comes; again at each change that follows.

    Returns:
        Whether it came to that; otherwise the work is done.
    """
    child = os.fork()
    if child == 0:
        left = step

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if event not in changes or reads:
                return
            left -= 1
            if -times < left <= 0:
                os.kill(os.getpid(), number)

        status = 1
        try:
            warnings.simplefilter("ignore")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.addaudithook(watch)
            work()
            status = 0
        except KeyboardInterrupt:
            status = INTERRUPTED
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, INTERRUPTED)
    return os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == INTERRUPTED


def write(target: Path, text: str, *, keep: bool = False) -> None:
    with whole_folder(target, force=True, keep=keep) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "experts.bin").write_text(text)
        write_ours(folder, text)


@contextmanager
def told() -> Iterator[list[str]]:
    """What warnings say in the block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines: list[str] = []
        yield lines
    lines += [str(warning.message) for warning in caught]


def whole_text(folder: Path) -> str:
    """The text of a folder, every file of which is as its manifest says."""
    manifest = find_manifest(folder)
    assert manifest is not None
    check_files(folder, manifest)
    return str(text_of(folder))


def killed_at_each_step(
    tmp_path: Path, *, keep: bool = False, former: bool = True, **how: Any
) -> Iterator[tuple[Path, list[str]]]:
    """Places in which a run into `tier` was killed one step later each, and what is beside it.

    `how` is for `dies_at`.
    """
    for step in count(1):
        place = tmp_path / str(step)
        place.mkdir()
        (place / "mine").write_text("mine")
        target = place / "tier"
        if former:
            write(target, "old")
        if not dies_at(step, partial(write, target, "new", keep=keep), **how):
            assert names(place) == ["mine", "tier"] and whole_text(target) == "new"
            assert step > 12
            return
        yield target, [name for name in names(place) if name not in ("mine", "tier")]


@pytest.mark.parametrize("keep", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_replacement_killed_at_any_step(tmp_path: Path, keep: bool) -> None:
    """The next run restores the old folder, or finds the new one, and says what it found."""
    texts = []
    for target, left in killed_at_each_step(tmp_path, keep=keep):
        with told() as lines, pytest.raises(OutputExistsError, match="--force replaces it"):
            check_free(target, force=False)
        assert names(target.parent) == ["mine", "tier"]
        texts.append(whole_text(target))
        assert len(lines) == len(left) and all("run" in line for line in lines)
        write(target, "newer")
        assert names(target.parent) == ["mine", "tier"] and whole_text(target) == "newer"
    assert texts == sorted(texts, reverse=True) and set(texts) == {"old", "new"}


def test_a_new_folder_killed_at_any_step(tmp_path: Path) -> None:
    for target, _ in killed_at_each_step(tmp_path, former=False):
        there = target.exists()
        with told():
            check_free(target, force=True)
        assert names(target.parent) == (["mine", "tier"] if there else ["mine"])
        assert not there or whole_text(target) == "new"


@pytest.mark.slow
def test_killed_and_killed_again_while_that_is_settled(tmp_path: Path) -> None:
    """Of some steps each; the test marked slow takes them all."""
    kill_twice(tmp_path, every=7)


@pytest.mark.slow
def test_killed_at_any_step_and_again_at_any_step(tmp_path: Path) -> None:
    kill_twice(tmp_path, every=1)


def kill_twice(tmp_path: Path, every: int) -> None:
    for n, (target, left) in enumerate(killed_at_each_step(tmp_path)):
        if not left or n % every:
            continue
        for step in count(1, every):
            place = shutil.copytree(target.parent, tmp_path / f"{n} {step}")
            again = place / "tier"
            died = dies_at(step, partial(check_free, again, force=True))
            with told():
                write(again, "newer")
            assert names(place) == ["mine", "tier"] and whole_text(again) == "newer"
            if not died:
                break
            shutil.rmtree(place)
            shutil.copytree(target.parent, place)
            dies_at(step, partial(check_free, again, force=True))
            with told():
                check_free(again, force=True)
            assert names(place) == ["mine", "tier"]
            assert whole_text(again) in ("old", "new")


@pytest.mark.slow
def test_a_folder_that_is_renamed_after_the_kill_is_not_replaced_by_half_of_the_old(
    tmp_path: Path,
) -> None:
    for target, _ in killed_at_each_step(tmp_path):
        if target.exists():
            target.rename(target.with_name("elsewhere"))
        with told():
            check_free(target, force=True)
        found = {p.name: whole_text(p) for p in target.parent.iterdir() if p.is_dir()}
        assert found in (
            {"elsewhere": "old"},
            {"tier": "old"},  # killed between the renames
            {"elsewhere": "new", "tier": "old"},  # before it was recorded that the new is in place
            {"elsewhere": "new"},
        )


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, Path]:
    """A folder that is missing, because a run was killed between its renames; and the run's."""
    target = tmp_path / "killed" / "tier"
    write(target, "old")
    # Records and the manifest are renamed, too; the fifth is what gives the new folder its name.
    assert dies_at(5, lambda: write(target, "new"), ["os.rename"]) and not target.exists()
    (left,) = target.parent.iterdir()
    return target, left


def test_what_somebody_puts_in_its_place_stays_and_so_does_the_old(
    killed: tuple[Path, Path],
) -> None:
    target, left = killed
    target.mkdir()
    (target / "thesis.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(OutputExistsError, match=rf"{left}/former: move that elsewhere"):
            check_free(target, force=force)
    assert names(target) == ["thesis.txt"]
    assert whole_text(left / "former") == "old"


def test_only_a_whole_folder_is_restored(killed: tuple[Path, Path]) -> None:
    target, left = killed
    (left / "former" / "config.json").unlink()
    before = snapshot(target.parent)
    with pytest.raises(OutputExistsError, match="former: move that elsewhere"):
        check_free(target, force=True)
    assert snapshot(target.parent) == before


def test_nothing_is_restored_from_the_folder_of_another_run(killed: tuple[Path, Path]) -> None:
    target, left = killed
    planted = left.rename(left.with_name(".tier.part-planted"))
    write_ours(target.with_name(".tier.part-0.replaced"), "planted")
    (target.parent / ".tier.part-file").write_text("mine")
    before = snapshot(target.parent)
    with told() as lines:
        check_free(target, force=True)
    assert snapshot(target.parent) == before
    assert len(lines) == 3 and all("left alone" in line for line in lines)
    with told():
        write(target, "new")
    assert whole_text(planted / "former") == "old" and whole_text(target) == "new"


def test_a_folder_in_the_place_of_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    kept = tmp_path / ".tier.part-kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("precious")
    with told(), pytest.raises(OutputExistsError, match="no run of outlier-mlx made it"):
        write(tmp_path / "tier", "new", keep=True)
    assert names(kept) == ["thesis.txt"] and names(tmp_path) == [".tier.part-kept"]


def test_what_others_put_into_the_folder_of_a_run_stays(killed: tuple[Path, Path]) -> None:
    target, left = killed
    (left / "thesis.txt").write_text("precious")
    with told() as lines:
        check_free(target, force=True)
    assert whole_text(target) == "old" and (left / "thesis.txt").exists()
    with told() as lines:
        write(target, "new")
    assert lines and "could not be removed" in lines[0] and left.name in lines[0]
    assert (left / "thesis.txt").read_text() == "precious"


# Named by commands


@pytest.mark.parametrize("command", ["verify", "info"])
def test_leftovers_are_named_by(command: str, place: Path, tmp_path: Path) -> None:
    tier = shutil.copytree(place / "tier", tmp_path / "tier")
    assert run(command, tier).err == ""
    dies_at(9, lambda: write(tier, "new"))
    (left,) = (name for name in names(tmp_path) if name != "tier")
    before = snapshot(tmp_path)
    found = run(command, tier)
    assert f"warning: {tier}: a run that was killed left {tmp_path / left}: the next" in found.err
    with whole_folder(tmp_path / "other", keep=True) as folder:  # a run that lives is no leftover
        assert run(command, tier).err == found.err
        (folder.parent / "journal.jsonl").write_text("")
        assert snapshot(tmp_path).items() >= before.items()


def test_a_tier_that_is_set_aside_is_found(killed: tuple[Path, Path]) -> None:
    target, left = killed
    found = run("verify", target, code=1).err.splitlines()
    assert found[0].startswith(f"warning: {target}: a run that was killed set it aside in {left}")
    assert found[1].endswith("no such folder")
    assert "set it aside" in run("info", target, code=1).err


def test_the_next_run_names_what_it_removes_and_restores(
    killed: tuple[Path, Path], place: Path
) -> None:
    target, _ = killed
    found = run("convert", place / "overlay", "--out", target, code=1).err.splitlines()
    assert found[0] == f"warning: {target}: restored: a run that was killed had set it aside"
    assert found[1] == f"error: {target}: exists; --force replaces it"
    dies_at(9, lambda: write(target, "new"))
    found = run("convert", place / "overlay", "--out", target, code=1).err.splitlines()
    assert found[0].startswith(f"warning: {target}: removed: .tier.part-")
    assert len(found) == 2


# Signals


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_at_any_step(tmp_path: Path, times: int) -> None:
    """Nothing is left, also if it is pressed again while the first is cleaned up after."""
    texts = []
    for target, left in killed_at_each_step(tmp_path, number=signal.SIGINT, times=times):
        assert not left
        texts.append(whole_text(target))
    assert texts == sorted(texts, reverse=True) and set(texts) == {"old", "new"}


def test_ctrl_c_while_the_old_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rmtree = tmp_path / "tier", shutil.rmtree
    write(target, "old")
    pressed = []

    def pressing(path: Path, *args: Any, **kwargs: Any) -> None:
        pressed.append(path.name)
        os.kill(os.getpid(), signal.SIGINT)
        rmtree(path, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(shutil, "rmtree", pressing)
    with pytest.raises(KeyboardInterrupt):
        write(target, "new")
    assert "former" in pressed
    assert names(tmp_path) == ["tier"] and whole_text(target) == "new"


def test_a_step_is_not_divided_by_signals() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with undivided(), undivided():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("step")
        done.append("never")
    assert done == ["step"]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_removal_killed_at_any_step(tmp_path: Path) -> None:
    """The folder is whole, or has lost its name: then the next removal clears the rest."""
    for step in count(1):
        place = tmp_path / str(step)
        place.mkdir()
        target = place / "tier"
        write(target, "old")
        if not dies_at(step, partial(remove_folder, target)):
            assert names(place) == []
            assert step > 5
            return
        if target.exists():
            assert whole_text(target) == "old"
        with told(), suppress(OutlierError):  # there may be nothing to remove
            remove_folder(target)
        assert names(place) == []


def test_only_what_this_project_wrote_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tier", "old")
    (tmp_path / "link").symlink_to("tier")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name in ("link", "theirs", "empty", "missing"):
        with pytest.raises(OutlierError, match=name):
            remove_folder(tmp_path / name)
    with monkeypatch.context() as at:
        at.chdir(tmp_path / "tier")
        with pytest.raises(OutlierError, match="current folder"):
            remove_folder(Path())
    (tmp_path / "tier" / "mine").write_text("mine")
    with pytest.raises(OutlierError, match="holds mine"):
        remove_folder(tmp_path / "tier")
    assert names(tmp_path) == ["empty", "link", "theirs", "tier"]
