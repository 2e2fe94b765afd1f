"""Runs: the hidden folder beside an output in which it is made, and what becomes of that folder.

    .NAME.part-1a2b3c4d/    locked while its run lives
        run.json            the record: which run made this folder, and what it replaces
        whole/              the new folder, until it takes the output's name
        former/             the folder that it replaces, until that is removed
        fetched/            source files of a run with `--stream`
        journal.jsonl       what a run with `--stream` has done: such a run can be resumed

A run can be killed at any moment, and the power can fail. The next run into the same place restores
or removes what the record tells, and nothing else.
"""

import fcntl
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import outlier_mlx
from outlier_mlx.errors import CheckpointError, CheckpointWarning, OutputExistsError
from outlier_mlx.storage.output import is_part, sync, write_json
from outlier_mlx.storage.paths import entries, files_below
from outlier_mlx.storage.texts import read_json

RECORD = "run.json"
WHOLE = "whole"
FORMER = "former"
FETCHED = "fetched"
#: File that lists what a run with `--stream` has done. A folder that has it is kept.
JOURNAL = "journal.jsonl"

# Seconds that a lock may be held by another program before a line tells of it, as tries and pauses.
_TRIES, _PAUSE = 10, 0.05

State = Literal["running", "unfinished", "rest", "set aside", "in the way", "unknown"]
# What a leftover means to the user, by what it is; without an entry, there is nothing to tell.
_MEANINGS: dict[State, str] = {
    "unfinished": "an unfinished run is in {folder}: the same command with --stream resumes it",
    "rest": "a run that was killed left {folder}: the next run into {name} removes it",
    "set aside": "a run that was killed set it aside in {folder}: the next run into {name}"
    " restores it",
    "in the way": "a run that was killed left what was in its place in {folder}/former: move that"
    " elsewhere, or delete it",
    "unknown": "{folder} is named like what a killed run leaves, but has no record of a run: it is"
    " left alone",
}


