"""Folders: outputs that appear whole or not at all, and inputs that nothing leads out of."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outlier_mlx.errors import CheckpointError, OutlierError, OutputExistsError


@contextmanager
def whole_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its name when the block ends well.

    Whatever ends the block early (an error, a full disk, Ctrl-C) removes the sibling.

    Args:
        target: the folder to make.
        force: replace `target` if it exists.

    Raises:
        OutputExistsError: `target` exists and `force` is not set, or it is no folder.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - a link stays a link
    check_free(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sibling = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    except OSError as error:
        raise OutlierError(f"cannot write beside {target}: {error.strerror}") from None
    try:
        yield sibling
        sibling.chmod(0o777 & ~_umask())
        _take_name(sibling, target, force=force)
    except BaseException:
        shutil.rmtree(sibling, ignore_errors=True)
        raise


def check_free(target: Path, *, force: bool) -> None:
    """Raise `OutputExistsError` if `target` may not be written to."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputExistsError(f"{target}: exists and is not a folder")
    if target.exists() and not force:
        raise OutputExistsError(f"{target}: exists; --force replaces it")


def _take_name(sibling: Path, target: Path, *, force: bool) -> None:
    check_free(target, force=force)
    if not target.exists():
        sibling.rename(target)
        return
    aside = sibling.with_name(sibling.name + ".replaced")
    target.rename(aside)
    try:
        sibling.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def inside(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, refused if it is elsewhere.

    A hub cache keeps a snapshot's files as links to `blobs` beside `snapshots`; those are followed.

    Raises:
        CheckpointError: `name` is absolute, climbs out, or links out of the folder.
    """
    suspicious = "\\" in name or "\0" in name or ":" in name or name.startswith("/")
    if suspicious or ".." in Path(name).parts:
        raise CheckpointError(f"{folder.name}: {name!r} is not a plain path inside the folder")
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    root, resolved = folder.resolve(), path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(resolved.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: links out of its folder; put a copy or a hard link there")
    return path
