"""A head that is stored is the head, though config.json ties it to the embedding: everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import CheckpointWarning
from outlier_mlx.imports import import_model
from outlier_mlx.merge.run import merge
from outlier_mlx.models.head import NOTE
from tests.builders import write_overlay
from tests.damage import edit_config
from tests.merging import write_dense, write_merge_config, write_models

TOKENS = mx.array([[5, 17, 200, 3, 44, 91, 7, 7, 120, 260, 33, 2]])


def logits(folder: Path) -> np.ndarray:
    return np.array(load_model(folder, dtype="float32")[0](TOKENS))


def add_head(folder: Path, *, equal: bool) -> np.ndarray:
    """Store a head in a folder whose config ties it; the logits that are then right."""
    path = str(folder / "model.safetensors")
    weights: Any = mx.load(path)
    head = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = head if equal else mx.random.normal(head.shape, scale=0.2)
    mx.save_safetensors(path, weights, {"format": "pt"})
    edit_config(folder, tie_word_embeddings=False)
    expected = logits(folder)
    edit_config(folder, tie_word_embeddings=True)
    return expected


def stored(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in folder.glob("*.safetensors"):
        found |= mx.load(str(path))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_import(kind: str, tmp_path: Path) -> None:
    source = write_dense(tmp_path / "source", kind, tied=True)
    expected = add_head(source, equal=False)
    done = import_model(source, tmp_path / "out")
    np.testing.assert_allclose(logits(done.path), expected, atol=1e-5)
    assert done.notes == [NOTE]
    assert json.loads((done.path / "config.json").read_text())["tie_word_embeddings"] is False


def test_import_of_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    source = write_dense(tmp_path / "source", tied=True)
    expected = add_head(source, equal=True)
    done = import_model(source, tmp_path / "out")
    np.testing.assert_allclose(logits(done.path), expected, atol=1e-5)
    assert done.notes == [] and "lm_head.weight" not in stored(done.path)


@pytest.mark.parametrize("equal", [False, True])
def test_merge(equal: bool, tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", tied=True)
    add_head(models / "base", equal=equal)
    head = stored(models / "base")["lm_head.weight"]
    done = merge(write_merge_config(models), tmp_path / "out", measure=False)
    assert (f"base: {NOTE}" in done.mixture.notes) == (not equal)
    found = stored(done.path)
    assert ("lm_head.weight" in found) == (not equal)
    if not equal:
        np.testing.assert_array_equal(np.array(found["lm_head.weight"]), np.array(head))


def test_convert(tmp_path: Path) -> None:
    built = write_overlay(tmp_path / "overlay", tied=False)
    edit_config(built.path, tie_word_embeddings=True)
    with pytest.warns(CheckpointWarning, match=NOTE):
        tier = outlier_mlx.convert(built.path, out=tmp_path / "tier", tier="f32")
    found = stored(tier)["lm_head.weight"].astype(mx.float32)
    np.testing.assert_array_equal(np.array(found), built.base["lm_head.weight"])
    assert json.loads((tier / "config.json").read_text())["tie_word_embeddings"] is False
