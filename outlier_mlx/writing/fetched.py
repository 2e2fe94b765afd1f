"""Writing a model from sources on the hub, with only one source file on disk at a time.

The headers of all files are read first, so the place of every output byte is known. Then each
source file is downloaded, its tensors are written to their places, and it is deleted; a journal
lists the files that are done. The unfinished model stays in a hidden folder, so that an interrupted
run can be resumed.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import outlier_mlx
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.hub import Source
from outlier_mlx.storage.paths import entries, files_below
from outlier_mlx.storage.remote import RemoteFile, forget
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.float_parts import Constant
from outlier_mlx.writing.folders import kept_folder
from outlier_mlx.writing.journal import Journal, read_identity
from outlier_mlx.writing.parts import Parts, Tally, reading_pool, small_cache
from outlier_mlx.writing.pieces import Piece, Work, fingerprint, split
from outlier_mlx.writing.runs import FETCHED, JOURNAL
from outlier_mlx.writing.writer import PlacedWriter, WrittenFile


@dataclass(frozen=True)
class FetchedParts(Parts):
    """Parts that are made from files on the hub, which are downloaded one at a time.

    Attributes:
        sources: the sources by role, "overlay" and "base".
        asked: the revisions that the user asked for, by role.
        files: the remote file of each sparse file.
        settings: everything else that the written bytes depend on, as JSON.
        force: discard an unfinished run with other settings.
        restart: start again, because an unfinished run cannot be resumed.
    """

    keep: ClassVar[bool] = True

    sources: Mapping[str, Source] = field(default_factory=dict)
    asked: Mapping[str, str | None] = field(default_factory=dict)
    files: Mapping[Path, RemoteFile] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False
    restart: bool = False

    def room(self, target: Path) -> int:
        """Bytes for the model and the largest source file, less those that are on disk already."""
        largest = max(map(self._to_fetch, split(self.parts).pieces), default=0)
        kept = (path.stat() for path in files_below(kept_folder(target), hidden=True))
        return self.nbytes + largest - sum(found.st_blocks * 512 for found in kept)

    def write(self, folder: Path, progress: Progress = no_progress) -> list[WrittenFile]:
        """Write all parts, resuming where an earlier run stopped.

        Args:
            folder: the folder that `whole_folder` yields with `keep`.
            progress: called with the bytes fetched, used and checked so far, and their final sum.

        Raises:
            OutputExistsError: there is an unfinished run with other settings.
            CheckpointError: a source is not valid; nothing is kept.
            OutlierError: the hub cannot be reached or refuses, or files of an earlier run are
                missing or changed.
        """
        owner = folder.parent
        work = split(self.parts)
        identity = self._identity(work)
        if self.restart or (self.force and read_identity(owner) not in (None, identity)):
            (owner / JOURNAL).unlink(missing_ok=True)
            for place in (folder, owner / FETCHED):
                shutil.rmtree(place, ignore_errors=True)
            folder.mkdir()
        journal = Journal(owner, identity)
        forget(self.files)
        output = PlacedWriter(folder, self.specs)
        if journal.done and not output.is_begun():
            raise OutlierError(
                f"{owner}: files are missing that were begun; delete it to start again"
            )
        total = self.source_bytes + sum(map(self._to_fetch, work.pieces)) + output.nbytes
        try:
            with output as writer, reading_pool() as pool, small_cache():
                tally = Tally(total, progress)
                run = _Run(work, journal, writer, pool, tally)
                for file, pieces in work.pieces.items():
                    if file is None:
                        run.write(pieces)
                    elif self.name(file) in journal.done:
                        tally.add(self._to_fetch(file) + sum(p.source_bytes for p in pieces))
                    else:
                        with self._present(file, owner / FETCHED, tally):
                            run.use(file, self.name)
                return writer.finish(tally.add)
        except CheckpointError:
            (owner / JOURNAL).unlink()
            raise

    @contextmanager
    def _present(self, file: Path, place: Path, tally: Tally) -> Iterator[None]:
        """Fetch a source file, and delete all others; it is deleted if the block succeeds."""
        remote = self.files.get(file)
        if remote is None:
            yield
            return
        own = place / hashlib.sha256(self.name(file).encode()).hexdigest()[:16]
        for other in entries(place, hidden=True):
            if other != own:
                shutil.rmtree(other)
        expected = tally.done + remote.nbytes
        file.symlink_to(remote.fetch(own, tally.add))
        tally.add(expected - tally.done)  # bytes that an earlier run fetched
        yield
        file.unlink()
        if own.exists():  # the file was not in the hub's cache
            shutil.rmtree(own)

    def _to_fetch(self, file: Path | None) -> int:
        remote = self.files.get(file) if file is not None else None
        return remote.nbytes if remote is not None else 0

    def _source(self, file: Path) -> tuple[str, Source] | None:
        for role, source in self.sources.items():
            if file.is_relative_to(source.folder):
                return role, source
        return None

    def name(self, file: Path) -> str:
        """The name of a source file in the journal."""
        found = self._source(file)
        if found is None:
            return str(file)
        role, source = found
        return f"{role}/{file.relative_to(source.folder).as_posix()}"

    def _identity(self, work: Work) -> dict[str, Any]:
        """Everything that the written bytes depend on, and their layout."""
        # Alphas are read before; the other constants depend on nothing.
        alphas = (part.value.tobytes() for part in self.parts if isinstance(part, Constant))
        local = {}
        for file in work.pieces:
            found = self._source(file) if file is not None else None
            if file is not None and (found is None or found[1].revision is None):
                state = file.stat()
                local[self.name(file)] = [state.st_size, state.st_mtime_ns]
        cited = {
            role: {"name": s.name, "asked": self.asked.get(role), "revision": s.revision}
            for role, s in self.sources.items()
        }
        return {
            "version": outlier_mlx.__version__,
            **dict.fromkeys(("overlay", "base")),
            **cited,
            **self.settings,
            "alphas": _digest(alphas),
            "files": local,
            "layout": _digest(repr(spec).encode() for spec in self.specs),
        }


@dataclass(frozen=True)
class _Run:
    """The state of a run that writes parts."""

    work: Work
    journal: Journal
    writer: PlacedWriter
    pool: ThreadPoolExecutor
    tally: Tally

    def write(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            for used in piece.write(self.writer, self.pool):
                self.tally.add(used)

    def use(self, file: Path, name_of: Callable[[Path], str]) -> None:
        """Write everything that is made from a fetched file, and record that it is done."""
        self.write(self.work.pieces[file])
        tensors = self.work.compared(file)
        found = {name: fingerprint(tensor, self.pool) for name, tensor in tensors}
        if found:
            known = self.journal.done | {name_of(file): found}
            self.work.check(lambda path: known.get(name_of(path), {}))
        self.writer.sync()
        self.journal.add(name_of(file), found)


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
