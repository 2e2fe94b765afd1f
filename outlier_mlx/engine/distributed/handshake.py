"""What ranks make sure of before they compute together: that they are about to do the same."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

import outlier_mlx
from outlier_mlx.engine.distributed.ranks import PeerError, gathered, ranks
from outlier_mlx.storage.shards import read_shards

_OPTIONS = "checksum of the options"

#: What all ranks must have in common, and what to do if they have not.
COMMON = {
    "outlier-mlx": "install the same version everywhere",
    "mlx": "install the same version everywhere",
    "mlx-lm": "install the same version everywhere",
    "device": "start it with the same kind of device everywhere",
    "options": "start it with the same options everywhere",
    "model": "copy the model again",
}


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
    """Make sure that all ranks have the same facts; all of them call it.

    Raises:
        PeerError: names the first rank that differs from rank 0, or that failed.
    """
    # What people see is short; a checksum decides.
    digest = hashlib.sha256(mine["options"].encode()).hexdigest()[:16]
    told = {name: text[:100] for name, text in mine.items()} | {_OPTIONS: digest}
    everyone: list[dict[str, str]] = [{} for _ in range(ranks().size)]
    for name in (*COMMON, _OPTIONS):
        for rank, text in enumerate(gathered(told[name])):
            everyone[rank][name] = text
    for name, cure in COMMON.items():
        keys = (name, _OPTIONS) if name == "options" else (name,)
        for rank, theirs in enumerate(everyone):
            if any(theirs[key] != everyone[0][key] for key in keys):
                raise PeerError(
                    f"rank {rank} differs from rank 0 in {name}: {theirs[name]!r}, not"
                    f" {everyone[0][name]!r}: {cure}"
                )
