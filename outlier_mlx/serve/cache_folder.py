"""A folder of KV caches that outlives the server: what is in it, what goes, and the thread for it.

Each model and set of options has a folder of its own in the one that the user names. Files have the
name of their content, so that servers that share a folder write the same ones. Nothing is deleted
or replaced that does not begin as files of this project do.
"""

import fcntl
import hashlib
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.errors import OutlierError, one_line
from outlier_mlx.serve import cache_file
from outlier_mlx.serve.cache_dir import CacheDir
from outlier_mlx.serve.cache_file import Part
from outlier_mlx.serve.cache_parts import Rows, State
from outlier_mlx.serve.prefix_tree import Node, worth
from outlier_mlx.storage.output import whole_file
from outlier_mlx.storage.paths import entries

_FOLDER = re.compile(r"prefixes-([0-9a-f]{12})-([0-9a-f]{12})-([0-9a-f]{12})")
# What `whole_file` writes before it is whole.
_UNFINISHED = re.compile(r"\.[0-9a-f]{24}-[0-9a-z-]{1,15}\.[0-9a-f]{8}\.safetensors")
_FILE = re.compile(r"([0-9a-f]{24})-([0-9a-f]{24}|root)-(\d{1,9})-(\d{1,9})\.safetensors")


@dataclass(frozen=True)
class StoredFile:
    """A file, by its name alone.

    Attributes:
        path: where it is.
        parent: what the name of the file before it begins with; "root": there is none.
        start: number of tokens before its own.
        end: number of tokens up to its last.
        nbytes: its size.
        used: when it was last of use, in seconds.
    """

    path: Path
    parent: str
    start: int
    end: int
    nbytes: int
    used: float

    @property
    def key(self) -> str:
        """What its name begins with."""
        return self.path.name[:24]


class _Stopped(Exception):
    """The server ends while a file is being written."""


