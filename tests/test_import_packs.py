"""MLX's packs of 2-bit codes, imported as packed rows: each weight exactly, and back again."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model as stock_load_model

from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports import import_model
from outlier_mlx.storage.shards import read_shards
from tests.damage import edit_config
from tests.program import assert_refused, run
from tests.tensor_file import stored
from tests.ternary_sources import affine2, bitnet_pack, mlx_pack, prism_pack, words
from tests.test_import_ternary import (
    UP,
    assert_matrices,
    assert_rest,
    assert_same_tensors,
    assert_stock,
    imported,
)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("group", [64, 128])
def test_mlx_pack(group: int, dtype: str, tmp_path: Path):
    pack = mlx_pack(group=group, dtype=dtype)
    done, found = imported(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert_matrices(found, pack.matrices)
    assert_rest(found, pack.tensors, pack.matrices)
    assert found.fields["group_size"] == group
    assert "quantization" not in found.config and "quantization_config" not in found.config
    assert found.config["model_type"] == "qwen3"
    assert found.tensors["model.embed_tokens.scales"].dtype == dtype
    assert done.notes == [] and done.tokenizer
    run("verify", done.path)


def test_what_is_not_ternary_stays(tmp_path: Path):
    """One 2-bit matrix on another grid, one of 4 bits, one in groups of 32; and --strict."""
    pack = mlx_pack()
    up, down, head = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.norm"
    rng = np.random.default_rng(0)
    pack.tensors[f"{up}.biases"] = stored(rng.normal(0, 1, (384, 2)).astype(np.float16))
    four = mx.quantize(mx.array(rng.normal(0, 1, (256, 384)).astype(np.float16)), 64, 4)
    for leaf, array in zip(("weight", "scales", "biases"), four, strict=True):
        pack.tensors[f"{down}.{leaf}"] = stored(np.array(array))
    own = {"group_size": 64, "bits": 4, "mode": "affine"}
    for field in ("quantization", "quantization_config"):
        pack.config[field] = pack.config[field] | {down: own}
    kept = {path: pack.matrices.pop(path) for path in (up, down)}
    source = pack.write(tmp_path / "pack")
    done, found = imported(source, tmp_path / "out")
    assert_matrices(found, pack.matrices)
    assert_rest(found, pack.tensors, pack.matrices)
    assert found.config["quantization"] == {
        "group_size": 128,
        "bits": 2,
        "mode": "affine",
        down: own,
    }
    assert done.notes == [f"not ternary, and kept as they are: {up}"]
    assert head not in found.modules and kept
    run("verify", done.path)
    refused = run("import", source, "--strict", "--out", tmp_path / "strict", code=1)
    assert_refused(refused, "--strict", f"{up}.weight", "not ternary: row 0")
    assert not (tmp_path / "strict").exists()


def test_codes_with_float32_scales_stay(tmp_path: Path):
    pack = mlx_pack()
    for leaf in ("scales", "biases"):
        pack.tensors[f"{UP}.{leaf}"] = stored(pack.tensors[f"{UP}.{leaf}"].array(), "F32")
    done, found = imported(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert UP not in found.modules and len(found.modules) == len(pack.matrices) - 1
    assert found.tensors[f"{UP}.scales"].dtype == "F32"
    assert done.notes == [f"not ternary, and kept as they are: {UP}"]
    run("verify", done.path)
    refused = run("import", tmp_path / "pack", "--strict", "--out", tmp_path / "x", code=1)
    assert_refused(refused, f"{UP}.scales: float32")


def test_mirrored_codes_and_zeros(tmp_path: Path):
    pack = mlx_pack()
    path = "model.layers.0.mlp.up_proj"
    matrix = pack.matrices[path]
    matrix.trits[:8] = 0
    pack.tensors |= affine2(path, matrix)
    other = "model.layers.1.mlp.up_proj"
    flipped = pack.matrices[other]
    pack.tensors[f"{other}.weight"] = stored(words(-flipped.trits))
    pack.tensors[f"{other}.scales"] = stored((-flipped.scales).astype(np.float16))
    pack.tensors[f"{other}.biases"] = stored(flipped.scales.astype(np.float16))
    _, found = imported(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert_matrices(found, pack.matrices)
    assert not found.scales(path)[:8].any()


def test_nothing_is_ternary(tmp_path: Path):
    pack = mlx_pack()
    for path, matrix in pack.matrices.items():
        matrix.trits[0, 0] = 2
        pack.tensors |= affine2(path, matrix)
    source = pack.write(tmp_path / "pack")
    assert_refused(
        run("import", source, "--out", tmp_path / "out", code=1), "pack: no matrix is ternary"
    )


@pytest.mark.parametrize("schema", [1, 2])
def test_rotated_pack(schema: int, tmp_path: Path):
    pack = prism_pack(schema)
    pack.tensors["vision_tower.patch.weight"] = stored(np.ones((4, 4), np.float16))
    pack.tensors["mtp.fc.weight"] = stored(np.ones((4, 4), np.float16))
    done, found = imported(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert_matrices(found, pack.matrices)
    assert found.config["model_type"] == "qwen3_5"
    assert found.config["text_config"]["hidden_size"] == 512
    assert not {"modules", "schema_version", "quantization"} & found.config.keys()
    assert found.fields["pack_schema_version"] == schema
    assert found.fields["rotations"] == [{"width": 512, "block": 512, "signed": True}]
    root = "language_model." if schema == 1 else ""
    for module in pack.config["modules"]:
        path = f"language_model.{module['path']}"
        assert found.modules[path].get("rotation") == (0 if module["block"] else None)
    signs = next(t for name, t in pack.tensors.items() if name.endswith(".signs"))
    np.testing.assert_array_equal(found.tensors["rotations.0.signs"].read(), signs.array())
    norm = "language_model.model.norm.weight"
    assert found.tensors[norm].read().tobytes() == pack.tensors[norm.removeprefix(root)].data
    assert done.notes == [
        "ignored: tensors for images or drafts: vision_tower.patch.weight and mtp.fc.weight"
    ]
    run("verify", done.path)


def test_norms_of_two_meanings(tmp_path: Path):
    """In Hugging Face's layout of convolutions, mlx-lm adds 1 to all norms."""
    pack = prism_pack()
    pack.config["text_config"] = pack.config["text_config"] | {"full_attention_interval": 3}
    name = "language_model.model.layers.0.linear_attn.conv1d.weight"
    old = pack.tensors[name]
    out, kernel, _ = old.shape
    turned = old.array().reshape(out, kernel)[:, None]
    pack.tensors[name] = stored(turned)
    other = name.replace("layers.0", "layers.1")
    pack.tensors = {k: tensor for k, tensor in pack.tensors.items() if ".layers.1." not in k}
    pack.tensors |= {k.replace("layers.0", "layers.1"): v for k, v in pack.tensors.items()}
    listed = [m for m in pack.config["modules"] if ".layers.1." not in m["path"]]
    again = [
        m | {"path": m["path"].replace("layers.0", "layers.1")}
        for m in listed
        if ".layers.0." in m["path"]
    ]
    pack.config["modules"] = listed + again
    pack.tensors[other] = old
    with pytest.raises(CheckpointError, match=r"layers\.0.*conv1d.*layers\.1.*conv1d.*norms"):
        import_model(pack.write(tmp_path / "mixed"), tmp_path / "out")
    pack.tensors[other] = pack.tensors[name]
    _, found = imported(pack.write(tmp_path / "same"), tmp_path / "out")
    assert found.tensors[other].shape == (out, 1, kernel)


