"""Which models are on this machine: in the hub's cache, and in folders that the user names."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlier_mlx.checkpoints.gguf_info import holds_gguf
from outlier_mlx.checkpoints.info import Info, inspect
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.paths import entries, files_below, named, no_folder

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo

CONFIG = "config.json"


@dataclass(frozen=True)
class Listed:
    """A model on this machine.

    Attributes:
        name: what commands take for MODEL: a repository's name, or the folder.
        in_cache: whether it is in the hub's cache.
        folder: where its files are.
        nbytes: bytes that it takes on the disk; of a repository, with all its revisions.
        form: in words, what it is.
        used: when it was used last, in seconds since 1970.
    """

    name: str
    in_cache: bool
    folder: Path
    nbytes: int
    form: str
    used: float

    def as_json(self) -> dict[str, Any]:
        """All of it; the time in UTC, as ISO 8601 spells it."""
        used = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.used))
        return vars(self) | {"folder": str(self.folder), "used": used}


def in_cache() -> list[Listed]:
    """The models in the hub's cache, in the order of their names.

    Other programs put models there, too. What is no model, such as a data set, is left out.
    """
    found = []
    for repo in _repositories():
        used, form = repo.last_accessed, _form(_snapshot(repo))
        found.append(Listed(repo.repo_id, True, repo.repo_path, repo.size_on_disk, form, used))
    return found


def in_folder(folder: Path) -> list[Listed]:
    """The models in a folder: the folder itself, or those in it and in the folders in it, by name.

    Raises:
        OutlierError: there is no such folder.
    """
    if not folder.is_dir():
        raise OutlierError(no_folder(folder))
    found = _models_in(folder)
    if found != [folder]:
        found += [place for path in entries(folder) if path.is_dir() for place in _models_in(path)]
    return [_in_place(place) for place in found]


def mark_used(folder: Path) -> None:
    """Note that a model is used now.

    The note is the time of access of its config.json. Systems keep such times themselves, but not
    exactly: most of them look at a file only once a day.
    """
    _set_access(folder / CONFIG, time.time_ns())


def _set_access(file: Path, nanoseconds: int) -> None:
    with suppress(OSError):  # somebody else's file, or a disk that is only read
        os.utime(file, ns=(nanoseconds, file.stat().st_mtime_ns))


@contextmanager
def _unseen(folder: Path) -> Iterator[None]:
    """Let files be read in the block as if nobody had: to look at a model is not to use it."""
    before = {path: path.stat().st_atime_ns for path in files_below(folder) if path.exists()}
    try:
        yield
    finally:
        for path, accessed in before.items():
            if path.exists() and path.stat().st_atime_ns != accessed:
                _set_access(path, accessed)


def remove_from_cache(repo: str) -> None:
    """Remove a repository from the hub's cache, with all its revisions.

    Raises:
        CheckpointError: it is not there.
        OutlierError: it is a link, or some of its files cannot be removed.
    """
    from huggingface_hub import constants, scan_cache_dir

    found = _cached(repo)
    commits = [revision.commit_hash for revision in found.revisions]
    scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(*commits).execute()
    if found.repo_path.exists():  # the hub's library only logs why
        raise OutlierError(f"{found.repo_path}: cannot be removed as a whole: remove the rest")


def size_in_cache(repo: str) -> int:
    """Bytes that a repository takes in the hub's cache, with all its revisions.

    Raises:
        CheckpointError: it is not there.
        OutlierError: it is a link.
    """
    return _cached(repo).size_on_disk


def _cached(repo: str) -> "CachedRepoInfo":
    found = next((one for one in _repositories() if one.repo_id == repo), None)
    if found is None:
        raise CheckpointError(f"{repo}: no such folder, and not in the hub's cache")
    if found.repo_path.is_symlink():  # the hub's library would remove only the link
        raise OutlierError(f"{found.repo_path}: is a link: remove it, and what it names, yourself")
    return found


def _repositories() -> "list[CachedRepoInfo]":
    """The repositories of models in the cache."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, ValueError):  # nothing was ever fetched
        return []
    models = [repo for repo in repos if repo.repo_type == "model" and repo.revisions]
    return sorted(models, key=lambda repo: repo.repo_id.casefold())


def _snapshot(repo: "CachedRepoInfo") -> Path:
    """The folder of the revision that came last."""
    return max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path


def _models_in(folder: Path) -> list[Path]:
    """The folder itself if it is a model, else the GGUF files in it."""
    try:
        return [folder] if (folder / CONFIG).is_file() else entries(folder, "*.gguf")
    except OSError:  # not this user's
        return []


def _in_place(place: Path) -> Listed:
    files = files_below(place) if place.is_dir() else [place]
    stats = [path.stat() for path in files if path.exists()]
    used = max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=0.0)
    return Listed(
        str(named(place)), False, place, sum(s.st_size for s in stats), _form(place), used
    )


def _form(place: Path) -> str:
    """What a model is, in words."""
    try:
        if holds_gguf(place):
            files = len(entries(place, "*.gguf"))
            return f"GGUF, {files} files" if files > 1 else "GGUF"
        if not (place / CONFIG).exists():
            return "no config.json"
        with _unseen(place):
            return _words(inspect(place))
    except (OutlierError, OSError) as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            return f"needs the package {error.__cause__.name}"
        return "not complete, or not valid"


def _words(info: Info) -> str:
    if info.kind != "model":
        return f"{info.kind}, {info.form}"
    if info.quantization is not None:
        return f"{info.form}, {info.quantization['bits']} bits"
    return f"{info.form}, {info.dtype}" if info.dtype else info.form
