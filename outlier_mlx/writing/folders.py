"""Output folders that appear whole or not at all, and what they may replace."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outlier_mlx.errors import CheckpointError, OutlierError, OutputExistsError, listed
from outlier_mlx.storage.output import sync, sync_tree
from outlier_mlx.storage.paths import entries, existing, is_within
from outlier_mlx.terminal import size
from outlier_mlx.writing.interrupts import undivided
from outlier_mlx.writing.manifest import find_manifest, unlisted
from outlier_mlx.writing.runs import (
    clear_leftovers,
    kept_run,
    lock,
    new_run,
    opened,
    tell,
    wait_for_lock,
)

# What is in the way of a run is named up to this number.
_NAMED = 3
_ONLY_OURS = "only what outlier-mlx wrote"
Sources = Iterable[str | Path | None]


@contextmanager
def whole_folder(
    target: Path, *, force: bool = False, keep: bool = False, sources: Sources = ()
) -> Iterator[Path]:
    """A hidden folder beside `target` that becomes `target` if the block succeeds.

    If the block ends early (an error, a full disk, Ctrl-C), the folder is removed, and so are
    parent folders that were made for it. What killed runs left is settled first.

    Args:
        target: the folder to make.
        force: replace `target` if this project wrote it.
        keep: yield a folder in `kept_folder(target)`, as an earlier run left it. If the block ends
            early and there is a journal, it stays for a later run. Without `keep`, such a folder of
            an earlier run is removed when `target` is made.
        sources: as for `check_free`.

    Raises:
        OutputExistsError: `target` exists and may not be replaced, or another run is writing it.
        OutlierError: its folder cannot be written to.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - a link stays a link
    sources = list(sources)
    missing = [parent for parent in target.parents if not parent.exists()]
    run = kept_run(target) if keep else new_run(target)
    made = False
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened(target.parent) as handle:
                wait_for_lock(target.parent, handle)  # Ctrl-C ends the wait
                with undivided():
                    clear_leftovers(target)
                    _check_replaceable(target, force=force, sources=sources)
                    run.begin()
        except OSError as error:
            if at := next((place for place in target.parents if place.is_file()), None):
                raise OutlierError(f"{target}: {at.name} is a file, not a folder") from None
            raise OutlierError(f"cannot write beside {target}: {error.strerror}") from None
        yield run.whole
        run.whole.chmod(0o777 & ~_umask())
        sync_tree(run.folder)
        sync(target.parent)
        _check_replaceable(target, force=force, sources=sources)
        with undivided():
            run.place()
            made = True
    finally:
        with undivided():
            run.end()
            if made:
                _discard_unfinished(target)
            else:
                for parent in missing:
                    with suppress(OSError):  # not made, or in use by someone else
                        parent.rmdir()


def _discard_unfinished(target: Path) -> None:
    """Remove what a run with `--stream` left to be resumed: there is nothing to resume for."""
    run = kept_run(target)
    if run.state() == "unfinished":
        run.remove()
        tell(f"{target}: removed the unfinished run in {run.folder}")


def kept_folder(target: Path) -> Path:
    """The hidden folder beside `target` that holds a run that can be resumed."""
    return kept_run(Path(os.path.abspath(target))).folder  # noqa: PTH100 - a link stays a link


def check_free(target: Path, *, force: bool, sources: Sources = ()) -> None:
    """Check that `target` does not exist, or that `force` replaces it; clear what is left there.

    A folder is replaced if its manifest says that this project wrote it, and lists every file in
    it. Files that this project or the system adds later are no hindrance, see `unlisted`.

    Args:
        target: the folder to make.
        force: replace a folder that this project wrote.
        sources: what the target is made from: files, folders, and names of repositories, which are
            ignored. No source is ever replaced, nor a folder that contains one or lies in one.

    Raises:
        OutputExistsError: it may not be made; the message names what is in the way.
    """
    absolute = Path(os.path.abspath(target))  # noqa: PTH100 - a link stays a link
    with suppress(OSError), opened(absolute.parent) as handle:  # else told when it is made
        if lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            clear_leftovers(absolute)
    _check_replaceable(target, force=force, sources=sources)


def _check_replaceable(target: Path, *, force: bool, sources: Sources) -> None:
    for source in existing(sources):
        if is_within(source, target):
            raise OutputExistsError(f"{target}: is an input, so it cannot be the output")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputExistsError(f"{target}: exists and is not a folder")
    if not target.exists():
        return
    for source in existing(sources):
        if is_within(target, source):
            raise OutputExistsError(f"{target}: exists and lies in an input: name another folder")
    _check_in_nobodys_way(target)
    _check_ours(target, f"--force replaces {_ONLY_OURS}")
    if not force:
        raise OutputExistsError(f"{target}: exists; --force replaces it")


def _check_in_nobodys_way(target: Path) -> None:
    if is_within(Path.cwd(), target):
        raise OutputExistsError(f"{target}: is or holds the current folder, so it stays")
    if os.path.ismount(target):
        raise OutputExistsError(f"{target}: is where a disk is mounted: name a folder in it")


def _check_ours(target: Path, rule: str) -> None:
    """Check that this project wrote everything in a folder; `rule` says why that matters."""
    found = [path.name for path in entries(target, hidden=True)]
    if not found:
        return
    try:
        manifest = find_manifest(target)
        if manifest is None:
            raise OutputExistsError(
                f"{target}: exists and is not a tier (it holds {listed(found, _NAMED)}); {rule}"
            )
        manifest.check_version(replacing=True)
    except CheckpointError as error:
        raise OutputExistsError(f"{target}: {error}; {rule}") from None
    if others := unlisted(target, manifest):
        raise OutputExistsError(
            f"{target}: holds {listed(others, _NAMED)}, which {manifest.name} does not list; {rule}"
        )
    if not os.access(target, os.W_OK | os.X_OK):
        raise OutputExistsError(f"{target}: cannot be replaced: it is read-only")


def check_removable(target: Path) -> None:
    """Check that `remove_folder` may remove a folder.

    Raises:
        OutputExistsError: it is a link, holds the current folder or another disk, or holds a file
            that this project did not write.
    """
    if target.is_symlink() or not target.is_dir():
        raise OutputExistsError(f"{target}: is a link or no folder")
    if not entries(target, hidden=True):
        raise OutputExistsError(f"{target}: is empty; rm removes {_ONLY_OURS}")
    _check_in_nobodys_way(target)
    _check_ours(target, f"rm removes {_ONLY_OURS}")


def remove_folder(target: Path) -> None:
    """Remove a folder that this project wrote.

    It loses its name at once. If the process is killed while the files go, the next run with the
    same name removes what is left.

    Raises:
        OutputExistsError: see `check_removable`; or a run is writing it.
        OutlierError: it cannot be removed.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - a link stays a link
    run = new_run(target)
    try:
        with opened(target.parent) as handle:
            wait_for_lock(target.parent, handle)  # Ctrl-C ends the wait
            with undivided():
                clear_leftovers(target)
                check_removable(target)
                run.begin()
                run.discard()
    except OSError as error:
        raise OutlierError(f"{target}: cannot be removed: {error.strerror}") from None
    finally:
        with undivided():
            run.end()


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


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
