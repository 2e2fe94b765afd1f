"""Rotated GGUF models, and those with linear attention: order of heads, and strict metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model as stock_load_model

from outlier_mlx.imports import import_model
from outlier_mlx.models import prism_pack
from tests.goldens import require_shared
from tests.program import assert_refused, run
from tests.ternary_sources import GgufFile, dense_gguf, qwen35_gguf, rotation_fields
from tests.test_import_ternary import assert_matrices, imported

KEY = "prism.hadamard."


@pytest.mark.parametrize("rotated", [False, True])
def test_linear_attention(rotated: bool, tmp_path: Path):
    """Value heads get MLX's order: rows, columns that are not rotated, and vectors."""
    made = qwen35_gguf(rotated=rotated)
    done, found = imported(made.write(tmp_path / "model.gguf"), tmp_path / "out")
    assert_matrices(found, made.matrices)
    assert found.config["model_type"] == "qwen3_5"
    text = found.config["text_config"]
    assert (text["linear_num_value_heads"], text["linear_value_head_dim"]) == (4, 64)
    assert text["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert text["layer_types"] == ["linear_attention", "full_attention"]
    for name, expected in made.others.items():
        tensor = found.tensors[name]
        stored = tensor.read_float32()
        if name.endswith("A_log"):
            assert tensor.dtype == "F32"
            np.testing.assert_allclose(stored, expected, rtol=1e-6)
        else:
            np.testing.assert_array_equal(stored, expected, err_msg=name)
    rotations = found.fields.get("rotations", [])
    assert [r["width"] for r in rotations] == ([512, 256] if rotated else [])
    assert all(("rotation" in module) is rotated for module in found.modules.values())
    run("verify", done.path)


def test_draft_heads_are_left_out(tmp_path: Path):
    made = qwen35_gguf()
    made.add("blk.2.nextn.eh_proj.weight", np.ones((4, 4), np.float32))
    made.add("blk.2.attn_norm.weight", np.ones(4, np.float32))
    done, _ = imported(made.write(tmp_path / "model.gguf"), tmp_path / "out")
    assert any("draft head blk.2.attn_norm" in note for note in done.notes)


def rotated_qwen3() -> GgufFile:
    made = dense_gguf("PQ2_0")
    names = [name for name, tensor in made.tensors.items() if tensor[0] == "PQ2_0"]
    rotated = [name for name in names if name != "token_embd.weight"]
    made.fields |= rotation_fields(rotated, 256)
    made.fields |= {f"{KEY}version": 2, f"{KEY}tied_output": True}
    return made


def test_a_rotated_model_of_another_architecture(tmp_path: Path):
    made = rotated_qwen3()
    _, found = imported(made.write(tmp_path / "model.gguf"), tmp_path / "out")
    assert_matrices(found, made.matrices)
    assert found.fields["rotations"] == [
        {"width": 256, "block": 256, "signed": True},
        {"width": 512, "block": 256, "signed": True},
    ]
    signs = made.fields[f"{KEY}sign_values"]
    np.testing.assert_array_equal(found.tensors["rotations.0.signs"].read(), signs[:256])
    np.testing.assert_array_equal(found.tensors["rotations.1.signs"].read(), signs[256:])
    refused = run(
        "import", tmp_path / "model.gguf", "--experts", "affine2", "--out", tmp_path / "x", code=1
    )
    assert_refused(refused, "rotated")
    refused = run("export", found.folder, "--format", "mlx2", "--out", tmp_path / "x", code=1)
    assert_refused(refused, "rotated qwen3")


def test_signs_that_are_all_1(tmp_path: Path):
    made = rotated_qwen3()
    made.fields[f"{KEY}sign_mode"] = "identity"
    del made.fields[f"{KEY}sign_widths"], made.fields[f"{KEY}sign_values"]
    _, found = imported(made.write(tmp_path / "model.gguf"), tmp_path / "out")
    assert [r["signed"] for r in found.fields["rotations"]] == [False, False]
    assert "rotations.0.signs" not in found.tensors
    run("verify", found.folder)


def drop(key: str) -> Callable[[GgufFile], Any]:
    return lambda made: made.fields.pop(f"{KEY}{key}")


def put(key: str, value: Any) -> Callable[[GgufFile], Any]:
    return lambda made: made.fields.update({f"{KEY}{key}": value})


def swap_type(made: GgufFile) -> None:
    shape = made.tensors["blk.0.attn_k.weight"][1]
    made.add("blk.0.attn_k.weight", np.zeros(shape, np.float32))


BAD: dict[str, tuple[Callable[[GgufFile], Any], str]] = {
    "no version": (drop("version"), "version is missing"),
    "version": (put("version", 3), "version 3"),
    "transform": (put("transform", "dct"), "'dct'"),
    "axis": (put("axis", "rows"), "axis 'rows'"),
    "block": (put("block_size", 96), "block_size 96"),
    "block too large": (put("block_size", 1024), "block_size 1024 does not divide"),
    "mode": (put("sign_mode", "random"), "'random'"),
    "sign": (put("sign_values", [3] * 768), "holds 3"),
    "signs": (put("sign_values", [1] * 767), "767 values"),
    "width": (put("sign_widths", [256]), "sign_values has 768 values"),
    "no width": (
        lambda made: (put("sign_widths", [256])(made), put("sign_values", [1] * 256)(made)),
        "width 512",
    ),
    "unknown": (put("weight_names", ["blk.9.attn_q.weight"]), "blk.9.attn_q.weight: not in"),
    "norm": (put("weight_names", ["blk.0.attn_norm.weight"]), "blk.0.attn_norm.weight: no matrix"),
    "twice": (put("weight_names", ["blk.0.attn_q.weight"] * 2), "2 times"),
    "inverse": (put("inverse_weight_names", ["output.weight"]), "output.weight, expected only"),
    "not tied": (put("tied_output", False), "tied_output false"),
    "no head": (
        lambda made: (put("version", 1)(made), drop("tied_output")(made)),
        "no output.weight",
    ),
    "flag": (put("tied_output", 1), "tied_output 1, expected a boolean"),
    "not ternary": (swap_type, "blk.0.attn_k.weight: rotated, but F32"),
    "architecture": (
        lambda made: made.fields.update({"general.architecture": "qwen2"}),
        "qwen2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_metadata_that_is_not_sound(case: str, tmp_path: Path):
    change, words = BAD[case]
    made = rotated_qwen3()
    change(made)
    source = made.write(tmp_path / "model.gguf")
    assert_refused(run("import", source, "--out", tmp_path / "x", code=1), words)
    assert not (tmp_path / "x").exists()


def test_value_heads_that_are_not_grouped(tmp_path: Path):
    made = qwen35_gguf(rotated=True)
    del made.fields[f"{KEY}gdn_v_grouped"]
    source = made.write(tmp_path / "model.gguf")
    assert_refused(run("import", source, "--out", tmp_path / "x", code=1), "gdn_v_grouped")


def test_old_blocks_under_the_number_of_new_ones(tmp_path: Path):
    """PQ2_0's blocks, numbered as Q2_0 was before: the offsets tell them apart."""
    made = dense_gguf("PQ2_0")
    made.tensors = {
        name: ("Q2_0" if kind == "PQ2_0" else kind, shape, data)
        for name, (kind, shape, data) in made.tensors.items()
    }
    source = made.write(tmp_path / "model.gguf")
    refused = run("import", source, "--out", tmp_path / "x", code=1)
    assert_refused(refused, "type 42", "blocks of 128", "PQ2_0 or g64")


def test_a_code_that_is_no_trit(tmp_path: Path):
    made = dense_gguf("PQ2_0")
    name = "blk.1.ffn_up.weight"
    kind, shape, data = made.tensors[name]
    made.tensors[name] = (kind, shape, data[:2] + b"\xff" + data[3:])
    source = made.write(tmp_path / "model.gguf")
    assert_refused(run("import", source, "--out", tmp_path / "x", code=1), name, "code 3")


def test_the_tokenizer_of_linear_attention(tmp_path: Path):
    """The rule `qwen35` splits words as transformers' tokenizer of such models does."""
    done = import_model(qwen35_gguf().write(tmp_path / "model.gguf"), tmp_path / "out")
    assert not any("tokenizer" in note for note in done.notes)
    from transformers import AutoTokenizer

    own: Any = AutoTokenizer.from_pretrained(done.path)
    written = (done.path / "tokenizer.json").read_text()
    rule = str(own.backend_tokenizer.pre_tokenizer)
    assert r"[\p{L}\p{M}]+" in rule and r"[\\p{L}\\p{M}]+" in written


@pytest.mark.parametrize("name", ["gguf_ptq1_qwen35", "gguf_q2_0_qwen35_tied"])
def test_reference_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a pack, with mlx-lm's model told to accept blocks of 128, and computing in float32."""
    import mlx_lm.models.prism_hadamard_qwen35 as stock

    def rows_in_float32(module: Any, indices: mx.array) -> mx.array:
        flat = indices.reshape(-1)
        scales, biases = (a[flat].astype(mx.float32) for a in (module.scales, module.biases))
        rows = mx.dequantize(module.weight[flat], scales, biases, 128, 2)
        rows = rows.reshape(*indices.shape, -1)
        return stock.hadamard_rotate(rows, module.block, module.signs, inverse=True)

    monkeypatch.setattr(prism_pack, "BLOCKS", (*prism_pack.BLOCKS, 128))
    monkeypatch.setattr(stock, "_BLOCKS", (*stock._BLOCKS, 128))
    monkeypatch.setattr(stock.HadamardQuantizedEmbedding, "__call__", rows_in_float32)
    folder = require_shared() / "goldens/ternary_models" / name
    done = import_model(folder / "model.gguf", tmp_path / "rows")
    run("export", done.path, "--format", "mlx2", "--out", tmp_path / "pack")
    model, _ = stock_load_model(tmp_path / "pack")
    model.set_dtype(mx.float32)
    reference: Any = mx.load(str(folder / "expected.safetensors"))
    found = np.array(model(reference["input_ids"]))
    np.testing.assert_allclose(found, np.array(reference["logits"]), atol=2e-4, rtol=1e-4)
