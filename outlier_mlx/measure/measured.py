"""What was measured of a tier: `measured.json` beside its manifest, for the card that is pushed."""

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.output import write_json
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import read_bytes, read_json

FILE = "measured.json"
_MANIFEST = "tier.json"


@dataclass(frozen=True)
class Measured:
    """A perplexity on a text.

    Attributes:
        text: the text's file name.
        sha256: of the text's bytes, in hexadecimal digits.
        window: tokens in a window, as asked for.
        windows: how many at most; None for all.
        tokens: tokens that were predicted.
        perplexity: exp of the mean loss.
        standard_error: of the loss, in nats.
        dtype: of the activations.
        chip: what it ran on.
        versions: of what it ran in.
        against: the model that `kl` is the distance from; None without one.
        kl: Kullback-Leibler divergence from that model's predictions, in nats.
        agreement: share of tokens for which both find the same token the likeliest.
    """

    text: str
    sha256: str
    window: int
    windows: int | None
    tokens: int
    perplexity: float
    standard_error: float
    dtype: str
    chip: str
    versions: str
    against: str | None = None
    kl: float | None = None
    agreement: float | None = None

    @property
    def key(self) -> tuple:
        """What tells one measurement from another; a second of the same replaces the first."""
        return self.sha256, self.window, self.windows, self.dtype, self.chip, self.against


def require_tier(path: str | Path) -> Path:
    """The folder of a tier, which alone has a place for what is measured.

    Raises:
        OutlierError: it is none.
    """
    folder = Path(path)
    if not (folder / _MANIFEST).is_file():
        raise OutlierError(f"{path}: not the folder of a tier, so nothing can be recorded in it")
    return folder


def record(folder: Path, measured: Measured) -> None:
    """Add a measurement to a tier's; the file appears whole or not at all.

    Measurements of other weights, which the tier in this folder once had, are dropped.
    """
    others = [one for one in read_measured(folder) if one.key != measured.key]
    entries = [asdict(one) for one in [*others, measured]]
    value = {"manifest": _digest(folder), "perplexity": entries}
    write_json(folder / FILE, value)


def read_measured(folder: Path) -> list[Measured]:
    """What was measured of the weights that a tier's manifest lists.

    Returns:
        Nothing if there is no such file, or if it is of other weights.

    Raises:
        CheckpointError: the file is not one that `record` writes.
    """
    if not (folder / FILE).exists():
        return []
    value = read_json(inside(folder, FILE))
    if value.get("manifest") != _digest(folder):
        return []
    entries = value.get("perplexity")
    if not isinstance(entries, list):
        raise CheckpointError(f"{FILE}: perplexity: a list was expected")
    return [_measured(entry) for entry in entries]


def _measured(entry: object) -> Measured:
    hints = get_type_hints(Measured)
    names = {field.name for field in fields(Measured)}
    if not isinstance(entry, dict) or set(entry) != names:
        raise CheckpointError(f"{FILE}: perplexity: expected entries of {', '.join(sorted(names))}")
    for name, value in entry.items():
        if not isinstance(value, hints[name]):
            raise CheckpointError(f"{FILE}: {name} is {value!r}")
    return Measured(**entry)


def _digest(folder: Path) -> str:
    return hashlib.sha256(read_bytes(inside(folder, _MANIFEST))).hexdigest()
