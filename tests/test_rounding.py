"""Numbers that become infinite in a narrower dtype are refused, wherever they are narrowed."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import outlier_mlx
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.rounding import (
    all_finite,
    fits,
    is_rounded,
    narrowed,
    require_affine,
    widened,
)
from tests.builders import write_base, write_overlay
from tests.damage import replace_tensor
from tests.engine import load, tier_of
from tests.folders import snapshot
from tests.form_builders import torch_save
from tests.gguf_builder import build as build_gguf
from tests.merging import write_merge_config, write_models
from tests.program import assert_refused, run

DTYPES = ("float32", "float16", "bfloat16")
LARGEST = {"float32": 3.4028234663852886e38, "float16": 65504.0, "bfloat16": 3.3895313892515355e38}
DIMS: dict[str, Any] = {"layers": 2, "moe_layers": (1,), "experts": 2, "intermediate": 64}
DIMS |= {"expert_intermediate": 64}
MLP = "model.layers.1.mlp."
TOO_LARGE = "holds numbers too large for"


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_rounding_becomes_infinite(dtype: str) -> None:
    """Half a step above the largest number, where rounding to nearest goes up."""
    largest = LARGEST[dtype]
    bits = {"float32": 24, "float16": 11, "bfloat16": 8}[dtype]
    half = np.float64(largest) / (2**bits - 1) / 2
    bound = largest + half
    # On the way from float64 to bfloat16 is float32.
    below = np.nextafter(np.float32(bound) if dtype == "bfloat16" else bound, 0)
    np.testing.assert_array_equal(widened(narrowed(np.array([below]), dtype, "x"), dtype), largest)
    assert fits(below, dtype) and not fits(bound, dtype) and not fits(-bound, dtype)
    for value in (bound, -bound, 1.001 * bound):
        with pytest.raises(CheckpointError, match=f"^x: {TOO_LARGE} {dtype}, as "):
            narrowed(np.array([0.0, value]), dtype, "x")
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(CheckpointError, match=r"^x: holds NaN or infinity$"):
            narrowed(np.array([0.0, value, 1.0]), dtype, "x")
    assert narrowed(np.empty((0, 3)), dtype, "x").shape == (0, 3)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(values=st.lists(FLOATS, min_size=1, max_size=8))
def test_rounding_is_that_of_mlx(values: list[float]) -> None:
    array = np.array(values, np.float32)
    for dtype in ("float16", "bfloat16"):
        expected = mx.array(array).astype(getattr(mx, dtype))
        if not mx.isfinite(expected).all():
            with pytest.raises(CheckpointError, match=TOO_LARGE):
                narrowed(array, dtype, "x")
            continue
        found = narrowed(array, dtype, "x")
        wide = np.array(expected.astype(mx.float32))
        np.testing.assert_array_equal(widened(found, dtype), wide)
        np.testing.assert_array_equal(is_rounded(array, dtype), wide != array)
        assert all_finite(found.view(np.uint16), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_pattern_of_16_bits(dtype: str) -> None:
    patterns = np.arange(1 << 16).astype(np.uint16)
    array = mx.array(patterns).view(getattr(mx, dtype))
    expected = np.array(mx.isfinite(array))
    found = [all_finite(patterns[n : n + 1], dtype) for n in range(1 << 16)]
    np.testing.assert_array_equal(found, expected)
    assert all_finite(patterns[expected], dtype) and not all_finite(patterns, dtype)


def test_weights_of_codes_and_scales() -> None:
    scales, biases = np.array([1.0, 4000.0], np.float32), np.array([0.0, 10000.0], np.float32)
    require_affine(scales, biases, 4, "bfloat16", "x")
    with pytest.raises(CheckpointError, match=f"^x: {TOO_LARGE} float16, as 70000"):
        require_affine(scales, biases, 4, "float16", "x")
    with pytest.raises(CheckpointError, match=r"^x: "):
        require_affine(np.array([3e38], np.float32), biases[:1], 4, "float32", "x")


# Alphas


def alpha_json(folder: Path) -> list[str]:
    (folder / "alpha.json").write_text(json.dumps({"1": {"0": 1e39, "1": 1.0}}))
    return []


def alpha_option(folder: Path) -> list[str]:
    (folder.parent / "mine.json").write_text(json.dumps({"1": [-1e39, 1.0]}))
    return ["--alpha", str(folder.parent / "mine.json")]


def alpha_number(folder: Path) -> list[str]:
    torch_save(folder / "alpha_overlay.pt", {1: [1e39, 1.0]})
    return []


def alpha_tensor(folder: Path) -> list[str]:
    torch_save(folder / "alpha_overlay.pt", {1: np.array([1.0, 1e39])})
    return []


@pytest.mark.parametrize("change", [alpha_json, alpha_option, alpha_number, alpha_tensor])
def test_alphas_beyond_float32(tmp_path: Path, change: Callable[[Path], list[str]]) -> None:
    overlay = write_overlay(tmp_path / "overlay", alpha="none", tokenizer=False, **DIMS).path
    options = change(overlay)
    before = snapshot(tmp_path)
    result = run("convert", overlay, "--out", tmp_path / "tier", *options, code=1)
    assert_refused(result, "layer 1, expert", "1e+39, too large for float32")
    assert snapshot(tmp_path) == before


def test_alphas_that_are_folded_into_scales(tmp_path: Path) -> None:
    """In a portable tier, alpha times scale is stored, in the tier's dtype."""
    overlay = write_overlay(tmp_path / "overlay", tokenizer=False, alpha="none", **DIMS).path
    for alpha, dtype, said in (
        (1e6, "float16", "too large for float16"),
        (3e38, "float32", "too large for float32"),
    ):
        (tmp_path / "a.json").write_text(json.dumps({"1": [alpha, 1.0]}))
        replace_tensor(overlay, f"{MLP}experts.0.down_scale", [4.0], "F32")
        options = ["--portable", "--dtype", dtype, "--alpha", tmp_path / "a.json"]
        result = run("convert", overlay, "--out", tmp_path / "tier", *options, code=1)
        assert_refused(result, f"{MLP}experts.0.down_scale", said)


