"""Variants of the decode kernels, and the file of those that were fastest on this machine."""

import json
import os
import sys
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from .affine2 import row_bytes

DECODES = ("signs", "floor")
# Values that tuning may choose. The other way to decode gives no valid result.
CHOICES: dict[str, tuple[str | int, ...]] = {
    "decode": ("signs",),
    "rows": (2, 4, 8, 16),
    "pieces": (1, 2),
    "simdgroups": (1, 2, 4),
}
# Bytes of a row that a simdgroup loads as one piece.
PIECE_BYTES = 128
# Environment variable with the path of the file of chosen variants; empty: no file.
VARIANTS_VARIABLE = "OUTLIER_MLX_KERNELS"


@dataclass(frozen=True)
class Variant:
    """A variant of a decode kernel. All variants that decode give the same bits.

    Attributes:
        decode: method of decoding, see kernels/tq1_0.metal: "signs", or "floor", which only loads
            the bytes and gives no valid result.
        rows: number of rows of each matrix that a simdgroup computes, a power of two.
        pieces: number of times that a lane loads four bytes from each row in a step.
        simdgroups: number of simdgroups in a threadgroup.
    """

    decode: str = "signs"
    rows: int = 8
    pieces: int = 1
    simdgroups: int = 2

    def fitted(self, in_features: int, out_features: int) -> "Variant":
        """This variant, with fewer rows or pieces if the matrix requires it."""
        rows = self.rows
        while rows > out_features:
            rows //= 2
        pieces = self.pieces if row_bytes(in_features) > PIECE_BYTES else 1
        if (rows, pieces) == (self.rows, self.pieces):
            return self
        return replace(self, rows=rows, pieces=pieces)


def variants_file() -> Path | None:
    """The file of variants that tuning has chosen, in the user's settings folder.

    The environment variable OUTLIER_MLX_KERNELS sets another file; if it is empty, there is none.
    """
    named = os.environ.get(VARIANTS_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    return _settings_file(sys.platform, os.environ.get("XDG_CONFIG_HOME"), os.environ.get("HOME"))


@cache
def _settings_file(platform: str, config: str | None, home: str | None) -> Path | None:
    # Cached, because every launch calls it. `home` is only a key: Path.home() reads $HOME itself.
    try:
        if platform == "darwin":
            settings = Path.home() / "Library" / "Application Support"
        else:
            settings = Path(config or Path.home() / ".config")
    except RuntimeError:  # the user has no home directory
        return None
    return settings / "outlier-mlx" / "kernels.json"


def saved_variant(kernel: str) -> Variant | None:
    """The variant that tuning has chosen for a kernel on this chip, or None."""
    file = variants_file()
    return None if file is None else saved_variants(file).get(kernel)


@cache
def saved_variants(file: Path) -> dict[str, Variant]:
    """Read the variants for this chip from a file, by kernel. Each file is read only once.

    The file holds `{"chips": {CHIP: {KERNEL: {"decode": "signs", "rows": 8, ...}}}}`. A file
    with another content is ignored with a warning. If it does not exist, the result is empty.
    """
    try:
        chips = json.loads(file.read_text(encoding="utf-8"))["chips"]
        chosen = chips.get(chip_name(), {})
        return {kernel: parse_variant(fields) for kernel, fields in chosen.items()}
    except FileNotFoundError:
        return {}
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{file}: ignored: not a file of kernel variants: {reason}", stacklevel=2)
        return {}


def parse_variant(fields: dict[str, Any]) -> Variant:
    """Check the fields of a saved variant; returns the variant.

    Raises:
        TypeError: a field is unknown.
        ValueError: a value is not one of `CHOICES`.
    """
    variant = Variant(**fields)
    for name, choices in CHOICES.items():
        value = getattr(variant, name)
        if type(value) is not type(choices[0]) or value not in choices:
            raise ValueError(f"{name} {value!r} is not one of {choices}")
    return variant


def chip_name() -> str:
    """The chip's name in MLX."""
    return str(mx.device_info().get("device_name", "unknown chip"))