def test_signs_beside_a_pack(tmp_path: Path):
    pack = prism_pack()
    signs = next(t for name, t in pack.tensors.items() if name.endswith(".signs"))
    values = signs.array().astype(int).tolist()
    said = {"prism.hadamard.sign_mode": "explicit", "prism.hadamard.sign_widths": [512]}
    source = pack.write(tmp_path / "pack")
    beside = source / "hadamard.json"
    beside.write_text(json.dumps(said | {"prism.hadamard.sign_values": values}))
    import_model(source, tmp_path / "out")
    values[7] *= -1
    beside.write_text(json.dumps(said | {"prism.hadamard.sign_values": values}))
    with pytest.raises(CheckpointError, match=r"hadamard\.json: .*sign_values: other signs"):
        import_model(source, tmp_path / "other")


@pytest.mark.parametrize("group", [64, 128])
def test_back_to_a_pack(group: int, tmp_path: Path):
    """An export has the bytes of the pack."""
    pack = mlx_pack(group=group)
    source = pack.write(tmp_path / "pack")
    done = import_model(source, tmp_path / "rows")
    run("export", done.path, "--format", "mlx2", "--out", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["quantization"] == back["quantization_config"] == pack.config["quantization"]
    assert_stock(tmp_path / "back", pack.matrices)


@pytest.mark.parametrize("schema", [1, 2])
def test_back_to_a_rotated_pack(schema: int, tmp_path: Path):
    pack = prism_pack(schema)
    source = pack.write(tmp_path / "pack")
    done = import_model(source, tmp_path / "rows")
    run("export", done.path, "--format", "mlx2", "--out", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    for name in ("modules", "schema_version", "tensor_namespace", "quantization", "model_type"):
        assert back[name] == pack.config[name]
    stock_load_model(tmp_path / "back", lazy=True)


def test_bitnet_as_a_pack(tmp_path: Path):
    """Scales of rows become groups; in bfloat16 where that holds them."""
    pack = bitnet_pack(divides=False)
    done = import_model(pack.write(tmp_path / "pack"), tmp_path / "rows")
    run("export", done.path, "--format", "mlx2", "--out", tmp_path / "back")
    assert_stock(tmp_path / "back", pack.matrices)
    assert read_shards(tmp_path / "back")["model.layers.0.mlp.up_proj.scales"].dtype == "BF16"


def test_what_mlx_lm_has_no_pack_for(tmp_path: Path):
    done = import_model(mlx_pack().write(tmp_path / "pack"), tmp_path / "rows")
    edit_config(done.path, model_type="bitnet")
    refused = run("export", done.path, "--format", "mlx2", "--out", tmp_path / "x", code=1)
    assert_refused(refused, "bitnet has no layers with affine codes")
    refused = run("export", done.path, "--format", "packed", "--out", tmp_path / "x", code=1)
    assert_refused(refused, "not a tier")
    refused = run("export", tmp_path / "pack", "--format", "mlx2", "--out", tmp_path / "x", code=1)
    assert_refused(refused, "not a ternary model")