# Tensors of overlays and bases

FLOAT64 = {
    "router": (f"{MLP}router.weight", (2, 64)),
    "scale": (f"{MLP}experts.1.up_scale", (1,)),
    "alphas": (f"{MLP}alpha_values", (2,)),
    "norm": ("model.norm.weight", (64,)),
    "bias": ("model.layers.0.self_attn.q_proj.bias", (64,)),
    "matrix": ("model.layers.0.mlp.up_proj.weight", (64, 64)),
    "embedding": ("model.embed_tokens.weight", (288, 64)),
}


@pytest.mark.parametrize("name", FLOAT64)
@pytest.mark.parametrize("portable", [False, True])
def test_float64_that_float32_does_not_hold(tmp_path: Path, name: str, portable: bool) -> None:
    overlay = write_overlay(tmp_path / "overlay", tokenizer=False, **DIMS).path
    key, shape = FLOAT64[name]
    values = np.ones(shape, np.float64)
    values[(-1,) * len(shape)] = -1e39
    replace_tensor(overlay, key, values, "F64")
    options = ["--portable"] if portable else []
    result = run("convert", overlay, "--out", tmp_path / "tier", *options, code=1)
    assert_refused(result, "model.safetensors", key, f"{TOO_LARGE} float32, as -1e+39")
    assert not (tmp_path / "tier").exists()


