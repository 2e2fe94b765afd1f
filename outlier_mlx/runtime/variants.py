"""Forms of the decode kernels, and which of them the user's machine was found to run fastest."""

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

DECODES = ("exponent", "exact", "telescoped", "floor")
# What may be chosen by measurement: the other decodes are less accurate, or compute nothing.
CHOICES: dict[str, tuple[str | int, ...]] = {
    "decode": ("exponent", "exact"),
    "rows": (2, 4, 8, 16),
    "load_bits": (32, 64),
    "simdgroups": (1, 2, 4),
}
# The environment variable that names the file of chosen variants; empty: none.
VARIANTS_VARIABLE = "OUTLIER_MLX_KERNELS"


@dataclass(frozen=True)
class Variant:
    """One of the forms of a decode kernel; they differ in speed and rounding.

    Attributes:
        decode: how digits leave their byte: "exponent", "exact", "telescoped", or "floor", which
            only loads and whose results mean nothing. See kernels/tq1_0.metal.
        rows: rows of a matrix that a simdgroup computes, a power of two.
        load_bits: 32 or 64, what a lane loads of a row at a time.
        simdgroups: simdgroups in a threadgroup.
    """

    decode: str = "exponent"
    rows: int = 8
    load_bits: int = 32
    simdgroups: int = 2

    def fitted(self, in_features: int, out_features: int) -> "Variant":
        """This variant, with fewer rows or smaller loads where the matrix does not allow them."""
        rows = self.rows
        while rows > out_features:
            rows //= 2
        odd = row_bytes(in_features) % (self.load_bits // 8)
        if rows == self.rows and not odd:
            return self
        return replace(self, rows=rows, load_bits=32 if odd else self.load_bits)


def variants_file() -> Path | None:
    """Where variants chosen by measurement are kept: a file in the user's folder for settings.

    The environment variable OUTLIER_MLX_KERNELS names another, or none if it is empty.
    """
    named = os.environ.get(VARIANTS_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    return _settings_file(sys.platform, os.environ.get("XDG_CONFIG_HOME"), os.environ.get("HOME"))


@cache
def _settings_file(platform: str, config: str | None, home: str | None) -> Path | None:
    # Kept, because every launch asks. `home` is what Path.home() goes by.
    try:
        if platform == "darwin":
            settings = Path.home() / "Library" / "Application Support"
        else:
            settings = Path(config or Path.home() / ".config")
    except RuntimeError:  # a user without a home
        return None
    return settings / "outlier-mlx" / "kernels.json"


def saved_variant(kernel: str) -> Variant | None:
    """What was chosen for a kernel on this chip, if anything was; the file is read once."""
    file = variants_file()
    return None if file is None else saved_variants(file).get(kernel)


@cache
def saved_variants(file: Path) -> dict[str, Variant]:
    """The variants that a file has for this chip, by kernel.

    The file holds `{"chips": {CHIP: {KERNEL: {"decode": "exponent", "rows": 8, ...}}}}`. One that
    cannot be read as that is ignored, with a warning; without one there are no variants.
    """
    try:
        chips = json.loads(file.read_text(encoding="utf-8"))["chips"]
        chosen = chips.get(chip_name(), {})
        return {kernel: parse_variant(fields) for kernel, fields in chosen.items()}
    except FileNotFoundError:
        return {}
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{file}: ignored, not a file of kernel variants: {reason}", stacklevel=2)
        return {}


def parse_variant(fields: dict[str, Any]) -> Variant:
    """A variant of those that may be chosen.

    Raises:
        TypeError: a field that no variant has.
        ValueError: a value that is not one of `CHOICES`.
    """
    variant = Variant(**fields)
    for name, choices in CHOICES.items():
        value = getattr(variant, name)
        if type(value) is not type(choices[0]) or value not in choices:
            raise ValueError(f"{name} {value!r} is not one of {choices}")
    return variant


def chip_name() -> str:
    """The chip's name, as MLX says it."""
    return str(mx.device_info().get("device_name", "unknown chip"))
