"""Paths of input files, which must not lead out of their folder."""

from pathlib import Path

from outlier_mlx.errors import CheckpointError


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
