"""Finding a conversion's sources: in folders, or on the hub, whole or a file at a time."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outlier_mlx.checkpoints import Overlay, open_overlay
from outlier_mlx.checkpoints.headers import head_bytes
from outlier_mlx.errors import CheckpointError, CheckpointWarning, OutlierError, OutputExistsError
from outlier_mlx.storage.hub import Source, local_source, resolve
from outlier_mlx.storage.remote import RemoteFile, fill, find_commit, mirror, mirrors
from outlier_mlx.tiers.plan import Plan
from outlier_mlx.writing.fetched import FetchedParts
from outlier_mlx.writing.folders import kept_folder
from outlier_mlx.writing.journal import read_identity
from outlier_mlx.writing.parts import Parts
from outlier_mlx.writing.runs import JOURNAL

#: A folder or repository, and the revision that was asked for, by "overlay" and "base".
Asked = dict[str, tuple[str | Path, str | None]]


@dataclass(frozen=True)
class Sources:
    """An overlay and its base, in folders that can be opened.

    Attributes:
        overlay: the overlay.
        base: the base; None where the overlay contains it.
        opened: the overlay, opened, and its alphas at hand.
        fetching: how the files of repositories get here one at a time: arguments of
            `FetchedParts`; None where all are here.
    """

    overlay: Source
    base: Source | None
    opened: Overlay
    fetching: dict[str, Any] | None = None

    @property
    def by_role(self) -> dict[str, Source]:
        """The sources by "overlay" and "base"."""
        return {"overlay": self.overlay} | ({"base": self.base} if self.base else {})

    def tensors(self, plan: Plan) -> Parts:
        """The tensors of a plan, and how they are written."""
        if self.fetching is None:
            return Parts(plan.parts, "the tier")
        return FetchedParts(
            plan.parts,
            "the tier with one source file",
            sources=self.by_role,
            settings={"recipe": asdict(plan.recipe)},
            **self.fetching,
        )


@contextmanager
def open_sources(
    overlay: str | Path,
    base: str | Path | None,
    target: Path,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    stream: bool = False,
    force: bool = False,
) -> Iterator[Sources]:
    """Find the sources of a conversion, fetching them whole, or with `stream` their headers.

    Args:
        overlay: a folder or hub repository.
        base: a folder or hub repository; None if the overlay contains it.
        target: the tier that will be made.
        revision: the overlay's revision on the hub.
        base_revision: the base's.
        stream: fetch what is on the hub one file at a time.
        force: discard an unfinished run with other settings.

    Raises:
        OutlierError: something is not there, or the hub cannot be reached or refuses.
    """
    asked: Asked = {"overlay": (overlay, revision)}
    if base is not None:
        asked["base"] = (base, base_revision)
    here = {role: local_source(*named) for role, named in asked.items()} if stream else {}
    if all(here.values()):
        # The base is not fetched for what turns out to be no overlay.
        found = here.get("overlay") or resolve(overlay, revision)
        opened = open_overlay(found.folder)
        base_found = here.get("base") or resolve(base, base_revision) if base is not None else None
        yield Sources(found, base_found, opened)
        return
    with mirrors() as work:
        kept = kept_folder(target)
        try:
            yield _mirrored(asked, here, kept, work, force=force)
        except (CheckpointError, OutputExistsError):
            raise
        except BaseException:
            if (kept / JOURNAL).exists():
                _tell(
                    f"{target}: unfinished: the same command resumes from here; to discard it,"
                    f" delete {kept}"
                )
            raise


def _mirrored(
    asked: Asked, here: dict[str, Source | None], kept: Path, work: Path, *, force: bool
) -> Sources:
    begun = read_identity(kept) or {}
    files: dict[Path, RemoteFile] = {}
    restart = False

    def find(role: str) -> Source:
        nonlocal restart
        local, (name, revision) = here[role], asked[role]
        if local is not None:
            return local
        repo = str(name)
        cited = begun.get(role)
        commit, gone = _choose_commit(
            repo, revision, cited if isinstance(cited, dict) else {}, kept
        )
        restart |= gone
        folder = work / role / repo
        files.update(mirror(repo, commit, folder, head_bytes))
        return Source(folder, repo, commit)

    overlay = find("overlay")
    opened = open_overlay(overlay.folder)
    fill(opened.alpha_tensors.values(), files)
    base = find("base") if "base" in asked else None
    revisions = {role: revision for role, (_, revision) in asked.items()}
    fetching = {"files": files, "asked": revisions, "force": force, "restart": restart}
    return Sources(overlay, base, opened, fetching)


def _choose_commit(
    repo: str, revision: str | None, begun: dict[str, Any], kept: Path
) -> tuple[str, bool]:
    """The commit to take, and whether the one that an unfinished run was begun with is gone.

    Two commits are never mixed: the run resumes with the one that it began with, or starts again.
    """
    now = find_commit(repo, revision)
    then = begun.get("revision")
    if then in (None, now) or (begun.get("name"), begun.get("asked")) != (repo, revision):
        return now, False
    moved = (
        f"{repo}: {revision or 'main'} is now {now[:12]}, but the unfinished run in {kept} began"
    )
    try:
        find_commit(repo, then)
    except OutlierError as error:
        from huggingface_hub.errors import RevisionNotFoundError

        if not isinstance(error.__cause__, RevisionNotFoundError):
            raise
        _tell(f"{moved} with {then[:12]}, which is gone: starting again")
        return now, True
    _tell(f"{moved} with {then[:12]}: resuming with that; to start again, delete the folder")
    return then, False


def _tell(text: str) -> None:
    warnings.warn(text, CheckpointWarning, stacklevel=3)
