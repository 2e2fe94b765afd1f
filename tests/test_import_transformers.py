"""What was exported for transformers becomes the same tier again, to the bit."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx.imports import import_model
from outlier_mlx.imports.codes import pack_codes
from outlier_mlx.tiers.verify import verify_tier
from tests import builders, damage
from tests.engine import tier_of
from tests.folders import copy_writable
from tests.library import Library
from tests.program import assert_refused, run
from tests.tensor_file import read_arrays
from tests.test_export_transformers import SHAPES, WEIGHTS, exported, shape_tier, wide_tier

# Everything that is stored in a way of its own.
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "affine2": ({"expert_intermediate": 96, "alpha": "json"}, {"experts": "affine2", "tier": "q4"}),
    "float16": ({"base_dtype": "F16"}, {"tier": "f16"}),
    "bfloat16": ({"scale_form": "per_row", "scale_dtype": "F32"}, {"tier": "bf16"}),
    "int8": ({"hidden": 128, "tied": True}, {"tier": "q8", "group_size": 32}),
    "float32 scales": ({"hidden": 128}, {"tier": "q4", "dtype": "float32"}),
    "qwen3, int4": ({"family": "qwen3", "head_dim": 32}, {"tier": "q4"}),
}


def assert_same_tier(found: Path, tier: Path) -> None:
    """Every file that changes results is the same, byte for byte, and so is the manifest."""
    listed = json.loads((tier / "tier.json").read_text())["files"]
    assert WEIGHTS in listed and "config.json" in listed
    for name in (*listed, "tier.json"):
        assert (found / name).read_bytes() == (tier / name).read_bytes(), name
    verify_tier(found)


@pytest.mark.parametrize("recipe", ["q4", "q4-mixed"])
def test_the_embedded_tier_comes_back(recipe: str, library: Library, tmp_path: Path):
    tier = library.demo_tier(recipe)
    export = exported(tier, tmp_path / "hf")
    done = run("import", export, "--out", tmp_path / "again")
    assert "a tier for transformers" in done.err
    assert_same_tier(tmp_path / "again", tier)
    assert (tmp_path / "again/README.md").exists()


@pytest.mark.parametrize(
    "name", [*(name for name in SHAPES if SHAPES[name][1].get("moe_layers") != ()), *OTHERS]
)
def test_every_class_and_dtype_comes_back(name: str, tmp_path: Path):
    if name in SHAPES:
        tier = shape_tier(name, tmp_path)
    else:
        dims, recipe = OTHERS[name]
        built = builders.write_overlay(tmp_path / "o", tokenizer=False, **dims)
        tier = tier_of(built.path, None, tmp_path / "t", **recipe)
    run("import", exported(tier, tmp_path / "e"), "--out", tmp_path / "again", "--quiet")
    assert_same_tier(tmp_path / "again", tier)


def test_what_is_multiplied_by_zero_comes_back(tmp_path: Path):
    """Trits of an expert whose alpha is 0, and of rows whose scale is 0."""
    built = builders.write_overlay(tmp_path / "o", scale_form="per_row", tokenizer=False)
    alphas = np.array([0, 0.5, -1, 1], np.float32)
    damage.replace_tensor(built.path, "model.layers.1.mlp.alpha_values", alphas)
    scale = built.scales[3, 2, "up"].astype(np.float16).reshape(-1, 1).copy()
    scale[7] = 0
    damage.replace_tensor(built.path, "model.layers.3.mlp.experts.2.up_scale", scale)
    tier = tier_of(built.path, None, tmp_path / "t")
    export = exported(tier, tmp_path / "e")
    kept = read_arrays(export / "outlier" / WEIGHTS)
    assert {name for name in kept if name.endswith(".weight")} == {
        "model.layers.1.mlp.switch_mlp.down_proj.weight",
        "model.layers.3.mlp.switch_mlp.up_proj.weight",
    }
    run("import", export, "--out", tmp_path / "again", "--quiet")
    assert_same_tier(tmp_path / "again", tier)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs_them(bits: int):
    import mlx.core as mx

    weights = mx.random.normal((3, 64), key=mx.random.key(bits))
    packed, scales, biases = mx.quantize(weights, 64, bits)
    dense = np.array(mx.dequantize(packed, scales, biases, 64, bits), np.float64)
    codes = np.rint((dense - np.array(biases)) / np.array(scales)).astype(np.uint8)
    np.testing.assert_array_equal(pack_codes(codes, bits), np.array(packed))


# What is refused


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
SHARED = "model.layers.1.mlp.shared_expert_gate.weight"


def _changed(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = read_arrays(folder / WEIGHTS)[name].copy()
        value[0, 3] += 0.01
        damage.replace_tensor(folder, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_changed(EXPERT), (EXPERT, "not ternary", "unchanged exports")),
        (_changed(QUERY), (QUERY, "not codes of 4 bits")),
        (_changed(SHARED), (SHARED, "expected zeros")),
        (lambda folder: damage.drop_tensor(folder, EXPERT), (EXPERT, "missing")),
        (lambda folder: damage.edit_config(folder, rope_theta=1.0), ("config.json", "unchanged")),
        (
            lambda folder: damage.drop_tensor(folder / "outlier", "model.layers.1.mlp.alpha"),
            ("outlier", "alpha", "missing"),
        ),
    ],
)
def test_what_was_changed(
    change: Callable[[Path], None], said: tuple[str, ...], export: Path, tmp_path: Path
):
    folder = copy_writable(export, tmp_path / "e")
    change(folder)
    assert_refused(run("import", folder, "--out", tmp_path / "again", code=1), *said)
    assert not (tmp_path / "again").exists()


@pytest.fixture(scope="module")
def export(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded tier in int4, for transformers."""
    return exported(library.demo_tier("q4"), tmp_path_factory.mktemp("export") / "hf")


def test_a_base_that_differs_in_one_expert(tmp_path: Path):
    """In `qwen3_moe` every expert has the base's FFN."""
    tier = shape_tier("qwen3", tmp_path)
    folder = exported(tier, tmp_path / "e")
    _changed(EXPERT)(folder)
    assert_refused(run("import", folder, "--out", tmp_path / "again", code=1), EXPERT, "differs")


def test_an_export_that_rounds(library: Library, tmp_path: Path):
    rounded = exported(library.demo_tier("q4"), tmp_path / "hf", dtype="bfloat16")
    assert_refused(run("import", rounded, "--out", tmp_path / "again", code=1), "float32", "rounds")


def test_options_of_other_forms(export: Path, tmp_path: Path):
    done = run("import", export, "--out", tmp_path / "again", "--dtype", "float16", code=1)
    assert_refused(done, "no --dtype")


@pytest.mark.slow
def test_memory_is_a_few_slabs(tmp_path: Path):
    folder = exported(wide_tier(tmp_path), tmp_path / "e")
    tracemalloc.start()
    import_model(folder, tmp_path / "again")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120_000_000, peak
