"""Every form of overlay: what is found in it, what it computes, and what is told of it."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx import open_overlay
from outlier_mlx.checkpoints.base import join
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from tests import damage
from tests.builders import Built, write_base, write_overlay
from tests.engine import engine, greedy_cached, tier_of, trace
from tests.folders import copy_writable
from tests.form_builders import experts_of, write_toy_dense
from tests.forms import FORMS, assert_same_contents, build, contents, written
from tests.goldens import Golden, assert_logits_close, assert_same_experts, golden
from tests.tensor_file import read_arrays, read_stored, write_stored


def expected_contents(built: Built, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the builder wrote; the base only where the files have it, biases likewise."""
    return {key: v for key, v in written(built).items() if key in found or key not in built.base}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_what_was_written(name: str, tmp_path: Path):
    built = build(tmp_path / "o", name)
    overlay = open_overlay(built.path)
    assert overlay.form == FORMS[name][2]
    found = contents(overlay)
    has_base = FORMS[name][1].get("with_base", True)
    assert bool(overlay.base) == has_base
    assert_same_contents(found, expected_contents(built, found))
    if has_base:
        join(overlay, None)
    if name.startswith("toy"):
        assert (overlay.config.rms_norm_eps, overlay.config.rope_theta) == (1e-5, 10_000)
        assert overlay.config.max_positions == 256


