"""Runs that are killed, and runs at the same time: nothing is lost and nothing stays behind."""

import hashlib
import random
import sys
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import outlier_mlx
from outlier_mlx.errors import OutputExistsError
from outlier_mlx.tiers.verify import verify_tier
from outlier_mlx.writing.folders import whole_folder
from tests.builders import write_overlay
from tests.folders import names


def test_two_runs_into_one_place(tmp_path: Path) -> None:
    target = tmp_path / "tier"
    with whole_folder(target) as folder:
        (folder / "tier.json").write_text("first")
        with (
            pytest.raises(OutputExistsError, match="another run is writing it"),
            whole_folder(target),
        ):
            pass
    assert (target / "tier.json").read_text() == "first"
    assert names(tmp_path) == ["tier"]


def test_a_neighbour_with_a_like_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".tier.partly").mkdir()
    (tmp_path / ".tier2.part-x").mkdir()
    (tmp_path / ".tier.part-2.part-0a1b2c3d").mkdir()
    with whole_folder(tmp_path / "tier") as folder:
        (folder / "tier.json").write_text("")
    others = [".tier.part-2.part-0a1b2c3d", ".tier.partly", ".tier2.part-x"]
    assert names(tmp_path) == [*others, "tier"]


@pytest.mark.slow
def test_fifty_kills_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL leaves nothing, a whole tier, or a temporary folder that the next run clears."""
    chance = random.Random(0)
    sizes: dict[str, Any] = {
        "hidden": 256,
        "intermediate": 768,
        "expert_intermediate": 768,
        "layers": 8,
    }
    overlay = write_overlay(tmp_path / "overlay", moe_layers=tuple(range(8)), **sizes)
    before = _digest(overlay.path)
    out = tmp_path / "out"
    out.mkdir()
    # Its processes have imported what they need, so that moments are those of the writing. (On
    # macOS, a fork could not use the GPU.)
    context = get_context("forkserver")
    if sys.platform != "darwin":
        context.set_forkserver_preload(["outlier_mlx.tiers.convert"])

    def start() -> BaseProcess:
        how = {"out": out / "tier", "force": True}
        process = context.Process(target=outlier_mlx.convert, args=(overlay.path,), kwargs=how)
        process.start()
        return process

    start().join()
    began = time.monotonic()
    start().join()
    length = time.monotonic() - began
    halves = 0
    for _ in range(50):
        process = start()
        time.sleep(chance.uniform(0.0, 1.0) * length)
        process.kill()
        process.join()
        left = names(out)
        assert all(name == "tier" or name.startswith(".tier.part-") for name in left), left
        halves += any(name != "tier" for name in left)
        if "tier" in left:
            verify_tier(out / "tier")
    assert halves, "no kill came while the tier was written"
    start().join()
    assert names(out) == ["tier"]
    verify_tier(out / "tier")
    assert _digest(overlay.path) == before


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    return total.hexdigest()


def test_a_conversion_at_the_same_time_is_refused_at_once(tmp_path: Path) -> None:
    overlay = write_overlay(tmp_path / "overlay")
    with whole_folder(tmp_path / "tier") as folder:
        with pytest.raises(OutputExistsError, match="another run"):
            outlier_mlx.convert(overlay.path, out=tmp_path / "tier")
        (folder / "tier.json").write_text("")
