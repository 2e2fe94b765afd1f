"""Where models are: in a local folder, or in a repository on the Hugging Face hub."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.hub_errors import hub_errors
from outlier_mlx.storage.paths import HIDDEN, named

#: The files of a checkpoint or tier; no others are fetched.
CHECKPOINT_FILES = (
    "*.json",
    "*.safetensors",
    "alpha_overlay.pt",
    "packed_experts/*.bin",
    "*expert*.gguf",
    "*.txt",
    "*.jinja",
    "tokenizer.model",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Where a model came from, without a path of this machine.

    Attributes:
        folder: where its files are now.
        name: the repository, or the folder's own name.
        revision: the commit on the hub; None for a folder.
    """

    folder: Path
    name: str
    revision: str | None = None


def resolve(
    path_or_repo: str | Path,
    revision: str | None = None,
    files: tuple[str, ...] = CHECKPOINT_FILES,
) -> Source:
    """Find a model's folder, fetching it from the hub if it is a repository.

    Login, cache, mirror and offline mode are huggingface_hub's own (`hf auth login`, HF_HOME,
    HF_ENDPOINT, HF_HUB_OFFLINE).

    Args:
        path_or_repo: a folder, or a repository such as "Qwen/Qwen2.5-7B-Instruct".
        revision: branch, tag or commit on the hub; refused for a folder.
        files: patterns of the files to fetch.

    Raises:
        CheckpointError: neither a folder nor the name of a repository.
        OutlierError: the hub cannot be reached or refuses.
    """
    local = local_source(path_or_repo, revision)
    if local is not None:
        return local
    from huggingface_hub import snapshot_download

    name = str(path_or_repo)
    with hub_errors(name):
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=list(HIDDEN),
            tqdm_class=_terminal_bar(),
        )
    return Source(Path(found), name, Path(found).name)


def local_source(path_or_repo: str | Path, revision: str | None = None) -> Source | None:
    """The local folder; None for the name of a repository. The hub is not asked.

    Raises:
        CheckpointError: it is neither, or a folder with a revision.
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{folder}: a folder has no revision")
        return Source(named(folder), folder.resolve().name)
    name = str(path_or_repo)
    if folder.exists():
        way = f"; outlier-mlx import {quote(name)} makes one" if folder.suffix == ".gguf" else ""
        raise CheckpointError(
            f"{name}: a file; expected a folder or hub repository (OWNER/NAME){way}"
        )
    if not _REPO.fullmatch(name):
        raise CheckpointError(f"{name}: no such folder, and not a hub repository (OWNER/NAME)")
    return None


def cached(repo: str, revision: str | None = None) -> Path | None:
    """The snapshot of a repository if all that `resolve` fetches is in the local cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(CHECKPOINT_FILES),
            ignore_patterns=list(HIDDEN),
            local_files_only=True,
        )
    except (
        errors.LocalEntryNotFoundError,
        errors.IncompleteSnapshotError,
        errors.HFValidationError,
    ):
        return None
    return Path(found)


def _terminal_bar() -> type:
    """The hub's progress bar, shown only on a terminal."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            hidden = kwargs.get("disable") or not sys.stderr.isatty()
            super().__init__(*args, **kwargs | {"disable": hidden})

    return Bar