class CacheFolder:
    """The files of one model, and the thread that writes them.

    Args:
        where: the folder, the model, and how much there may be.
        log: called with one line for whatever the user should know.

    Raises:
        OutlierError: the folder cannot be made, or others could write to it.
    """

    def __init__(self, where: CacheDir, log: Callable[[str], None]) -> None:
        self._where, self._log = where, log
        self._said = ""
        self._key = "-".join(map(_digest, (where.place, where.model(), where.options)))
        self.path = where.path / f"prefixes-{self._key}"
        _make_private(where.path, self.path)
        self._lock = os.open(self.path, os.O_RDONLY)
        if _locked(self._lock):  # no other server uses it: what is not whole is of one that died
            for path in entries(self.path, hidden=True):
                if _UNFINISHED.fullmatch(path.name):
                    self._remove(path)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._remove_outdated()
        self._waiting: deque[Node] = deque()
        self._touched: set[str] = set()
        self._unwanted: set[str] = set()
        self._work = threading.Condition()
        self._stopping = self._dropping = self._busy = False
        self._thread = threading.Thread(target=self._run, name="cache-dir", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """What all files in the user's folder take, of all models."""
        return sum(file.nbytes for file in self._all())

    def stored(self) -> Iterator[tuple[StoredFile, Part]]:
        """The files of this model, parents first; damaged ones are told and removed."""
        known = {"root"}
        for file in sorted(_files(self.path), key=lambda file: (file.start, -file.end)):
            part = self._checked(file)
            if part is None or file.parent not in known:
                # Without its beginning it is of no use.
                self._remove(file.path)
                continue
            known.add(file.key)
            yield file, part

    def read(self, node: Node) -> tuple[Rows, list[State] | None] | None:
        """What a node's file holds, in the calling thread; None if it is gone or damaged."""
        path = self.path / str(node.file)
        try:
            part, rows, states = cache_file.read(path)
        except (FileNotFoundError, MemoryError):
            return None
        except (OutlierError, OSError) as error:
            self._ignored(path, error)
            return None
        if part.form != node.form or part.tokens.tolist() != node.tokens.tolist():
            return None
        return rows, states

    def write(self, node: Node) -> None:
        """Write a node, some time later, unless it is forgotten before."""
        with self._work:
            if not self._stopping and cache_file.writable(node.form):
                self._waiting.append(node)
                self._work.notify_all()

    def touch(self, names: list[str]) -> None:
        """Note that files were of use."""
        with self._work:
            self._touched.update(names)
            self._work.notify_all()

    def remove(self, name: str) -> None:
        """Remove a file of this model, some time later."""
        with self._work:
            self._unwanted.add(name)
            self._work.notify_all()

    def settle(self, seconds: float) -> bool:
        """Wait until all is written; returns whether it is, after so many seconds at most."""
        with self._work:
            done = self._work.wait_for(lambda: not (self._waiting or self._busy), seconds)
        return bool(done)

    def close(self, seconds: float) -> None:
        """Write what waits, for so many seconds at most, and end the thread."""
        with self._work:
            self._stopping = True
            self._work.notify_all()
        self._thread.join(seconds)
        self._dropping = True
        self._thread.join(1.0)  # it removes what it was writing
        if not self._thread.is_alive() and self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _run(self) -> None:
        while True:
            with self._work:
                self._busy = False
                self._work.notify_all()
                self._work.wait_for(self._has_work)
                if self._stopping and (self._dropping or not self._waiting):
                    return
                node = self._waiting.popleft() if self._waiting else None
                touched, self._touched = self._touched, set()
                unwanted, self._unwanted = self._unwanted, set()
                self._busy = True
            for name in unwanted:
                self._remove(self.path / name)
            now = time.time()
            for name in touched:
                with suppress(OSError):
                    os.utime(self.path / name, (now, now))
            if node is None:
                continue
            try:
                self._write(node)
            except _Stopped:
                pass
            except Exception as error:  # the next one may succeed
                reason = (isinstance(error, OSError) and error.strerror) or one_line(str(error))
                self._say_once(f"{self.path}: KV caches cannot be written: {reason}")

    def _has_work(self) -> bool:
        return bool(self._waiting or self._touched or self._unwanted or self._stopping)

    def _write(self, node: Node) -> None:
        rows, states, parent = node.rows, node.states, node.parent
        if rows is None or parent is None or node.file is not None:
            return
        before = "root"
        if parent.parent is not None:
            if parent.file is None:
                return
            before = parent.file[:24]
        if parent.children.get(node.key) is not node:
            return  # it was forgotten
        parts = [
            self._key,
            cache_file.form_text(node.form),
            before,
            str(node.start),
            node.tokens.tobytes().hex(),
            str(states is not None),
        ]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
        path = self.path / f"{key}-{before}-{node.start}-{node.end}.safetensors"
        if not path.exists():
            if not self._make_room(node.nbytes + 4096, worth(node.end, time.time()), before):
                return
            with whole_file(path, private=True) as part:
                cache_file.write(part, node.form, node.tokens, rows, states, self._check)
            self._said = ""
        elif not cache_file.is_ours(path):
            return
        node.file = path.name

    def _check(self) -> None:
        if self._dropping:
            raise _Stopped

    def _make_room(self, nbytes: int, value: float, parent: str) -> bool:
        """Remove what is worth least until there is room; False if what there is is worth more."""
        files = {file.key: file for file in self._all()}
        total = sum(file.nbytes for file in files.values()) + nbytes
        while total > self._where.nbytes:
            parents = {file.parent for file in files.values()} | {parent}
            ends = [file for file in files.values() if file.key not in parents]
            least = min(ends, key=lambda file: worth(file.end, file.used), default=None)
            if least is None or worth(least.end, least.used) > value:
                return False
            del files[least.key]
            if self._remove(least.path):
                total -= least.nbytes
        return True

    def _all(self) -> Iterator[StoredFile]:
        for folder in entries(self._where.path, "prefixes-*"):
            if _FOLDER.fullmatch(folder.name) and not folder.is_symlink():
                yield from _files(folder)

    def _remove_outdated(self) -> None:
        """Remove what the same model left when it had other weights."""
        place, model, _ = self._key.split("-")
        for folder in entries(self._where.path, f"prefixes-{place}-*"):
            found = _FOLDER.fullmatch(folder.name)
            if found is None or found[2] == model or folder.is_symlink():
                continue
            with suppress(OSError):
                handle = os.open(folder, os.O_RDONLY)
                try:
                    if not _locked(handle):
                        continue  # another server has that model loaded
                    for path in entries(folder, hidden=True):
                        if _FILE.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name):
                            self._remove(path)
                    folder.rmdir()
                finally:
                    os.close(handle)

    def _checked(self, file: StoredFile) -> Part | None:
        try:
            part = cache_file.read_part(file.path)
        except FileNotFoundError:
            return None
        except (OutlierError, OSError) as error:
            self._ignored(file.path, error)
            return None
        return part if file.start + len(part.tokens) == file.end else None

    def _ignored(self, path: Path, error: Exception) -> None:
        self._log(f"{path}: ignored: {one_line(str(error))}")
        self._remove(path)

    def _remove(self, path: Path) -> bool:
        """Remove a file if it is ours; returns whether it is gone."""
        with suppress(OSError):
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):
                return False
            empty = _UNFINISHED.fullmatch(path.name) and not found.st_size
            if not (empty or cache_file.is_ours(path)):
                return False
            path.unlink(missing_ok=True)
            return True
        return False

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._log(text)
        self._said = text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _files(folder: Path) -> Iterator[StoredFile]:
    with suppress(OSError):
        for path in entries(folder):
            found = _FILE.fullmatch(path.name)
            with suppress(FileNotFoundError):
                if found is not None and stat.S_ISREG((status := path.lstat()).st_mode):
                    numbers = int(found[3]), int(found[4])
                    yield StoredFile(path, found[2], *numbers, status.st_size, status.st_mtime)


def _locked(handle: int) -> bool:
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _make_private(outer: Path, inner: Path) -> None:
    try:
        outer.mkdir(mode=0o700, parents=True, exist_ok=True)
        inner.mkdir(mode=0o700, exist_ok=True)
        found = inner.lstat()
    except FileExistsError as error:
        raise OutlierError(f"{error.filename}: exists and is not a folder") from None
    except OSError as error:
        raise OutlierError(f"{outer}: cannot write there: {error.strerror}") from None
    if inner.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OutlierError(f"{inner}: others can write or read there: remove it")