def test_toy_dense(tmp_path: Path):
    built = write_toy_dense(tmp_path / "o")
    overlay = open_overlay(built.path)
    assert overlay.form == "toy dense" and not overlay.experts and not overlay.routers
    assert_same_contents({n: t.read_float32() for n, t in overlay.base.items()}, built.base)
    ffn = overlay.base["model.layers.1.mlp.down_proj.weight"]
    whole = built.base["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(ffn.read_float32(7, 9), whole[7:9])
    assert len(np.unique(whole)) == 3


@pytest.mark.parametrize("name", FORMS)
def test_opening_reads_headers_only(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = build(tmp_path / "o", name)

    def refuse(*_: Any) -> int:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(os, "preadv", refuse)
    overlay = open_overlay(built.path)
    with pytest.raises(AssertionError, match="data was read"):
        overlay.experts[built.dims.routed_layers[0]][0].gate.trits.read()


@pytest.mark.parametrize("name", ["packed", "monolith", "toy", "gguf", "gguf-tq2_0", "per-file"])
def test_rows_are_read_as_asked_for(name: str, tmp_path: Path):
    built = build(tmp_path / "o", name)
    layer, expert = experts_of(built)[-1]
    for part in ("gate", "up", "down"):
        matrix = getattr(open_overlay(built.path).experts[layer][expert], part)
        trits = built.trits[layer, expert, part]
        for start, stop in [(0, None), (0, 1), (3, 8), (len(trits) - 1, len(trits))]:
            np.testing.assert_array_equal(matrix.trits.read(start, stop), trits[start:stop])
        half = len(trits) // 2
        scales = np.broadcast_to(built.scales[layer, expert, part].reshape(-1, 1), (len(trits), 1))
        if matrix.scale.shape == (len(trits), 1):
            np.testing.assert_array_equal(matrix.scale.read_float32(half, None), scales[half:])


# The reference cases

CASES = ["v0_toy_moe", "v0_toy_gqa_bias", "v0_toy_dense", "export_per_file", "v33_overlay_yarn"]
CASES += ["packed_experts_dir", "packed_monolith"]


def repacked(case: Golden, folder: Path) -> Path:
    """A per-file golden as the published repack tool leaves it."""
    assert case.base is not None
    overlay = copy_writable(case.overlay, folder)
    for path in case.base.glob("*.safetensors*"):
        (overlay / path.name).write_bytes(path.read_bytes())
    files = sorted((overlay / "experts").iterdir())
    for i, path in enumerate(files):
        layer, expert = (int(word) for word in path.stem.split("_")[1::2])
        prefix = f"base.model.layers.{layer}.mlp.experts.{expert}."
        tensors = {prefix + key: tensor for key, tensor in read_stored(path).items()}
        write_stored(overlay / f"expert-{i + 1:05d}-of-{len(files):05d}.safetensors", tensors)
        path.unlink()
    (overlay / "experts").rmdir()
    damage.edit_config(
        overlay, base_model_name_or_path=damage.REMOVE, model_type="outlier_moe", n_kv_heads=2
    )
    return overlay


def check_golden(case: Golden, tier: Any, expected: dict[str, np.ndarray]) -> None:
    """Logits, experts and greedy tokens."""
    tokens = expected["input_ids"][0].tolist()
    run = trace(tier, tokens)
    assert_logits_close(run.logits, expected["logits"])
    for layer in case.moe_layers:
        if f"router.{layer}.indices" in expected:
            found = run.routing[layer]
            assert_same_experts(found.indices, expected[f"router.{layer}.indices"])
            np.testing.assert_allclose(
                found.weights, expected[f"router.{layer}.weights"], atol=1e-5
            )
    if "greedy_tokens" in expected:
        continuation, logits = greedy_cached(tier, tokens, 16)
        assert continuation == expected["greedy_tokens"].tolist()
        assert_logits_close(logits, expected["greedy_logits"])


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, tmp_path: Path):
    case = golden(name)
    model = engine(case.overlay, case.base, tmp_path / "tier")
    assert model.args.moe_layers == case.moe_layers
    check_golden(case, model, case.expected)
    for layer, alphas in case.readme["effective_alpha"].items():
        found = model.layers[int(layer)].mlp.alpha
        np.testing.assert_array_equal(np.array(found), np.array(alphas, np.float32))


def test_golden_originals(tmp_path: Path):
    case = golden("v33_overlay_yarn")
    expected = read_arrays(case.overlay.parents[1] / "expected_originals.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        warnings.filterwarnings("ignore", ".*no tokenizer", CheckpointWarning)
        model = engine(case.overlay, case.base, tmp_path / "tier", alpha="original")
    check_golden(case, model, expected)
    assert model.args.rope_scaling is not None


def test_golden_repacked(tmp_path: Path):
    case = golden("export_per_file")
    overlay = repacked(case, tmp_path / "repacked")
    keys = {key for path in overlay.glob("*.safetensors") for key in read_stored(path)}
    assert {key.startswith("base.") for key in keys} == {True, False}
    check_golden(case, engine(overlay, None, tmp_path / "tier"), case.expected)


def test_a_dense_tier_is_an_ordinary_one(tmp_path: Path):
    case = golden("v0_toy_dense")
    tier = tier_of(case.overlay, None, tmp_path / "tier")
    config = json.loads((tier / "config.json").read_text())
    assert config["moe_layers"] == [] and config["num_experts"] == 0
    assert json.loads((tier / "tier.json").read_text())["overlay"]["form"] == "toy dense"
    dense = [name for path in tier.glob("*.safetensors") for name in mx.load(str(path))]
    assert not any("switch_mlp" in name or "shared_expert" in name for name in dense)


# What is told of forms


def test_when_nothing_fits_it_says_what_it_looked_for(tmp_path: Path):
    write_base(tmp_path / "b", tokenizer=False)
    with pytest.raises(CheckpointError) as error:
        open_overlay(tmp_path / "b")
    for sign in ("layers.N.ffn", "experts/layer_", "packed_experts/index.json", "mlp.experts"):
        assert sign in str(error.value)
    assert ".gguf" in str(error.value) and "\n" not in str(error.value)


def test_tensors_that_mean_nothing_are_told(tmp_path: Path):
    """Once, and not of RoPE's table, which old files hold."""
    built = write_overlay(tmp_path / "o", tokenizer=False)
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    damage.add_tensor(built.path, table, np.ones(8, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_overlay(built.path)
    for n in range(5):
        damage.add_tensor(built.path, f"model.layers.{n}.mlp.gate_proj.extra", np.ones(8))
    with pytest.warns(CheckpointWarning, match=r"layers\.0\.mlp\.gate_proj\.extra.* and 2 more"):
        overlay = open_overlay(built.path)
    assert len(overlay.unused) == 6


@pytest.mark.parametrize("name", ["per-file", "packed", "monolith", "toy", "gguf"])
def test_info_counts_all_weights(name: str, tmp_path: Path):
    built = build(tmp_path / "o", name)
    found = inspect(built.path)
    assert (found.kind, found.form) == ("overlay", FORMS[name][2])
    experts = next(row for row in found.rows if row.kind == "experts")
    assert experts.params == sum(trits.size for trits in built.trits.values())
    scales = 0 if name == "gguf" else sum(2 * scale.size for scale in built.scales.values())
    bits = {"packed": 1.6, "monolith": 1.6, "gguf": 1.6875}.get(name, 8)
    assert experts.nbytes == pytest.approx(experts.params * bits / 8 + scales, rel=1e-2)


def test_toy_experts_have_no_alphas(tmp_path: Path):
    built = build(tmp_path / "o", "toy")
    (built.path / "alpha.json").write_text('{"0": {"0": 7.0}}')
    with pytest.warns(CheckpointWarning, match=r"alpha\.json is ignored"):
        overlay = open_overlay(built.path)
    assert all((alphas == 1).all() for alphas in overlay.alphas().values())


def test_a_stored_head_is_the_head(tmp_path: Path):
    """Whatever the config says of tying: what is stored is not dropped."""
    built = write_overlay(tmp_path / "o", tokenizer=False, tied=True)
    assert join(open_overlay(built.path), None).config.tied
    head = np.ones((built.dims.vocab, built.dims.hidden), np.float32)
    damage.add_tensor(built.path, "lm_head.weight", head)
    whole = join(open_overlay(built.path), None)
    assert not whole.config.tied
    np.testing.assert_array_equal(whole.base["lm_head.weight"].read_float32(), head)
