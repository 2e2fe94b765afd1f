"""Measurements of a tier or a ternary model: `measured.json` beside its manifest, for its card."""

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.models.config import is_ternary_model, raw_config
from outlier_mlx.storage.output import write_json
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_bytes, read_json
from outlier_mlx.writing.manifest import MEASUREMENTS

_TIER, _TERNARY = "tier.json", "checksums.json"


@dataclass(frozen=True)
class Measured:
    """A perplexity on a text.

    Attributes:
        text: the text's file name.
        sha256: SHA-256 of the text's bytes, hexadecimal.
        window: tokens in a window, as given.
        windows: number of windows, at most; None for all.
        tokens: number of predicted tokens.
        perplexity: exp of the mean loss.
        standard_error: standard error of the loss, in nats.
        dtype: activation dtype.
        chip: the chip it ran on.
        versions: versions of this package, mlx and mlx-lm.
        against: the other model, for `kl` and `agreement`; None without one.
        kl: Kullback-Leibler divergence from the other model's predictions, in nats.
        agreement: share of positions where both models' likeliest tokens are equal.
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
        """Identifies a measurement: a new one with the same key replaces the old one."""
        return self.sha256, self.window, self.windows, self.dtype, self.chip, self.against


def require_recordable(path: str | Path) -> Path:
    """The folder of a tier or an imported ternary model, in which measurements can be recorded.

    Raises:
        OutlierError: the path is not such a folder.
    """
    folder = Path(path)
    if (folder / _TIER).is_file():
        return folder
    if (folder / _TERNARY).is_file() and is_ternary_model(raw_config(folder)):
        return folder
    raise OutlierError(
        f"{path}: not the folder of a tier or a ternary model, so results cannot be saved in it"
    )


def record(folder: Path, measured: Measured) -> None:
    """Add a measurement to a model's folder; the file appears whole or not at all.

    Measurements of earlier weights are dropped.
    """
    others = [one for one in read_measured(folder) if one.key != measured.key]
    entries = [asdict(one) for one in [*others, measured]]
    value = {"manifest": _digest(folder), "perplexity": entries}
    write_json(folder / MEASUREMENTS, value)


def read_measured(folder: Path) -> list[Measured]:
    """The measurements of a model's present weights.

    Returns:
        Empty without a file, or if the file is of other weights.

    Raises:
        CheckpointError: the file was not written by `record`.
    """
    if not (folder / MEASUREMENTS).exists():
        return []
    value = read_json(inside(folder, MEASUREMENTS))
    if value.get("manifest") != _digest(folder):
        return []
    entries = value.get("perplexity")
    if not isinstance(entries, list):
        raise CheckpointError(f"{MEASUREMENTS}: perplexity: expected a list")
    return [_measured(entry) for entry in entries]


def _measured(entry: object) -> Measured:
    hints = get_type_hints(Measured)
    names = {field.name for field in fields(Measured)}
    if not isinstance(entry, dict) or set(entry) != names:
        raise CheckpointError(
            f"{MEASUREMENTS}: perplexity: expected entries of {', '.join(sorted(names))}"
        )
    for name, value in entry.items():
        if not isinstance(value, hints[name]):
            raise CheckpointError(f"{MEASUREMENTS}: {name} is {value!r}")
    return Measured(**entry)


def _digest(folder: Path) -> str:
    name = _TIER if (folder / _TIER).exists() else _TERNARY
    return hashlib.sha256(read_bytes(inside(folder, name))).hexdigest()
