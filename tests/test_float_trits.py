"""Trits stored as floats or wide integers, and ternary weights stored without a scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx import open_overlay
from outlier_mlx.errors import CheckpointError
from tests import damage
from tests.builders import Built, write_overlay
from tests.form_builders import SHARD
from tests.forms import assert_same_contents, contents, written
from tests.tensor_file import read_stored, stored, write_stored

GATE = "model.layers.1.mlp.experts.2.gate"


def retype(built: Built, dtype: str) -> None:
    """Store all trits in another dtype."""
    tensors = read_stored(built.path / SHARD)
    write_stored(
        built.path / SHARD,
        {
            key: stored(tensor.array(), dtype) if key.endswith("_ternary") else tensor
            for key, tensor in tensors.items()
        },
    )


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "I16", "I32", "I64"])
def test_trits_in_other_dtypes(dtype: str, tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False)
    retype(built, dtype)
    assert_same_contents(contents(open_overlay(built.path)), written(built))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("F32", 0.5), ("F32", np.nan), ("F32", np.inf), ("BF16", 1.0078125), ("F64", 1 + 1e-12)]
    + [("I16", 2), ("I32", 257), ("I16", -32768), ("I64", 2**32 + 1)],
)
def test_no_trits_in_other_dtypes(dtype: str, value: Any, tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False)
    retype(built, dtype)
    wrong = built.trits[1, 2, "gate"].astype(np.float64)
    wrong[5, 7] = value
    damage.replace_tensor(built.path, f"{GATE}_ternary", wrong, dtype)
    trits = open_overlay(built.path).experts[1][2].gate.trits
    trits.read(0, 5)
    with pytest.raises(CheckpointError, match=rf"{SHARD}: {GATE}_ternary: .* row 5, column 7"):
        trits.read()


def unscale(built: Built, dtype: str = "BF16", magnitude: Any = None) -> np.ndarray:
    """Store one matrix as plain weights: trits times a magnitude a row; returns the magnitudes."""
    out = len(built.trits[1, 2, "gate"])
    sizes = np.full((out, 1), 0.03125) if magnitude is None else magnitude
    weights = built.trits[1, 2, "gate"] * sizes
    damage.drop_tensor(built.path, f"{GATE}_scale")
    damage.replace_tensor(built.path, f"{GATE}_ternary", weights, dtype)
    damage.rename_tensor(built.path, f"{GATE}_ternary", f"{GATE}_proj.weight")
    return np.broadcast_to(stored(sizes, dtype).array(), (out, 1)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rows", [False, True])
def test_weights_without_a_scale(dtype: str, rows: bool, tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False)
    built.trits[1, 2, "gate"][3] = 0
    out = len(built.trits[1, 2, "gate"])
    sizes = np.random.default_rng(0).uniform(0.01, 0.5, (out, 1)) if rows else None
    scales = unscale(built, dtype, sizes)
    scales = np.where(np.arange(out)[:, None] == 3, 0, scales)  # a row of zeros has none
    expected = written(built) | {"scales 1 2 gate": scales[:, 0].astype(np.float32)}
    assert_same_contents(contents(open_overlay(built.path)), expected)


def test_weights_that_are_not_ternary(tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False)
    weights = built.trits[1, 2, "gate"] * 0.25
    weights[4, 6] = 0.2500001
    unscale(built)
    damage.replace_tensor(built.path, f"{GATE}_proj.weight", weights, "F32")
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight: .* row 4 .*magnitude"):
        open_overlay(built.path).experts[1][2].gate.trits.read()


def test_infinite_weights_without_a_scale(tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False)
    unscale(built, "F32")
    weights = np.zeros_like(built.trits[1, 2, "gate"], np.float32)
    weights[2, 2] = np.inf
    damage.replace_tensor(built.path, f"{GATE}_proj.weight", weights, "F32")
    with pytest.raises(CheckpointError, match="scale inf"):
        open_overlay(built.path).experts[1][2].gate.row_scales()


def test_only_spelt_as_weights_they_need_no_scale(tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False)
    retype(built, "F32")
    damage.drop_tensor(built.path, f"{GATE}_scale")
    with pytest.raises(CheckpointError, match="expert 2: its gate scale is missing"):
        open_overlay(built.path)


@pytest.mark.parametrize("dtype", ["U8", "BOOL"])
def test_trits_need_a_sign(dtype: str, tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False)
    damage.replace_tensor(built.path, f"{GATE}_ternary", np.abs(built.trits[1, 2, "gate"]), dtype)
    with pytest.raises(CheckpointError, match=f"{dtype}, trits are I8"):
        open_overlay(built.path)
