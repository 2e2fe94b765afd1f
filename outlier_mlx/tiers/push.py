"""Pushing a publication: what the repository has, what may be replaced, and one commit."""

import hashlib
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from outlier_mlx.checkpoints.overlay_card import is_upcycled
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.hub_errors import hub_errors
from outlier_mlx.storage.paths import is_hidden
from outlier_mlx.storage.texts import read_bytes, read_json
from outlier_mlx.tiers.publication import IMPORTED, MANIFEST, Publication, Upload
from outlier_mlx.writing.assets import is_legal
from outlier_mlx.writing.licences import CARD
from outlier_mlx.writing.manifest import MEASUREMENTS, is_loaded

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile, RepoFolder

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Published:
    """A publication that is on the hub.

    Attributes:
        url: where it is.
        sent: names of the files that are new or changed.
        nbytes: bytes of those.
        removed: names of files that only the former version had.
    """

    url: str
    sent: list[str]
    nbytes: int
    removed: list[str]


def check_login(repo: str) -> None:
    """Check that there is a login at all; whether it may write to `repo`, only the hub knows.

    Raises:
        OutlierError: there is no login.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise OutlierError(f"{repo}: not logged in: run `hf auth login`, or set HF_TOKEN")


def publish(
    publication: Publication,
    *,
    revision: str | None = None,
    message: str | None = None,
    force: bool = False,
    quiet: bool = False,
) -> Published:
    """Publish in one commit. If it is interrupted, the repository's files stay as they were.

    Files that are there already are not sent again. Of those that only the former version had,
    shards and what its manifest lists are removed; the rest stays.

    Args:
        publication: as `prepare` made it.
        revision: the branch, made if there is none; "main" if not given.
        message: commit message.
        force: replace another model's files.
        quiet: no bars.

    Raises:
        OutlierError: there is no login, the hub cannot be reached or refuses, or the repository
            holds something else.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    repo = publication.repo
    check_login(repo)
    api = HfApi()
    bars = nullcontext() if sys.stderr.isatty() and not quiet else disable_progress_bars()
    with bars, hub_errors(repo, writing=True):
        info, missing_branch = _open_repo(api, publication, revision)
        assert info.sha is not None
        there = {file.path: file for file in api.list_repo_tree(repo, revision=info.sha)}
        names = [name for name in (MANIFEST, IMPORTED) if name in there]
        former = _former_manifest(api, repo, names[0], info.sha) if names else None
        _check_replaceable(publication, there, former, force=force)
        removed = _superfluous(publication, there, former)
        _check_rest(publication, there, removed)
        changed = [u for u in publication.uploads.values() if not _is_there(u, there.get(u.name))]
        if missing_branch:
            assert revision is not None
            api.create_branch(repo, branch=revision, revision=info.sha)
        if changed or removed:
            additions = [CommitOperationAdd(upload.name, upload.content) for upload in changed]
            for operation, upload in zip(additions, changed, strict=True):
                operation.upload_info.sha256 = bytes.fromhex(upload.sha256)  # not hashed again
            api.create_commit(
                repo,
                [*additions, *(CommitOperationDelete(name) for name in removed)],
                commit_message=message or _message(publication.manifest),
                revision=revision,
                parent_commit=info.sha,
            )
    url = f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")
    return Published(url, [u.name for u in changed], sum(u.nbytes for u in changed), removed)


def _message(manifest: dict) -> str:
    source, _, recipe, *_ = _identity(manifest)
    made = f"Tier {recipe}" if source is not None else "Ternary model"
    if is_upcycled(manifest):
        made = "Overlay"
    return f"{made}, made by {manifest.get('producer')}"


def _open_repo(
    api: "HfApi", publication: Publication, branch: str | None
) -> tuple["ModelInfo", bool]:
    """The head of the branch, and whether the branch is still to be made from it."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repo = publication.repo
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        # Without --private, an organisation's own default decides.
        api.create_repo(repo, private=publication.private or None)
        info = api.model_info(repo)
    if publication.private and not info.private:
        raise OutlierError(f"{repo}: exists and is public, so --private cannot keep it private")
    if branch is None:
        return info, False
    try:
        return api.model_info(repo, revision=branch), False
    except RevisionNotFoundError:
        return info, True


def _former_manifest(api: "HfApi", repo: str, name: str, commit: str) -> dict:
    """The manifest in a repository; empty if it is none."""
    try:
        return read_json(Path(api.hf_hub_download(repo, name, revision=commit)))
    except CheckpointError:
        return {}


def _identity(manifest: dict) -> tuple:
    """Names of overlay, base, recipe and source, without revisions; and whether it was trained."""
    entries = [manifest.get(key) for key in ("overlay", "base", "recipe", "source")]
    names = (entry.get("name") if isinstance(entry, dict) else None for entry in entries)
    return (*names, is_upcycled(manifest))


def _check_replaceable(
    publication: Publication, there: dict, former: dict | None, *, force: bool
) -> None:
    if force:
        return
    if former is not None:
        if _identity(former) != _identity(publication.manifest):
            overlay, _, recipe, source, _ = _identity(former)
            what = (
                f"another model ({source})" if source else f"another tier ({recipe} of {overlay})"
            )
            raise OutlierError(f"{publication.repo}: holds {what}; --force replaces it")
        return
    others = [n for n in there if n != CARD and not is_hidden(n) and not is_legal(n)]
    if others:
        raise OutlierError(
            f"{publication.repo}: holds something that is not a tier ({others[0]});"
            " --force adds the tier to it"
        )


def _superfluous(publication: Publication, there: dict, former: dict | None) -> list[str]:
    """Files of the version before: its shards, what its manifest lists, what was measured of it."""
    listed = (former or {}).get("files")
    ours = {MEASUREMENTS, *(listed if isinstance(listed, dict) else ())}
    return sorted(
        name
        for name in there
        if name not in publication.uploads and (name in ours or _SHARD.fullmatch(name))
    )


def _check_rest(publication: Publication, there: dict, removed: list[str]) -> None:
    """What stays must not be taken for a part of the tier."""
    for name in set(there) - set(publication.uploads) - set(removed):
        if not is_hidden(name) and is_loaded(name):
            raise OutlierError(
                f"{publication.repo}: has {name}, which would be loaded with the tier; remove it"
                " there first"
            )


def _is_there(upload: Upload, file: "RepoFile | RepoFolder | None") -> bool:
    """Whether the repository has these bytes under this name."""
    if file is None or getattr(file, "size", None) != upload.nbytes:
        return False
    lfs = getattr(file, "lfs", None)
    if lfs is not None:
        return bool(lfs.sha256 == upload.sha256)
    content = upload.content if isinstance(upload.content, bytes) else read_bytes(upload.content)
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content)  # the name that git gives a file
    return blob.hexdigest() == getattr(file, "blob_id", None)
