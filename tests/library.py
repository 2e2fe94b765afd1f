"""Small checkpoints and tiers that many tests read, each made once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from outlier_mlx.cli.showcase import FOLDER
from tests.builders import Built, write_base, write_overlay
from tests.engine import tier_of
from tests.folders import snapshot
from tests.ternary_models import Ternary, write_ternary

TEXT = "the cat sat on the mat and the dog sat on the log " * 16


class Library:
    """Makes models when they are first asked for.

    They are for reading: a test that changes one copies it, and `check` fails otherwise.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, Any] = {}
        self._as_made: dict[Path, dict[str, str]] = {}

    def overlay(self, **how: Any) -> Built:
        """An overlay; `how` is as for `write_overlay`."""
        return self._once("overlay", lambda path: write_overlay(path, **how), how)

    def base(self, **how: Any) -> Built:
        """A base model; `how` is as for `write_base`."""
        return self._once("base", lambda path: write_base(path, **how), how)

    def tier(self, overlay: Built | None = None, **recipe: Any) -> Path:
        """A tier of an overlay that holds its base, by default the plain one.

        `recipe` is as for `outlier_mlx.convert`; float32 unless told.
        """
        of = (overlay or self.overlay()).path
        return self._once("tier", lambda path: tier_of(of, None, path, **recipe), of, recipe)

    def demo_tier(self, name: str) -> Path:
        """A tier of the embedded pair with six of its experts, in the recipe of a name."""
        overlay = self._once("overlay", lambda path: _first_experts(6, path), "demo")

        return self._once(
            "tier", lambda path: tier_of(overlay, FOLDER / "base", path, tier=name), "demo", name
        )

    def ternary(self, **how: Any) -> Ternary:
        """A model with ternary matrices; `how` is as for `write_ternary`."""
        return self._once("ternary", lambda path: write_ternary(path, **how), how)

    def place(self, **how: Any) -> Path:
        """A folder with `overlay`, its int4 `tier` and `text.txt`; `how` is of the overlay."""

        def make(folder: Path) -> Path:
            write_overlay(folder / "overlay", **how)
            tier_of(folder / "overlay", None, folder / "tier", tier="q4")
            (folder / "text.txt").write_text(TEXT)
            return folder

        return self._once("place", make, how)

    def check(self) -> None:
        """Everything is still as it was made."""
        for folder, before in self._as_made.items():
            assert snapshot(folder) == before, f"a test changed what is in {folder}"

    def _once(self, name: str, make: Callable[[Path], Any], *how: object) -> Any:
        key = f"{name} {how}"
        if key not in self._made:
            folder = self.root / str(len(self._made))
            self._made[key] = make(folder / name)
            self._as_made[folder] = snapshot(folder)
        return self._made[key]


def _first_experts(count: int, out: Path) -> Path:
    """The embedded overlay with the first experts of each layer: no power of two."""
    embedded = FOLDER / "overlay"
    config = json.loads((embedded / "config.json").read_text())
    tensors = {}
    for name, array in load_file(next(embedded.glob("model-*.safetensors"))).items():
        number = re.search(r"\.experts\.(\d+)\.", name)
        if number is None:
            tensors[name] = np.ascontiguousarray(array[:count])
        elif int(number[1]) < count:
            tensors[name] = array
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config | {"n_experts": count}))
    return out
