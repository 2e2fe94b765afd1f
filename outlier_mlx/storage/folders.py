"""Folders: outputs that appear whole or not at all, and inputs that nothing leads out of."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outlier_mlx.errors import CheckpointError, OutlierError, OutputExistsError


@contextmanager
def whole_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its name when the block ends well.

    Whatever ends the block early (an error, a full disk, Ctrl-C) removes the sibling, and folders
    above it that were made for it.

    Args:
        target: the folder to make.
        force: replace `target` if it is a tier.

    Raises:
        OutputExistsError: `target` exists and `force` is not set, or it is no tier.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - a link stays a link
    check_free(target, force=force)
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            sibling = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
        except OSError as error:
            raise OutlierError(f"cannot write beside {target}: {error.strerror}") from None
        replaced = sibling.with_name(f"{sibling.name}.replaced")
        try:
            yield sibling
            sibling.chmod(0o777 & ~_umask())
            check_free(target, force=force)
            _swap(sibling, target, replaced)
        finally:
            _remove(sibling)
            if target.exists():
                _remove(replaced)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # not made, or in use by someone else
                parent.rmdir()
        raise


def check_free(target: Path, *, force: bool) -> None:
    """Check that `target` may be written to: nothing is there, or a tier that `force` replaces.

    Raises:
        OutputExistsError: it may not. What is no tier is never replaced: it may be anything.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputExistsError(f"{target}: exists and is not a folder")
    if not target.exists():
        return
    if not force:
        raise OutputExistsError(f"{target}: exists; --force replaces it")
    if any(target.iterdir()) and not (target / "tier.json").exists():
        raise OutputExistsError(f"{target}: exists and is not a tier; --force replaces only tiers")


def _swap(sibling: Path, target: Path, replaced: Path) -> None:
    """Give `sibling` the name `target`; what had it is called `replaced` from then on."""
    try:
        if target.exists():
            target.rename(replaced)
        sibling.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise


def _remove(folder: Path) -> None:
    """Remove a folder, if it is there; Ctrl-C at this moment does not leave half of it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def inside(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, refused if it is elsewhere.

    A hub cache keeps a snapshot's files as links to `blobs` beside `snapshots`; those are followed.

    Raises:
        CheckpointError: there is no such file (a folder or pipe is none), or `name` is absolute,
            climbs out, or links out of the folder.
    """
    suspicious = "\\" in name or "\0" in name or ":" in name or name.startswith("/")
    if suspicious or ".." in Path(name).parts:
        raise CheckpointError(f"{folder.name}: {name!r} is not a plain path inside the folder")
    path = folder / name
    try:
        found = path.is_file()
    except OSError as error:
        raise CheckpointError(f"{folder.name}: {name[:80]!r}: {error.strerror}") from None
    if not found:
        raise CheckpointError(f"{path}: no such file")
    root, resolved = folder.resolve(), path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(resolved.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: links out of its folder; put a copy or a hard link there")
    return path