class Run:
    """The hidden folder of a run into `target`.

    Args:
        target: the folder that is made; an absolute path.
        folder: the hidden folder beside it.
    """

    def __init__(self, target: Path, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.whole, self.former = folder / WHOLE, folder / FORMER
        self._handle: int | None = None

    def begin(self) -> None:
        """Make the folder and lock it, or take over what an earlier run left to be resumed.

        Raises:
            OSError: it cannot be made.
            OutputExistsError: what is there is not of a run.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.state() == "unknown":
            raise OutputExistsError(f"{self.folder}: no run of outlier-mlx made it: move it away")
        self._handle = os.open(self.folder, os.O_RDONLY)
        lock(self._handle, fcntl.LOCK_EX)  # others look at the lock for an instant
        if not self._is_recorded():
            self._record(run=self.folder.name, producer=f"outlier-mlx {outlier_mlx.__version__}")
        self.whole.mkdir(exist_ok=True)

    def place(self) -> None:
        """Give `whole` the target's name; what had it is set aside, and then removed.

        `whole` must be on the disk already, see `sync_tree`.

        Raises:
            OSError: it cannot be renamed; `end` restores the target then.
        """
        if self.target.exists():
            self._record(replaces=_sizes(self.target), by=_sizes(self.whole))
            self.target.rename(self.former)
        self.whole.rename(self.target)
        sync(self.target.parent)
        self._clear()

    def discard(self) -> None:
        """Take the target's name from it, for good: `end` removes it.

        Raises:
            OSError: it cannot be renamed.
        """
        self._record(placed=True)
        self.target.rename(self.former)
        sync(self.target.parent)

    def end(self) -> None:
        """Restore what was set aside, remove the folder if it cannot be resumed, and unlock it."""
        if self._handle is not None:
            try:
                if self.folder.exists():
                    self.settle()
            finally:
                os.close(self._handle)
                self._handle = None

    def settle(self) -> None:
        """Restore or remove what the record tells."""
        state = self.state()
        if state == "set aside":
            self.former.rename(self.target)
            sync(self.folder)
            sync(self.target.parent)
        if state in ("set aside", "rest"):
            self._clear()

    def state(self) -> State:
        """What the folder is.

        Returns:
            "running": of a living process; "unfinished": of a run that can be resumed; "rest": no
            longer of use; "set aside": it holds the target, whole, and nothing is in its place; "in
            the way": it holds what was the target, but it is not clear whether that may go;
            "unknown": no run of this project made it.
        """
        if self.folder.is_symlink() or not self.folder.is_dir():
            return "unknown"
        if self._handle is None and _is_locked(self.folder):
            return "running"
        if (self.folder / JOURNAL).exists():
            return "unfinished"
        if not self._is_recorded():  # killed before it could
            return "unknown" if set(self._names()) - {RECORD} else "rest"
        record = self._read()
        placed = not self.whole.exists() and record.get("by") == _sizes(self.target)
        if placed or record.get("placed") or not self.former.exists():
            return "rest"
        is_whole = record.get("replaces") == _sizes(self.former)
        return "set aside" if is_whole and not os.path.lexists(self.target) else "in the way"

    def remove(self) -> None:
        """Remove the folder with what runs write into it, the record last; all else stays."""
        for name in (WHOLE, FORMER, FETCHED):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if set(self._names()) <= {RECORD, JOURNAL}:
            for path in entries(self.folder, hidden=True):  # the record is the last
                path.unlink()
            self.folder.rmdir()

    def _clear(self) -> None:
        """Remove the folder of a run that has ended."""
        if self.former.exists():
            # Whatever else has its name now must be on the disk.
            sync(self.folder)
            sync(self.target.parent)
            # The room that the former folder takes may be needed for this.
            with suppress(OSError):
                self._record(placed=True)
        self.remove()

    def _is_recorded(self) -> bool:
        """Whether the record is of the run that made this very folder."""
        return self._read().get("run") == self.folder.name

    def _record(self, **fields: Any) -> None:
        """Add fields to the record; it is on the disk afterwards."""
        write_json(self.folder / RECORD, self._read() | fields)

    def _read(self) -> dict[str, Any]:
        try:
            return read_json(self.folder / RECORD)
        except (CheckpointError, OSError):
            return {}

    def _names(self) -> list[str]:
        """What is in the folder, without files that were cut off."""
        names = [path.name for path in entries(self.folder, hidden=True)]
        return [name for name in names if not is_part(name)]


def new_run(target: Path) -> Run:
    """A run that is not begun yet."""
    return Run(target, target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}"))


def kept_run(target: Path) -> Run:
    """The run with `--stream`, which begins, or resumes where an earlier one stopped."""
    target = Path(os.path.abspath(target))  # noqa: PTH100 - a link stays a link
    return Run(target, target.with_name(f"{_prefix(target)}kept"))


def clear_leftovers(target: Path) -> None:
    """Remove what killed runs left beside a folder, or restore it, and name that in a warning.

    A running process holds a lock on its folder. Folders that can be resumed stay.

    Args:
        target: the folder; an absolute path.

    Raises:
        OutputExistsError: another run is writing it, or what a run left cannot be settled.
    """
    for run in _runs(target):
        state = run.state()
        if state == "running":
            raise OutputExistsError(f"{target}: another run is writing it")
        if state == "in the way":
            raise OutputExistsError(f"{target}: {_meaning(run, state)}")
        if state == "unknown":
            tell(f"{target}: {_meaning(run, state)}")
        run.settle()
        if state == "set aside":
            tell(f"{target}: restored: a run that was killed had set it aside")
        elif state == "rest":
            gone = "removed" if not run.folder.exists() else "could not be removed"
            tell(f"{target}: {gone}: {run.folder.name}, which a run left that was killed")


def name_leftovers(folder: Path) -> None:
    """Name in warnings what killed and unfinished runs left beside a folder; nothing changes."""
    target = Path(os.path.abspath(folder))  # noqa: PTH100 - a link stays a link
    with suppress(OSError):
        for run in _runs(target):
            if (state := run.state()) in _MEANINGS:
                tell(f"{folder}: {_meaning(run, state)}")


def _runs(target: Path) -> list[Run]:
    """What is named like the folder of a run into `target`, also of earlier versions."""
    # No dot: the folder of a run into "tier.part-2" is no folder of one into "tier".
    named = re.compile(re.escape(_prefix(target)) + r"[^.]+(\.replaced)?")
    beside = entries(target.parent, hidden=True)
    return [Run(target, path) for path in beside if named.fullmatch(path.name)]


def _meaning(run: Run, state: State) -> str:
    return _MEANINGS[state].format(folder=run.folder, name=run.target.name)


def tell(text: str) -> None:
    """Warn of something that a run did with what an earlier one left."""
    warnings.warn(text, CheckpointWarning, stacklevel=1)


def _prefix(target: Path) -> str:
    return f".{target.name}.part-"


def _sizes(folder: Path) -> dict[str, int]:
    """The size of every file below a folder; empty if there is no such folder."""
    files = files_below(folder, hidden=True)
    return {path.relative_to(folder).as_posix(): path.lstat().st_size for path in files}


def _is_locked(folder: Path) -> bool:
    """Whether a living run holds the lock on its folder."""
    with opened(folder) as handle:
        return not lock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A handle of a folder, for `lock`; closing it unlocks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def wait_for_lock(folder: Path, handle: int) -> None:
    """Lock a folder. A line tells if another program must unlock it first, and takes its time."""
    for _ in range(_TRIES):
        if lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return
        time.sleep(_PAUSE)  # other runs hold it for an instant
    tell(f"{folder}: locked by another program: waiting until it is unlocked")
    lock(handle, fcntl.LOCK_EX)


def lock(handle: int, how: int) -> bool:
    """Lock a folder as `flock` does; False if somebody else has it."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: other runs cannot be noticed
        return True
    return True
