"""In which dtype a model that was a ternary GGUF file computes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx import load
from outlier_mlx.imports import import_model
from outlier_mlx.storage.shards import read_shards
from tests.ternary_sources import dense_gguf


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the dtypes that are stored: on the CPU, models are converted to float32."""
    monkeypatch.setattr("outlier_mlx.runtime.ternary_model.activation_dtype", lambda given: None)


@pytest.mark.parametrize("one_scale", [False, True])
def test_norms_that_fit_are_float16(one_scale: bool, tmp_path: Path):
    """Files have norms as float32; in 16 bits, if that is exact, activations have 16 bits, too."""
    made = dense_gguf("TQ2_0", one_scale=one_scale)
    done = import_model(made.write(tmp_path / "model.gguf"), tmp_path / "rows")
    tensors = read_shards(done.path)
    _, shape, data = made.tensors["output_norm.weight"]
    assert tensors["model.norm.weight"].dtype == "F16"
    norm = tensors["model.norm.weight"].read().astype(np.float32)
    assert np.array_equal(norm, np.frombuffer(data, np.float32).reshape(shape))
    assert not any("model computes in float32" in note for note in done.notes)
    model, _ = load(done.path)
    assert model(mx.array([[1, 2, 3]])).dtype == mx.float16


def test_norms_that_do_not_fit_stay_float32(tmp_path: Path):
    made = dense_gguf("PQ2_0")
    _, shape, data = made.tensors["output_norm.weight"]
    norm = np.frombuffer(data, np.float32).copy()
    norm[3] = np.float32(1.0001)
    made.add("output_norm.weight", norm.reshape(shape))
    done = import_model(made.write(tmp_path / "model.gguf"), tmp_path / "rows")
    assert read_shards(done.path)["model.norm.weight"].read()[3] == np.float32(1.0001)
    assert sum("model computes in float32" in note for note in done.notes) == 1
    model, _ = load(done.path)
    assert model(mx.array([[1, 2, 3]])).dtype == mx.float32
    made.write(tmp_path / "model.gguf")
    done = import_model(tmp_path / "model.gguf", tmp_path / "halves", dtype="float16")
    assert read_shards(done.path)["model.norm.weight"].dtype == "F16"
