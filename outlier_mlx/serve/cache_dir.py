"""What `serve --cache-dir` says, and of which model and options caches on disk are."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from outlier_mlx.engine.sessions import identity
from outlier_mlx.storage.paths import entries


@dataclass(frozen=True)
class CacheDir:
    """Where KV caches are kept on disk, and what they belong to.

    Attributes:
        path: the folder that the user named.
        nbytes: what all files of ours in it may take.
        place: where the model is. What other weights left there is of no use any more.
        model: gives a digest of the model's weights.
        options: all else that decides what is in a KV cache, as text.
    """

    path: Path
    nbytes: int
    place: str
    model: Callable[[], str]
    options: str


def cache_dir(
    path: Path, nbytes: int, folder: Path, dtype: str | None, alpha: Path | None, *options: Any
) -> CacheDir:
    """What a server of a model keeps on disk.

    Args:
        path: the folder for it.
        nbytes: what all caches in it may take.
        folder: the model folder.
        dtype: activation dtype of `--dtype`, or None.
        alpha: file of `--alpha`, or None.
        options: other options that change what is in a KV cache.
    """
    # In the hub cache, each revision of a repository has a folder of its own.
    hub = folder.parent.name == "snapshots"
    place = folder.parent.parent if hub else folder
    packages = [_version(name) for name in ("outlier-mlx", "mlx", "mlx-lm")]
    tokenizer = [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in entries(folder, "tokenizer*.json")
    ]
    state = [identity(folder, dtype, alpha), packages, tokenizer, options]
    model = partial(identity, folder, None, times=True)
    return CacheDir(path, nbytes, str(place.resolve()), model, json.dumps(state))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a folder, without an installation
        return ""
