"""What ranks make sure of before they compute together: that they are about to do the same."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

import outlier_mlx
from outlier_mlx.engine.distributed.ranks import PeerError, gathered, ranks
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.texts import read_bytes
from outlier_mlx.writing.assets import GENERATION, TOKENIZER_FILES

_OPTIONS = "checksum of the options"

_TEXTS = ("config.json", "tier.json", "tokenizer_config.json", GENERATION, *TOKENIZER_FILES)

#: What all ranks must have in common, and what to do if they have not.
COMMON = {
    "outlier-mlx": "install the same version everywhere",
    "mlx": "install the same version everywhere",
    "mlx-lm": "install the same version everywhere",
    "device": "start it with the same kind of device everywhere",
    "options": "start it with the same options everywhere",
    "model": "copy the model again",
}


# Of each tensor, so many bytes count, as far as they are there: models of one shape differ in them.
_SAMPLE = 256


def facts(paths: Sequence[Path], options: Sequence[str]) -> dict[str, str]:
    """What `COMMON` names, of this rank.

    Args:
        paths: the model's folder, and those of others; or files.
        options: the words of the command line.
    """
    found = {name: version(name) for name in ("mlx", "mlx-lm")}
    return found | {
        "outlier-mlx": outlier_mlx.__version__,
        "device": str(mx.default_device().type).rpartition(".")[2],
        "options": " ".join(options),
        "model": "+".join(map(checksum, paths)),
    }


def checksum(path: Path) -> str:
    """A checksum of a file; or of a model: its texts, and of its weights headers and samples.

    The manifest of a tier, `tier.json`, has checksums of all of its files.
    """
    digest = hashlib.sha256()
    for name in _TEXTS if path.is_dir() else ("",):
        file = path / name
        digest.update(read_bytes(file) if file.is_file() else b"")
    for tensor in read_shards(path).values() if path.is_dir() else ():
        digest.update(repr((tensor.name, tensor.dtype, tensor.shape, tensor.offset)).encode())
        with tensor.file.open("rb") as weights:
            weights.seek(tensor.offset)
            digest.update(weights.read(min(tensor.nbytes, _SAMPLE)))
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


def agree_on(name: str, text: str, cure: str) -> None:
    """Make sure that all ranks have the same text; all of them call it.

    Args:
        name: what it is, for the message.
        text: this rank's, of any length.
        cure: what to do if they differ, for the message.

    Raises:
        PeerError: names the first rank that differs from rank 0.
    """
    everyone = gathered(hashlib.sha256(text.encode()).hexdigest())
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise PeerError(f"rank {rank} differs from rank 0 in {name}: {cure}")
