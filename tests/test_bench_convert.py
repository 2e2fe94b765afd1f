"""The benchmark of conversions: its overlays are sound in every form, and it leaves nothing."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from outlier_mlx.checkpoints import open_overlay
from outlier_mlx.tiers.convert import convert_tier
from tests.program import ROOT, run_command

SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_overlays  # noqa: E402

MODEL = bench_overlays.Model(bench_overlays.SHAPES["tiny"], layers=2, vocab=512)
NAMES = {"float": "v3.2"}


@pytest.mark.parametrize("form", list(bench_overlays.FORMS))
def test_overlays(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "overlay"
    bench_overlays.write_overlay(folder, form, MODEL)
    overlay = open_overlay(folder)
    assert overlay.form == NAMES.get(form, form)
    trits = overlay.experts[1][7].down.trits.read()
    assert trits.shape == (256, 512)
    # Random, so each about as often; packed forms may end in a zero that fills up a byte.
    assert np.abs(np.bincount(trits.ravel() + 1) / trits.size - 1 / 3).max() < 0.02
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size == pytest.approx(bench_overlays.source_bytes(form, MODEL), rel=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = convert_tier(folder, None, tmp_path / "tier")
    experts = next(row for row in report.rows if row.kind == "experts")
    assert experts.params == 2 * 8 * 3 * 256 * 512


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    """Two numbers of layers: the source grows by a layer's, and nothing stays behind."""
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, SCRIPTS / "bench_convert.py", "--shape", "tiny", "--form", "packed"]
    command += ["--layers", "1", "2", "--repeat", "1", "--vocab", "512"]
    options = ["--work", work, "--json", tmp_path / "found.json"]
    done = run_command(*command, *options, env=os.environ | {"PYTHONPATH": str(ROOT)})
    one, two = json.loads((tmp_path / "found.json").read_text())
    assert (one["layers"], two["layers"]) == (1, 2)
    assert two["trits"] == 2 * one["trits"] == 2 * 8 * 3 * 256 * 512
    assert two["written"] > one["written"]
    assert done.out.count("packed ") == 2
    assert list(work.iterdir()) == []
