"""Tiers with a quantized base: the numbers stored are MLX's own, and the model computes with the
weights that they stand for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx.tiers.convert import Report, convert_tier
from outlier_mlx.tiers.presets import Recipe
from outlier_mlx.writing import float_parts
from tests import builders
from tests.affine import affine_dequantize, affine_quantize
from tests.engine import assert_decisive, assert_same_run, greedy_cached, load, tier_name, trace
from tests.reference import Array, ReferenceModel, greedy
from tests.reference import trace as reference_trace
from tests.reference_reader import read_overlay
from tests.tensor_file import Stored, read_stored, rounded

MLX_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Widths of the matrices' inputs are hidden and intermediate.
CASES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "4-bits-of-32": (4, 32, "F32", {}),
    "4-bits-of-64": (4, 64, "F32", {"form": "real", "scale_form": "per_row"}),
    "4-bits-of-128-and-64": (4, 128, "F32", {"tied": True}),
    "4-bits-of-32-for-64": (4, 64, "F32", {"hidden": 96, "intermediate": 160, "seed": 1}),
    "8-bits": (8, 64, "F32", {"hidden": 128, "intermediate": 192, "shards": 2}),
    "one-width-unquantized": (4, 64, "F32", {"intermediate": 72, "form": "real"}),
    "nothing-to-quantize": (4, 64, "F32", {"hidden": 36, "intermediate": 40, "heads": 2}),
    "bfloat16": (4, 64, "BF16", {"base_dtype": "F32", "tied": True, "seed": 2}),
    "float16": (8, 32, "F16", {"base_dtype": "BF16", "hidden": 96}),
}


def group_for(width: int, wanted: int) -> int | None:
    """The wanted group size, or the next smaller one of MLX's that divides the width."""
    return next((g for g in (128, 64, 32) if g <= wanted and width % g == 0), None)


def rough(model: ReferenceModel, bits: int, wanted: int, dtype: str) -> ReferenceModel:
    """The model with base weights as a tier stores them: rounded to `dtype`, and matrices
    dequantize(quantize(w)), which float32 activations see in float32."""

    def convert(w: Array) -> Array:
        w = rounded(w, dtype)
        group = group_for(w.shape[-1], wanted) if w.ndim == 2 else None
        return w if group is None else affine_dequantize(*affine_quantize(w, group, bits, dtype))

    return replace(
        model,
        embedding=convert(model.embedding),
        norm=convert(model.norm),
        lm_head=None if model.lm_head is None else convert(model.lm_head),
        layers=[
            replace(layer, weights={key: convert(w) for key, w in layer.weights.items()})
            for layer in model.layers
        ],
    )


def convert(built: builders.Built, out: Path, bits: int, group: int, dtype: str) -> Report:
    recipe = Recipe(base_bits=bits, group_size=group, dtype=NAMES[dtype])
    return convert_tier(built.path, None, out, recipe=recipe)


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_tier_computes_with_dequantized_weights(name: str, tmp_path: Path):
    bits, group, dtype, options = CASES[name]
    built = builders.write_overlay(tmp_path / "overlay", **options)
    report = convert(built, tmp_path / "tier", bits, group, dtype)
    model = load(report.path, "float32")
    reference = rough(read_overlay(built.path), bits, group, dtype)
    prompt = built.prompt(35)
    expected = reference_trace(reference, prompt)
    assert_decisive(expected, reference.top_k)
    assert_same_run(trace(model, prompt), expected)
    assert (
        greedy_cached(model, prompt[:9], 6, chunks=(5,))[0] == greedy(reference, prompt[:9], 6)[0]
    )
    exact = reference_trace(read_overlay(built.path), prompt).logits
    moved = np.abs(exact - expected.logits).max()
    assert moved > 0.01 or name == "nothing-to-quantize"  # or there was nothing to be wrong about


@pytest.mark.parametrize("name", CASES)
def test_stored_numbers_are_mlx_own_bit_for_bit(name: str, tmp_path: Path):
    bits, wanted, dtype, options = CASES[name]
    built = builders.write_overlay(tmp_path / "overlay", **options)
    report = convert(built, tmp_path / "tier", bits, wanted, dtype)
    found = read_stored(report.path / "model-00001-of-00001.safetensors")
    config = json.loads((report.path / "config.json").read_text())
    quantization = config.get("quantization", {})
    unquantized, by_path = [], {}
    for key, value in built.base.items():
        target = tier_name(key, built.dims)
        path, _, leaf = target.rpartition(".")
        w = mx.array(value).astype(MLX_DTYPES[dtype])
        group = group_for(value.shape[-1], wanted) if value.ndim == 2 else None
        if group is None:
            assert found[target] == as_stored(w, dtype), target
            if value.ndim == 2:
                assert f"{path}.scales" not in found
                unquantized.append(path)
            continue
        assert leaf == "weight"
        with mx.stream(mx.cpu):
            packed, scales, biases = mx.quantize(w, group, bits)
        assert found[f"{path}.weight"] == as_stored(packed, "U32"), path
        assert found[f"{path}.scales"] == as_stored(scales, dtype), path
        assert found[f"{path}.biases"] == as_stored(biases, dtype), path
        by_path[path] = group
    assert sorted(report.unquantized) == sorted(unquantized)
    # config.json states a default, and by path what differs from it.
    stated = {k: v for k, v in quantization.items() if isinstance(v, dict)}
    assert set(stated) == {path for path, group in by_path.items() if group != wanted}
    for path, how in stated.items():
        assert how == {"group_size": by_path[path], "bits": bits, "mode": "affine"}
    default = {k: v for k, v in quantization.items() if k not in stated}
    assert default == ({"group_size": wanted, "bits": bits, "mode": "affine"} if by_path else {})


def as_stored(x: mx.array, dtype: str) -> Stored:
    bits = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
    return Stored(dtype, tuple(x.shape), np.array(bits).tobytes())


def test_slabs_and_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Parts are read, quantized and packed in slabs of rows: of any size the tier is the same."""
    dims: dict[str, Any] = {"layers": 2, "moe_layers": (1,), "hidden": 96, "experts": 2}
    built = builders.write_overlay(tmp_path / "overlay", scale_form="per_row", **dims)
    whole = convert(built, tmp_path / "whole", 4, 32, "BF16")
    for size in (1, 3000):
        monkeypatch.setattr(float_parts, "SLAB_BYTES", size)
        tier = convert(built, tmp_path / f"slabs-{size}", 4, 32, "BF16")
        name = "model-00001-of-00001.safetensors"
        assert (tier.path / name).read_bytes() == (whole.path / name).read_bytes()
