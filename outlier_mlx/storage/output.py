"""Files to write: they appear whole or not at all."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlier_mlx.errors import OutlierError, OutputExistsError
from outlier_mlx.storage.paths import entries


def check_writable(path: Path, *, force: bool) -> None:
    """Check that a file can be written, before hours are spent on what it will hold.

    Raises:
        OutputExistsError: it exists and `force` is not set.
        OutlierError: it is a folder, or its folder is missing.
    """
    if path.is_dir():
        raise OutlierError(f"{path}: is a folder")
    if path.exists() and not force:
        raise OutputExistsError(f"{path}: exists; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise OutlierError(f"{path}: no such folder: {path.parent}")


def check_folder(out: Path, patterns: Sequence[str], *, force: bool) -> None:
    """Check that files can be written into a folder, before hours are spent on what they will hold.

    Args:
        out: the folder, which need not exist.
        patterns: names of the files, also with `*`.
        force: existing files may be replaced.

    Raises:
        OutputExistsError: one of the files exists and `force` is not set, or `out` is no folder.
        OutlierError: it cannot be written to, or cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out}: exists and is not a folder")
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OutlierError(f"{out}: cannot write there")
    for path in (found for pattern in patterns for found in entries(out, pattern)):
        check_writable(path, force=force)


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
        part.replace(path)
    except OSError as error:
        if error.filename == str(part):  # a name that the user never gave
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


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
