"""Loading and verifying share one check, made from config and headers before MLX sees a byte."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports import import_model
from outlier_mlx.tiers.verify import verify_tier
from tests.awq_builder import Awq, write_awq
from tests.damage import INDEX, REMOVE, add_tensor, drop_tensor, edit_config, replace_tensor
from tests.engine import forward
from tests.library import Library
from tests.plain_models import SIZES, write_model

EXPERTS = "model.layers.1.mlp.switch_mlp."
PROJECTION = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(library: Library) -> Path:
    how: dict[str, Any] = {"layers": 2, "moe_layers": (1,), "expert_intermediate": 96}
    return library.tier(library.overlay(**how), tier="q4")


@pytest.fixture
def tier(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "tier")


def sign_again(folder: Path) -> None:
    """Make the manifest agree with the files."""
    (manifest,) = (folder / n for n in ("tier.json", "checksums.json") if (folder / n).exists())
    content = json.loads(manifest.read_text())
    for name in content["files"]:
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        content["files"][name] = {"sha256": digest, "bytes": len(data)}
    manifest.write_text(json.dumps(content))


def refused_by_both(folder: Path, words: str) -> None:
    """`load` and `verify` refuse a folder in the same words."""
    sign_again(folder)
    with pytest.raises(CheckpointError, match=words) as loading:
        outlier_mlx.load(folder)
    with pytest.raises(CheckpointError) as verifying:
        verify_tier(folder)
    assert str(verifying.value) == str(loading.value)


def quantization(**changes: Any) -> dict[str, Any]:
    how = {"group_size": 64, "bits": 4, "mode": "affine"} | changes
    return {k: v for k, v in how.items() if v is not REMOVE}


AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"ternary": {"format": "tq9", "version": 2}}, "ternary format 'tq9'"),
    "version": (
        {"ternary": {"format": "tq1_0_strided", "version": 3}},
        "version 3 is not supported: expected .*, version 2",
    ),
    "version-1": (
        {"ternary": {"format": "tq1_0_rows", "version": 1, "row_bytes_multiple": 4}},
        "'tq1_0_rows' version 1 was made by outlier-mlx 0.1: convert the overlay",
    ),
    "affine2-version-1": (
        {"ternary": {"format": "affine2", "version": 1}},
        "'affine2' version 1 was made by outlier-mlx 0.1: convert the overlay",
    ),
    "no-object": ({"ternary": 3}, "ternary is 3, expected an object"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected"),
    "many-layers": ({"num_hidden_layers": 999}, r"layers\.2\.input_layernorm.weight: missing"),
    "experts": ({"num_experts": 10**9}, "num_experts is 1000000000, expected"),
    "width": ({"moe_intermediate_size": 2**31}, "moe_intermediate_size is 2147483648"),
    "hidden": ({"hidden_size": 32}, "does not say how model.embed_tokens is stored"),
    "alias": ({"hidden_size": REMOVE, "hidden_dim": 64}, "hidden_size is None, expected 64"),
    "top-k": ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, expected 4"),
    "moe-layers": ({"moe_layers": [0]}, r"layers\.0\.mlp.*missing"),
    "type": ({"model_type": "qwen2"}, "model_type is 'qwen2', expected 'outlier_moe'"),
    "tied": ({"tie_word_embeddings": True}, "lm_head.*not a tensor of this model"),
    "number-of-flag": ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0"),
    "norm": ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    "dtype": ({"dtype": "int4"}, "dtype is 'int4', expected one of bfloat16"),
    "foreign": ({"quantize_activations": True}, "quantize_activations is no field of a tier"),
    "rotation": ({"rope_traditional": True}, "rope_traditional is no field of a tier"),
    "end": ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
    "end-list": ({"eos_token_id": [0, 1.5]}, r"eos_token_id is \[0, 1.5\]"),
    "end-beyond": ({"eos_token_id": 288}, "eos_token_id is 288, expected .* below 288"),
    "group": ({"quantization": quantization(group_size=0)}, "group_size is 0, expected 32, 64 or"),
    "bits": ({"quantization": quantization(bits=7)}, "bits is 7, expected 1, 2, 3"),
    "no-bits": ({"quantization": quantization(bits=REMOVE)}, "quantization"),
    "mode": ({"quantization": quantization(mode="mxfp4")}, "bits|group_size"),
    "mode-list": ({"quantization": quantization(mode=[])}, r"MLX has no mode \[\]"),
    "no-quantization": ({"quantization": REMOVE}, "does not say how .* is stored"),
    "list": ({"quantization": [4]}, r"quantization is \[4\], expected an object"),
    "two-names": ({"quantization_config": quantization(bits=8)}, "differs from quantization"),
    "path": (
        {"quantization": quantization() | {"model.x": AFFINE}},
        "model.x is no matrix to quantize",
    ),
    "expert-path": (
        {"quantization": quantization() | {f"{EXPERTS}up_proj": AFFINE}},
        "up_proj is no matrix to quantize",
    ),
    "other-group": ({"quantization": quantization() | {PROJECTION: AFFINE}}, "q_proj.scales: BF16"),
    "path-group": (
        {"quantization": quantization() | {PROJECTION: AFFINE | {"group_size": 0}}},
        "quantization of .*q_proj: group_size is 0",
    ),
    "not-quantized": ({"quantization": quantization() | {PROJECTION: False}}, "does not say how"),
    "true": ({"quantization": quantization() | {PROJECTION: True}}, "q_proj is True"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_refused_by_both(name: str, tier: Path) -> None:
    changes, words = CONFIGS[name]
    edit_config(tier, **changes)
    refused_by_both(tier, words)


TENSORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rank": (
        lambda t: replace_tensor(t, f"{PROJECTION}.scales", np.ones(64), "F32"),
        r"q_proj.scales: F32 \(64,\), expected",
    ),
    "expert-rank": (
        lambda t: replace_tensor(t, f"{EXPERTS}up_proj.scales", np.ones(4), "F32"),
        r"up_proj.scales: F32 \(4,\), expected F32 \(4, 96\)",
    ),
    "norm": (
        lambda t: replace_tensor(t, "model.norm.weight", np.ones(64), "F64"),
        r"norm.weight: F64 \(64,\), expected F32, F16 or BF16",
    ),
    "whole-numbers": (
        lambda t: replace_tensor(t, "model.norm.weight", np.ones(64, np.int32), "I32"),
        r"norm.weight: I32",
    ),
    "missing": (lambda t: drop_tensor(t, "model.norm.weight"), "model.norm.weight: missing"),
    "biases": (lambda t: drop_tensor(t, f"{PROJECTION}.biases"), "q_proj.biases: missing"),
    "unknown": (
        lambda t: add_tensor(t, "model.layers.9.x.weight", np.ones(3), "F32"),
        "not a tensor of this model",
    ),
    "index": (
        lambda t: (t / INDEX).write_text('{"weight_map": {"x": "y"}}'),
        "no such file|not in",
    ),
    "end": (
        lambda t: (t / "generation_config.json").write_text('{"eos_token_id": 288}'),
        "generation_config.json: eos_token_id is 288",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_and_texts_are_refused_by_both(name: str, tier: Path) -> None:
    change, words = TENSORS[name]
    change(tier)
    refused_by_both(tier, words)


def test_another_quantization_beside_a_tier(tier: Path) -> None:
    (tier / "hf_quant_config.json").write_text('{"quant_method": "mxfp4"}')
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: not a file of a tier"):
        outlier_mlx.load(tier)


def test_imported_models_are_checked_as_tiers_are(tmp_path: Path) -> None:
    write_awq(tmp_path / "awq", Awq(vocab=288))
    whole = import_model(tmp_path / "awq", tmp_path / "whole").path
    load_model(whole)
    given = json.loads((whole / "config.json").read_text())["quantization"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_hidden_layers": 10**9}, "1000000000 layers, but only|num_hidden_layers is"),
        ({"quantization": given | {"group_size": 0}}, "group_size is 0"),
        ({"hidden_size": 8}, "does not say how .* is stored"),
    ]
    for number, (changes, words) in enumerate(cases):
        folder = shutil.copytree(whole, tmp_path / str(number))
        edit_config(folder, **changes)
        refused_by_both(folder, words)
    drop_tensor(whole, "model.norm.weight")
    refused_by_both(whole, "model.norm.weight: missing")


# Models of others, of which only that is checked that MLX does not check


@pytest.mark.parametrize("kind", ["olmo2", "llama"])
def test_a_model_of_others(kind: str, tmp_path: Path) -> None:
    made: dict[str, Any] = SIZES | {"model_type": kind}
    folder = write_model(tmp_path / "model", made)
    load_model(folder)
    edit_config(folder, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="1000000000 layers, but only"):
        load_model(folder)
    edit_config(folder, num_hidden_layers=2, quantization=quantization(group_size=0))
    with pytest.raises(CheckpointError, match="group_size is 0, expected 32"):
        load_model(folder)
    edit_config(folder, quantization=quantization())
    path = "model.layers.0.self_attn.q_proj"
    replace_tensor(folder, f"{path}.weight", np.zeros((64, 8), np.uint32), "U32")
    # Of rank 1, it has more groups than a row has weights.
    add_tensor(folder, f"{path}.scales", np.ones(128), "F32")
    with pytest.raises(
        CheckpointError, match=rf"{path}: scales \(128,\) and weight \(64, 8\) do not"
    ):
        load_model(folder)


# Anything at all


def mutate(folder: Path, chance: random.Random) -> None:
    """Change something in a tier's files; the manifest agrees afterwards."""
    config = json.loads((folder / "config.json").read_text())
    shard = folder / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    values = [0, -1, 1, 3, 2**31, 10**9, 1.5, "x", "", None, True, [], {}, [1], {"a": 1}]
    match chance.randrange(4):
        case 0:
            config[chance.choice(list(config))] = chance.choice(values)
        case 1:
            inner = config[chance.choice(["quantization", "ternary"])]
            inner[chance.choice([*inner, PROJECTION])] = chance.choice(values)
        case 2:  # one digit or letter of the header
            data[chance.randrange(8, header)] = chance.choice(b"0123456789FBU,]")
        case 3:
            data[chance.randrange(header, len(data))] ^= 1 << chance.randrange(8)
    (folder / "config.json").write_text(json.dumps(config))
    shard.write_bytes(data)
    sign_again(folder)


def check_agreement(whole: Path, place: Path, seeds: range) -> int:
    """What verify calls whole can be loaded and run; returns how many are."""
    sound = 0
    for seed in seeds:
        folder = shutil.copytree(whole, place / "tier")
        mutate(folder, random.Random(seed))
        try:
            verify_tier(folder)
        except CheckpointError as error:
            assert "\n" not in str(error), seed
            # Not loading either is allowed; anything but an error of one line is not.
            with suppress(CheckpointError):
                outlier_mlx.load(folder)
        else:
            model, _ = outlier_mlx.load(folder)
            assert forward(model, [1, 2, 3]).shape == (3, 288)
            sound += 1
            mx.clear_cache()
        shutil.rmtree(folder)
    return sound


def test_what_verify_calls_whole_loads(whole: Path, tmp_path: Path) -> None:
    assert 0 < check_agreement(whole, tmp_path, range(16)) < 16