@pytest.mark.parametrize(
    ("value", "tier", "dtype", "said"),
    [
        (7e4, "q4", "float16", "too large for float16, as 70000"),
        (7e4, "f16", "float16", "too large for float16, as 70000"),
        (3.4e38, "q4", "bfloat16", "too large for bfloat16, as 3.4e+38"),
        (3.4e38, "bf16", "bfloat16", "too large for bfloat16, as 3.4e+38"),
        (np.nan, "f32", "float32", "holds NaN or infinity"),
        (-np.inf, "q8", "bfloat16", "holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_base_in_a_narrower_dtype(
    tmp_path: Path, key: str, value: float, tier: str, dtype: str, said: str
) -> None:
    overlay = write_overlay(tmp_path / "o", with_base=False, tokenizer=False, **DIMS).path
    base = write_base(tmp_path / "b", base_dtype="F32", tokenizer=False, layers=2, intermediate=64)
    changed = base.base[key].copy()
    changed.reshape(-1)[5] = value
    replace_tensor(base.path, key, changed)
    options = ["--base", base.path, "--tier", tier, "--dtype", dtype]
    result = run("convert", overlay, "--out", tmp_path / "tier", *options, code=1)
    assert_refused(result, key, said)
    assert not (tmp_path / "tier").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_whose_range_is_too_wide(tmp_path: Path, bits: int) -> None:
    """Every weight fits in float32, but the step between two codes would not."""
    overlay = write_overlay(tmp_path / "o", tokenizer=False, base_dtype="F32", **DIMS).path
    key = "model.layers.0.mlp.up_proj.weight"
    matrix = np.zeros((64, 64), np.float32)
    matrix[3, 1:3] = [3e38, -3e38]
    replace_tensor(overlay, key, matrix)
    options = ["--dtype", "float32", "--base-bits", bits]
    result = run("convert", overlay, "--out", tmp_path / "tier", *options, code=1)
    assert_refused(result, key)


# Imports and merges


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 1e39), ("rms_norm_eps", 1e-50), ("rope_theta", 1e39)]
)
def test_constants_are_of_float32(tmp_path: Path, key: str, value: float) -> None:
    overlay = write_overlay(tmp_path / "o", tokenizer=False, **DIMS).path
    config = json.loads((overlay / "config.json").read_text())
    (overlay / "config.json").write_text(json.dumps(config | {key: value}))
    result = run("convert", overlay, "--out", tmp_path / "tier", code=1)
    assert_refused(result, "config.json", key, "expected a number that float32 has room for")


def test_gguf_weights_beyond_float16(tmp_path: Path) -> None:
    """Scales that fit in float16, but not the weights that they stand for."""
    model = build_gguf(layers=1, kinds={"down": "Q4_1"})
    raw = model.tensors["blk.0.ffn_down.weight"].data
    raw.reshape(-1, 20)[:, :4] = np.array([60000, 0], np.float16).view(np.uint8)
    path = model.write(tmp_path / "x.gguf")
    result = run("import", path, "--out", tmp_path / "out", "--dtype", "float16", code=1)
    assert_refused(result, "blk.0.ffn_down.weight", "too large for float16, as 900000")


def test_merged_weights(tmp_path: Path) -> None:
    write_models(tmp_path, experts=3)
    key = "model.layers.1.mlp.up_proj.weight"
    replace_tensor(tmp_path / "expert_2", key, np.full((64, 32), 7e4, np.float32))
    config = write_merge_config(tmp_path, dtype="float16")
    result = run("merge", config, "--out", tmp_path / "out", code=1)
    assert_refused(result, key, "too large for float16, as 70000")


# Loading


@pytest.mark.parametrize("tier", ["q4", "bf16"])
def test_loading_in_float16(tmp_path: Path, tier: str) -> None:
    overlay = write_overlay(tmp_path / "o", tokenizer=False, **DIMS).path
    weights = np.ones((64, 64), np.float32)
    weights[0] = 7e4
    replace_tensor(overlay, "model.layers.0.mlp.up_proj.weight", weights, "BF16")
    replace_tensor(overlay, "model.norm.weight", np.full(64, 7e4, np.float32), "BF16")
    folder = tier_of(overlay, None, tmp_path / "tier", tier=tier)
    assert load(folder, "bfloat16") and load(folder)
    with pytest.raises(CheckpointError, match=rf"tier: model\..*: {TOO_LARGE} float16"):
        load(folder, "float16")


# All of it goes one way

PACKAGE = Path(outlier_mlx.__file__).parent
MAKERS = ("storage", "writing", "imports", "checkpoints", "tiers", "merge", "models")
WIDE = re.compile(r"np\.(float32|float64|u?int(8|16|32|64)?|intp)")


def test_nothing_else_narrows_floats() -> None:
    """What makes models converts arrays to literal wide dtypes only, but in one module."""
    found = []
    for path in sorted(path for room in MAKERS for path in (PACKAGE / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr == "astype" and not WIDE.fullmatch(ast.unparse(node.args[0])):
                found.append(path.name)
    assert set(found) == {"rounding.py"}
