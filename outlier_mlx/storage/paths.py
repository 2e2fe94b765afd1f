"""What is in a folder, without hidden files; and paths, which must not lead out of their folder.

Files are hidden whose names begin with a dot. None of them is a part of any model, and macOS writes
`._NAME` beside every file on drives that have no place for its metadata. Folders are listed here
alone, so that no command reads them, lists them or complains of them.
"""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from outlier_mlx.errors import CheckpointError

#: Names of hidden files in a repository, for huggingface_hub.
HIDDEN = (".*", "*/.*")


def is_hidden(name: str) -> bool:
    """Whether a name, or any part of a path in a folder or repository, begins with a dot."""
    return any(part.startswith(".") for part in Path(name).parts)


def entries(folder: Path, pattern: str = "*", *, hidden: bool = False) -> list[Path]:
    """What is in a folder, sorted by name; nothing if there is no such folder.

    Args:
        folder: where to look; folders in it are listed, not entered.
        pattern: what a name must be like, with `*`, `?` and `[...]`.
        hidden: list hidden files, too: for what this project hides itself.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(_chosen(names, pattern, hidden))]


def files_below(folder: Path, pattern: str = "*", *, hidden: bool = False) -> list[Path]:
    """Everything at or below a folder that is not a folder, in path order; links are not followed.

    Args:
        folder: where to look.
        pattern: what a name must be like.
        hidden: also hidden files, and what is in hidden folders.
    """
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = _chosen(folders, "*", hidden)
        files += [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name) for name in _chosen(files, pattern, hidden)]
    return sorted(found)


def _chosen(names: list[str], pattern: str, hidden: bool) -> list[str]:
    return [n for n in names if fnmatchcase(n, pattern) and (hidden or not is_hidden(n))]


def no_folder(path: Path) -> str:
    """What is wrong with a path that is no folder."""
    return f"{path}: {'a file; expected a folder' if path.exists() else 'no such folder'}"


def named(path: str | Path) -> Path:
    """A path that ends in a name, for messages: of "." and "..", the absolute path."""
    path = Path(path)
    return path.resolve() if path.name in ("", "..") else path


def existing(sources: Iterable[str | Path | None]) -> list[Path]:
    """The files and folders among what was named as inputs; the others are repositories."""
    paths = [Path(source) for source in sources if source is not None]
    return [path for path in paths if path.exists()]


def is_within(place: Path, folder: Path) -> bool:
    """Whether an existing file or folder is `folder`, or in it, by whatever names and links."""
    try:
        wanted = folder.stat()
    except OSError:
        return False
    resolved = place.resolve()
    return any(os.path.samestat(at.stat(), wanted) for at in (resolved, *resolved.parents))


def require_plain(name: str, place: str) -> None:
    """Refuse a path that leads out of its folder on this or another system.

    Raises:
        CheckpointError: `name` is absolute, climbs out, or has a drive or backslash; `place` says
            where it was found.
    """
    suspicious = "\\" in name or "\0" in name or ":" in name or name.startswith("/")
    if suspicious or ".." in Path(name).parts:
        raise CheckpointError(f"{place}: {name[:300]!r} is not a plain path inside the folder")


def inside(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, refused if it is elsewhere.

    A hub cache keeps a snapshot's files as links to `blobs` beside `snapshots`, and some of those
    as links to the `blobs` that all repositories share; both are followed.

    Raises:
        CheckpointError: there is no such file (a folder or pipe is none), or `name` is absolute,
            climbs out, or links out of the folder.
    """
    require_plain(name, folder.name)
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
        repo = root.parent.parent
        allowed.append(repo / "blobs")
        if repo.name.startswith("models--"):
            allowed.append(repo.parent / "blobs")
    if not any(resolved.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: links out of its folder; use a copy or a hard link")
    return path
