"""Files to write: they appear whole or not at all."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlier_mlx.errors import OutlierError


def check_writable(path: Path, *, force: bool) -> None:
    """Check that a file can be written, before hours are spent on what it will hold.

    Raises:
        OutlierError: it exists and `force` is not set, or its folder is missing.
    """
    if path.is_dir():
        raise OutlierError(f"{path}: is a folder")
    if path.exists() and not force:
        raise OutlierError(f"{path}: exists; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise OutlierError(f"{path}: no such folder: {path.parent}")


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
        OSError: it cannot be written.
    """
    part = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}{path.suffix}")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
        yield part
        part.replace(path)
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
