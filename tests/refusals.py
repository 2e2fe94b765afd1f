"""Refusals: sound inputs to damage, ways to damage them, and what every refusal must be like."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import outlier_mlx
from tests.builders import write_base, write_overlay
from tests.damage import (
    INDEX,
    add_tensor,
    corrupt_header,
    drop_tensor,
    edit_config,
    edit_json,
    find_tensor,
    replace_tensor,
)
from tests.folders import snapshot
from tests.program import assert_refused, run

DIMS: dict[str, Any] = {
    "intermediate": 64,
    "expert_intermediate": 40,
    "layers": 2,
    "moe_layers": (1,),
    "experts": 2,
}
HIDDEN, WIDTH, VOCAB = 64, 40, 288
MLP = "model.layers.1.mlp."
EXPERT = MLP + "experts.1."
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@dataclass(frozen=True)
class Site:
    """A place to work in: sound inputs, and a folder for outputs that holds something already."""

    root: Path

    @property
    def overlay(self) -> Path:
        """A V3.2 overlay with its base, in two shards."""
        return self.root / "overlay"

    @property
    def bare(self) -> Path:
        """The same without base."""
        return self.root / "bare"

    @property
    def base(self) -> Path:
        """Its base."""
        return self.root / "base"

    @property
    def tier(self) -> Path:
        """A tier made from them."""
        return self.root / "tier"

    @property
    def outputs(self) -> Path:
        """Where outputs go."""
        return self.root / "outputs"


def build(root: Path) -> Site:
    """Make everything that a site has."""
    site = Site(root)
    write_overlay(site.overlay, shards=2, **DIMS)
    write_overlay(site.bare, with_base=False, tokenizer=False, **DIMS)
    write_base(site.base, shards=2, layers=2, intermediate=64)
    outlier_mlx.convert(site.overlay, out=site.tier)
    site.outputs.mkdir()
    (site.outputs / "note").write_text("here before")
    return site


def refuse(site: Site, *command: object, words: tuple[str, ...]) -> None:
    """Run a command that must be refused and must not change a byte below the site."""
    before = snapshot(site.root)
    assert_refused(run(*command, code=1), *words)
    assert snapshot(site.root) == before


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the parsed header of a shard and leave its data as it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    corrupt_header(path, json.dumps(header).encode())


def shift(path: Path, key: str, by: int) -> None:
    """Say that a tensor's data begins `by` bytes later."""

    def change(header: dict[str, Any]) -> None:
        header[key]["data_offsets"] = [place + by for place in header[key]["data_offsets"]]

    rewrite_header(path, change)


def changed(folder: Path, key: str, place: tuple[int, ...], value: float) -> None:
    """Put one value into a tensor."""
    array = find_tensor(folder, key)[1].array().copy()
    array[place] = value
    replace_tensor(folder, key, array)


def without_expert(folder: Path) -> None:
    for part in ("gate", "up", "down"):
        drop_tensor(folder, f"{EXPERT}{part}_ternary")
        drop_tensor(folder, f"{EXPERT}{part}_scale")


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def holder(folder: Path) -> str:
    """The shard of the last norm."""
    return find_tensor(folder, "model.norm.weight")[0].name


def listed_elsewhere(folder: Path, name: str, key: str = "model.norm.weight") -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {key: name})


def linked_out(folder: Path, name: str) -> None:
    """Move a file out of the folder and leave a link to it."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)


def in_both_shards(folder: Path) -> None:
    _, tensor = find_tensor(folder, "model.norm.weight")
    other = SECOND if holder(folder) == FIRST else FIRST
    add_tensor(folder, "model.norm.weight", tensor.array(), tensor.dtype, other)


def alpha_json(text: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "alpha.json").write_text(text)

    return write


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **changes)


def tensor(key: str, value: Any, dtype: str | None = None) -> Callable[[Path], object]:
    return lambda folder: replace_tensor(folder, key, value, dtype)


def shape(*sizes: int) -> np.ndarray:
    return np.zeros(sizes, np.float32)


# What is done to the overlay, and what the message must say.
