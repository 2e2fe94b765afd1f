"""Output folders that appear whole or not at all."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outlier_mlx.errors import OutlierError, OutputExistsError
from outlier_mlx.storage.paths import entries
from outlier_mlx.terminal import size

#: Manifests of the folders that this project writes: tiers, and all others. `--force` replaces only
#: folders that have one.
MANIFESTS = ("tier.json", "checksums.json")
#: File in a kept folder that lists the files that are done. A folder that has it is not removed.
JOURNAL = "journal.jsonl"


@contextmanager
def whole_folder(target: Path, *, force: bool = False, keep: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that is renamed to `target` if the block succeeds.

    If the block ends early (an error, a full disk, Ctrl-C), the folder is removed, and so are
    parent folders that were made for it. Remains of killed runs are removed first.

    Args:
        target: the folder to make.
        force: replace `target` if it is a tier.
        keep: yield a folder in `kept_folder(target)`, as an earlier run left it. If the block ends
            early and there is a journal, it stays for a later run. Without `keep`, such a folder of
            an earlier run is removed when `target` is made.

    Raises:
        OutputExistsError: `target` exists and `force` is not set, or it is not a tier, or another
            run is writing it.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - a link stays a link
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        try:
            owner, lock = _claim(target, force=force, keep=keep)
        except OSError as error:
            raise OutlierError(f"cannot write beside {target}: {error.strerror}") from None
        replaced = owner.with_name(f"{owner.name}.replaced")
        made = False
        try:
            sibling = owner / "whole" if keep else owner
            sibling.mkdir(exist_ok=True)
            yield sibling
            sibling.chmod(0o777 & ~_umask())
            check_free(target, force=force)
            _swap(sibling, target, replaced)
            made = True
        finally:
            if not (keep and (owner / JOURNAL).exists()):
                _remove(owner)
            if made:
                _remove(kept_folder(target))
            if target.exists():
                _remove(replaced)
            os.close(lock)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # not made, or in use by someone else
                parent.rmdir()
        raise


def _claim(target: Path, *, force: bool, keep: bool) -> tuple[Path, int]:
    """The folder that a run writes in, new or kept, and a handle that locks it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent, wait=True):
        clear_stale(target)
        check_free(target, force=force)
        if keep:
            owner = kept_folder(target)
            owner.mkdir(mode=0o700, exist_ok=True)
        else:
            owner = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        lock = os.open(owner, os.O_RDONLY)
        _lock(lock, wait=False)
    return owner, lock


def kept_folder(target: Path) -> Path:
    """The hidden folder beside `target` that holds a run that can be resumed."""
    target = Path(os.path.abspath(target))  # noqa: PTH100 - a link stays a link
    return target.parent / f"{_prefix(target)}kept"


def clear_stale(target: Path) -> None:
    """Remove what killed runs left beside `target`, and restore a model that one was replacing.

    A running process holds a lock on its temporary folder. Folders kept for a later run stay.

    Raises:
        OutputExistsError: another run is writing `target`.
    """
    names = [
        path
        for path in entries(target.parent, hidden=True)
        if path.name.startswith(_prefix(target))
    ]
    for replaced in [p for p in names if p.suffix == ".replaced"]:
        if not target.exists() and not _is_alive(replaced.with_suffix("")):
            replaced.rename(target)
    for folder in names:
        owner = folder.with_suffix("") if folder.suffix == ".replaced" else folder
        if _is_alive(owner):
            raise OutputExistsError(f"{target}: another run is writing it")
        if not (folder / JOURNAL).exists():
            _remove(folder)


def _prefix(target: Path) -> str:
    return f".{target.name}.part-"


def _is_alive(folder: Path) -> bool:
    """Whether a run holds the lock on its temporary folder."""
    try:
        with _locked(folder, wait=False) as free:
            return not free
    except FileNotFoundError:
        return False


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a folder; yields whether that was possible."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(handle, wait=wait)
    finally:
        os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: other runs cannot be noticed
        return True
    return True


def check_free(target: Path, *, force: bool, sources: Iterable[str | Path | None] = ()) -> None:
    """Check that `target` does not exist, or is a model that `force` replaces.

    Args:
        target: the folder to make.
        force: replace a model that this project wrote.
        sources: what the target is made from: files, folders, and names of repositories, which are
            ignored. A source is never replaced, nor is a folder that contains one.

    Raises:
        OutputExistsError: it may not. What this project did not write is never replaced.
    """
    for source in sources:
        if source is not None and _holds(target, Path(source)):
            raise OutputExistsError(f"{target}: is an input, so it cannot be the output")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputExistsError(f"{target}: exists and is not a folder")
    if not target.exists():
        return
    if not force:
        raise OutputExistsError(f"{target}: exists; --force replaces it")
    if entries(target, hidden=True) and not any((target / name).exists() for name in MANIFESTS):
        raise OutputExistsError(
            f"{target}: exists and is not a tier; --force replaces only what outlier-mlx wrote"
        )


def _holds(folder: Path, place: Path) -> bool:
    """Whether an existing `place` is `folder`, or in it; links are followed."""
    return place.exists() and place.resolve().is_relative_to(folder.resolve())


def check_space(target: Path, nbytes: int, what: str) -> None:
    """Check that `nbytes` fit on the disk that `target` will be on.

    Raises:
        OutlierError: they do not; `what` is how the message calls what will be written.
    """
    place = target.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OutlierError(f"{target}: {what} takes {size(nbytes)}, but only {size(free)} are free")


def _swap(sibling: Path, target: Path, replaced: Path) -> None:
    """Rename `target`, if it exists, to `replaced`, and `sibling` to `target`."""
    try:
        if target.exists():
            target.rename(replaced)
        sibling.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise


def _remove(folder: Path) -> None:
    """Remove a folder if it exists, even if Ctrl-C is pressed meanwhile."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
