"""Conversions that fetch one source file at a time, and what of them is fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import outlier_mlx
from outlier_mlx.errors import CheckpointWarning, OutlierError
from outlier_mlx.writing.folders import kept_folder
from tests.hub import Hub, Request

DIMS: dict[str, Any] = {"layers": 2, "intermediate": 64}
OVERLAY_DIMS: dict[str, Any] = DIMS | {"moe_layers": (1,), "experts": 2}
OVERLAY_FILE = "model.safetensors"
BASE_FILES = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
#: In which they are first needed: experts follow their layer's base.
ORDER = [*BASE_FILES, OVERLAY_FILE]


@dataclass(frozen=True)
class Models:
    """Two commits of an overlay and of its base, and the tiers that they make from folders."""

    root: Path

    def overlay(self, n: int) -> Path:
        return self.root / f"overlay-{n}"

    def base(self, n: int) -> Path:
        return self.root / f"base-{n}"

    def tier(self, n: int) -> Path:
        return self.root / f"tier-{n}"


def stream(out: Path, **options: Any) -> Path:
    return outlier_mlx.convert("owner/overlay", "owner/base", out, stream=True, **options)


def fetched(hub: Hub) -> list[str]:
    """The files of tensors that were fetched as a whole, in order."""
    return [r.path.rsplit("/", 1)[1] for r in hub.requests if is_transfer(r) and r.part is None]


def is_transfer(request: Request) -> bool:
    return request.method == "GET" and request.path.startswith("/lfs/") and request.sent > 100


def unfinished(tmp_path: Path, stop_at: Callable[[str], None], name: str) -> Path:
    """A conversion to `tmp_path/tier` that ended when the hub went away; what it keeps."""
    stop_at(name)
    with pytest.raises(OutlierError), pytest.warns(CheckpointWarning, match="unfinished: the same"):
        stream(tmp_path / "tier")
    assert not (tmp_path / "tier").exists()
    return kept_folder(tmp_path / "tier")
