"""Files to write: they appear whole or not at all, and stay whole if the power fails."""

import errno
import fcntl
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlier_mlx.errors import CheckpointWarning, OutlierError, OutputExistsError
from outlier_mlx.storage.paths import entries, existing, files_below, is_within

_PART = re.compile(r"\..{0,40}\.[0-9a-f]{8}(\..*)?", re.DOTALL)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS)


def check_writable(path: Path, *, force: bool, sources: Iterable[str | Path | None] = ()) -> None:
    """Check that a file can be written, before hours are spent on what it will hold.

    Args:
        path: the file.
        force: it may be replaced if it exists.
        sources: what it is made from: files, folders, and names of repositories, which are ignored.
            None of them is ever replaced, nor a file in one.

    Raises:
        OutputExistsError: it exists and may not be replaced.
        OutlierError: it is a folder, or its folder is missing.
    """
    if path.is_dir():
        raise OutlierError(f"{path}: is a folder")
    if path.exists():
        for source in existing(sources):
            if is_within(path, source):
                raise OutputExistsError(f"{path}: is an input or lies in one: name another file")
        if not force:
            raise OutputExistsError(f"{path}: exists; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise OutlierError(f"{path}: no such folder: {path.parent}")
    for part in _parts(path):
        text = f"{path}: {part.name} was left beside it by a run that was killed: delete it"
        warnings.warn(text, CheckpointWarning, stacklevel=1)


def check_folder(
    out: Path,
    patterns: Sequence[str],
    *,
    force: bool,
    sources: Iterable[str | Path | None] = (),
) -> None:
    """Check that files can be written into a folder, before hours are spent on what they will hold.

    Args:
        out: the folder, which need not exist.
        patterns: names of the files, also with `*`.
        force: existing files may be replaced.
        sources: what they are made from, see `check_writable`.

    Raises:
        OutputExistsError: one of the files exists and may not be replaced, or `out` is no folder,
            or one of the sources.
        OutlierError: it cannot be written to, or cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out}: exists and is not a folder")
    inputs = existing(sources)
    if out.exists() and any(map(out.samefile, inputs)):
        raise OutputExistsError(f"{out}: is an input, so it cannot be the output")
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OutlierError(f"{out}: cannot write there")
    for path in (found for pattern in patterns for found in entries(out, pattern)):
        check_writable(path, force=force, sources=inputs)


def clear_folder(out: Path, patterns: Sequence[str]) -> None:
    """Make a folder, and remove the files of an earlier run from it.

    Args:
        out: the folder.
        patterns: names of the files, also with `*`.

    Raises:
        OutlierError: the folder cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for pattern in patterns:
            for path in entries(out, pattern):
                path.unlink()
    except OSError as error:
        raise OutlierError(f"{out}: cannot write there: {error.strerror}") from None


@contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """An empty file beside `path` that takes its name when the block ends well.

    Whatever ends the block early (an error, a full disk, Ctrl-C) removes the file, and leaves
    `path` as it was.

    Args:
        path: the file to write; it is replaced if it exists.
        private: only the owner may read it.

    Yields:
        The file to fill; its name ends as that of `path` does.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    part = path.with_name(f".{path.stem[:40]}.{os.urandom(4).hex()}{path.suffix}")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    except OSError as error:
        # A full disk names no file, and the other name is one that the user never gave.
        if error.errno is not None and error.filename in (None, str(part)):
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def _parts(path: Path) -> list[Path]:
    """What `whole_file` left of a file when its process was killed."""
    named = re.compile(f"{re.escape(f'.{path.stem[:40]}.')}[0-9a-f]{{8}}{re.escape(path.suffix)}")
    beside = entries(path.absolute().parent, hidden=True)
    return [found for found in beside if named.fullmatch(found.name)]


def is_part(name: str) -> bool:
    """Whether a name is one that `whole_file` gives to files that are not whole yet."""
    return _PART.fullmatch(name) is not None


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    except OSError as error:
        # File systems of other systems and networks know no such thing for folders.
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until a folder is on the disk, with everything in it.

    Raises:
        OSError: something of it cannot be written.
    """
    files = files_below(folder, hidden=True)
    for file in files:
        if file.is_file() and not file.is_symlink():
            sync(file)
    inner = {parent for file in files for parent in file.relative_to(folder).parents}
    for name in sorted(inner | {Path()}, reverse=True):
        sync(folder / name)


def flush(handle: int) -> None:
    """Wait until what was written to an open file is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):  # on macOS, fsync does not reach the disk itself
        try:
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
        except OSError:  # a file system that does not know it
            pass
    os.fsync(handle)


def write_whole(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a file that appears whole or not at all; see `whole_file`."""
    # Text of a model may end in half a surrogate pair, which UTF-8 has not.
    data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    with whole_file(path, private=private) as part:
        part.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON that people can read; the file appears whole or not at all.

    Raises:
        ValueError: it holds NaN or infinity, which JSON has not.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")
