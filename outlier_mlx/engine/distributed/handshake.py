"""What ranks make sure of before they compute together: that they agree, and that all are ready.

A rank that fails before that tells the others, so that all of them end with its reason.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

import outlier_mlx
from outlier_mlx.engine.distributed.ranks import gathered, ranks
from outlier_mlx.errors import OutlierError
from outlier_mlx.storage.shards import read_shards

_REASON, _MOST = "reason", 2048
# How often ranks still have to agree: once they know the model, and once they have loaded it.
_left = 0

#: What all ranks must have in common, and what to do if they have not.
COMMON = {
    "outlier-mlx": "install the same version everywhere",
    "mlx": "install the same version everywhere",
    "mlx-lm": "install the same version everywhere",
    "device": "start it with the same kind of device everywhere",
    "options": "start it with the same options everywhere",
    "model": "copy the model again",
}


class PeerError(OutlierError):
    """Another rank failed, or differs from the others."""


def expect_agreements() -> None:
    """Be ready to tell the other ranks if this one fails."""
    global _left
    _left = 2 if ranks().size > 1 else 0


def facts(folder: Path, options: Sequence[str]) -> dict[str, str]:
    """What `COMMON` names, of this rank.

    Args:
        folder: the model's.
        options: the words of the command line.
    """
    found = {name: version(name) for name in ("mlx", "mlx-lm")}
    return found | {
        "outlier-mlx": outlier_mlx.__version__,
        "device": str(mx.default_device().type).rpartition(".")[2],
        "options": " ".join(options),
        "model": checksum(folder),
    }


def checksum(folder: Path) -> str:
    """A checksum of a model: its config, what its manifest says, and the headers of its files."""
    digest = hashlib.sha256()
    for name in ("config.json", "tier.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    for tensor in read_shards(folder).values():
        digest.update(repr((tensor.name, tensor.dtype, tensor.shape, tensor.offset)).encode())
    return digest.hexdigest()[:16]


def agree(mine: Mapping[str, str]) -> None:
    """Make sure that all ranks have the same facts; all of them call it, or `fail`.

    Raises:
        PeerError: names the first rank that differs from rank 0, or that failed.
    """
    global _left
    if _left < 1:
        return
    _left -= 1
    # The options can be long: their beginning is for people, and a checksum decides.
    told = {name: text[:120] for name, text in mine.items()}
    told["options_sum"] = hashlib.sha256(mine.get("options", "").encode()).hexdigest()[:16]
    found = [json.loads(text) for text in gathered(json.dumps(told), _MOST)]
    problem = _difference(found)
    if problem is not None:
        _left = 0
        raise PeerError(problem)


def _difference(found: Sequence[Mapping[str, str]]) -> str | None:
    """The first failure, or the first rank that differs from rank 0."""
    for rank, theirs in enumerate(found):
        if _REASON in theirs:
            return f"rank {rank}: {theirs[_REASON]}"
    for name, cure in COMMON.items():
        keys = (name, "options_sum") if name == "options" else (name,)
        for rank, theirs in enumerate(found):
            if any(theirs.get(key) != found[0].get(key) for key in keys):
                return (
                    f"rank {rank} differs from rank 0 in {name}: {theirs.get(name)!r}, not"
                    f" {found[0].get(name)!r}: {cure}"
                )
    return None


def fail(reason: str) -> None:
    """Tell the other ranks why this one ends, if they wait for `agree`."""
    global _left
    if _left > 0:
        _left = 0
        gathered(json.dumps({_REASON: reason[:400]}), _MOST)
