"""Merges against the reference cases: routers, weights bit for bit, configs, logits, experts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model as stock_load_model

from outlier_mlx.engine.loading import load_model
from outlier_mlx.merge import Merged, merge
from outlier_mlx.merge.routes import RouterRun, run_routers
from outlier_mlx.merge.texts import Sequences
from tests.goldens import assert_logits_close, assert_same_experts, require_shared
from tests.tensor_file import read_arrays

GATES_ATOL = 2e-5
CASES = {
    "merge_mistral": (
        *("hidden_2x", "hidden_neg_3x", "cheap_embed_neg_2x", "hidden_avg_2x"),
        *("zero_positive_bos", "zero_positive_zero"),
    ),
    "merge_qwen2_shared": ("hidden_2x_shared", "hidden_4x_shared"),
}
ALL = [(case, name) for case, names in CASES.items() for name in names]


class Case:
    """A reference case, and what our merge of it is."""

    def __init__(self, folder: Path, name: str, out: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.known: dict[str, Any] = meta["variants"][name]
        self.file = folder / f"{name}.yml"
        self.expected = read_arrays(folder / f"{name}.expected.safetensors")
        self.config = json.loads((folder / f"{name}.expected_config.json").read_text())
        self.merged: Merged = merge(
            self.file, out, no_positive=self.known["no_positive"], measure=False
        )
        self.tensors = read_arrays(out / "model-00001-of-00001.safetensors")

    def logits(self, model: Any) -> np.ndarray:
        """Of the case's tokens."""
        return np.array(model(mx.array(self.expected["input_ids"])))


@pytest.fixture(scope="module", params=ALL, ids=[name for _, name in ALL])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, name = request.param
    folder = require_shared() / "goldens" / "frankenmoe" / family
    return Case(folder, name, tmp_path_factory.mktemp("merge") / name)


def test_every_configuration_is_here() -> None:
    folder = require_shared() / "goldens" / "frankenmoe"
    found = {(path.parent.name, path.stem) for path in folder.glob("merge_*/*.yml")}
    assert found == set(ALL)


def test_routers(case: Case) -> None:
    gates = case.merged.routers.gates
    np.testing.assert_allclose(gates.routed, case.expected["gates"], atol=GATES_ATOL)
    rows = gates.routed
    if gates.shared is not None:
        shared = case.expected["shared_gates"][:, 0]
        np.testing.assert_allclose(gates.shared, shared, atol=GATES_ATOL)
        # The case's condition numbers are of all rows together.
        rows = np.concatenate([rows, gates.shared[:, None]], axis=1)
    for layer, known in zip(rows, case.known["gate_condition_numbers"], strict=True):
        found = np.linalg.cond(layer.astype(np.float64))
        assert found > 1e6 if known > 1e6 else found == pytest.approx(known, rel=1e-5)


def test_weights_are_bit_exact(case: Case) -> None:
    hashes = case.known["merged_tensor_sha256_of_fp32_bytes"]
    assert len(hashes) > 30
    routers = {name for name in case.tensors if name.endswith((".gate.weight", "_gate.weight"))}
    assert case.tensors.keys() - routers == hashes.keys()
    for name, expected in hashes.items():
        assert case.tensors[name].dtype == np.float32
        assert hashlib.sha256(case.tensors[name].tobytes()).hexdigest() == expected, name


def test_config_says_the_same(case: Case) -> None:
    written = json.loads((case.merged.path / "config.json").read_text())
    expected = case.config | {"dtype": "float32"}
    del expected["transformers_version"]  # of the base's files, not of these
    assert written == expected


def test_logits(case: Case) -> None:
    model, _ = load_model(case.merged.path)
    assert_logits_close(case.logits(model), case.expected["logits"])
    stock, _ = stock_load_model(case.merged.path)
    everybody_serves = len(case.merged.mixture.experts) == case.merged.mixture.top_k
    if case.config["model_type"] == "mixtral" or everybody_serves:
        assert_logits_close(case.logits(stock), case.expected["logits"])
    else:
        # Why a loading path of our own is there; once this fails, it can go.
        assert np.abs(case.logits(stock) - case.expected["logits"]).max() > 0.05


def test_layers_one_by_one_route_as_the_whole_model(case: Case) -> None:
    mixture, gates = case.merged.mixture, case.merged.routers.gates
    ids = case.expected["input_ids"]
    sequences = Sequences(tuple(map(tuple, ids.tolist())), (0,) * len(ids))
    run = RouterRun("hidden", gates.routed, gates.shared, sequences)
    run_routers(mixture, [run])
    for layer, weights in enumerate(run.weights):
        chosen = case.expected[f"experts.{layer}"].reshape(len(weights), -1)
        served = np.sort(np.nonzero(weights)[1].reshape(chosen.shape))
        assert_same_experts(served, chosen)
        logits = case.expected[f"router_logits.{layer}"].reshape(weights.shape)
        expected = np.where(weights > 0, np.exp(logits - logits.max(axis=1, keepdims=True)), 0)
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights, expected, atol=1e-5)
