"""Ternary models of every form, imported as packed rows: each weight exactly, and back again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model as stock_load_model

from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports import Imported, import_model
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.ternary_affine import AffineSource
from outlier_mlx.ternary import unpack_rows
from outlier_mlx.ternary.scales import untile_scales
from tests.damage import edit_config
from tests.goldens import LOGITS_ATOL, require_shared
from tests.program import assert_refused, run
from tests.tensor_file import Stored, from_bfloat16, stored
from tests.ternary_sources import (
    BLOCKS,
    QWEN3,
    Pack,
    Ternary,
    affine2,
    bitnet_pack,
    dense_gguf,
    master_pack,
    mlx_pack,
    qwen35_gguf,
    random_ternary,
)

UP = "model.layers.0.mlp.up_proj"


class Written:
    """A folder that was imported: its config, and its ternary matrices as stored."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = read_shards(folder)
        self.fields = self.config["ternary"]
        self.modules: dict[str, dict[str, Any]] = self.fields["modules"]

    def group(self, path: str) -> int:
        return int(self.modules[path].get("group_size", self.fields["group_size"]))

    def trits(self, path: str) -> np.ndarray:
        rows = self.tensors[f"{path}.weight"].read()
        return unpack_rows(rows, self.modules[path]["in_features"])

    def scales(self, path: str) -> np.ndarray:
        """As stored, in the shape (out,) or (out, in / group)."""
        scales = self.tensors[f"{path}.scales"].read()
        return untile_scales(scales, len(self.trits(path))) if self.group(path) else scales

    def values(self, path: str) -> np.ndarray:
        scales, trits = self.scales(path), self.trits(path)
        if self.tensors[f"{path}.scales"].dtype == "BF16":
            scales = from_bfloat16(scales)
        numbers = scales.astype(np.float32).reshape(len(trits), -1)
        return trits * np.repeat(numbers, self.group(path) or trits.shape[1], axis=1)


def imported(source: Path, out: Path, **how: Any) -> tuple[Imported, Written]:
    done = import_model(source, out, **how)
    return done, Written(done.path)


def assert_matrices(found: Written, expected: dict[str, Ternary], root: str = "") -> None:
    assert set(found.modules) == {f"{root}{path}" for path in expected}
    for path, matrix in expected.items():
        np.testing.assert_array_equal(found.values(f"{root}{path}"), matrix.values, err_msg=path)


def assert_rest(found: Written, tensors: dict[str, Stored], packed: dict[str, Ternary]) -> None:
    """Everything that is not ternary is there, byte for byte."""
    held = {f"{path}.{leaf}" for path in packed for leaf in ("weight", "scales", "biases")}
    held |= {f"{path}.{leaf}" for path in packed for leaf in ("weight_scale", "signs")}
    for name in tensors.keys() - held:
        stored_there = found.tensors[name]
        assert stored_there.read().tobytes() == tensors[name].data, name
        assert stored_there.dtype == tensors[name].dtype, name


@pytest.mark.parametrize("make", [lambda: bitnet_pack(True), lambda: bitnet_pack(False)])
def test_packed_bitnet(make: Callable[[], Pack], tmp_path: Path):
    pack = make()
    _, found = imported(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert_matrices(found, pack.matrices)
    assert_rest(found, pack.tensors, pack.matrices)
    assert found.fields["group_size"] == 0
    assert "quantization_config" not in found.config


def test_master_weights(tmp_path: Path):
    pack = master_pack()
    done, found = imported(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert_matrices(found, pack.matrices)
    assert "lm_head" not in found.modules
    assert "another order of summation" in done.notes[0]


@pytest.mark.parametrize("by_row", [False, True])
def test_unpacked_floats(by_row: bool, tmp_path: Path):
    """Ternary weights in float16 are found; what is not ternary stays."""
    pack = mlx_pack()
    for name in ("quantization", "quantization_config"):
        del pack.config[name]
    for path, matrix in pack.matrices.items():
        if by_row:
            matrix.scales[:] = matrix.scales[0, 0]
        pack.tensors[f"{path}.weight"] = stored(matrix.values.astype(np.float16))
        del pack.tensors[f"{path}.scales"], pack.tensors[f"{path}.biases"]
    other = "model.layers.1.mlp.up_proj"
    pack.matrices.pop(other)
    noise = np.random.default_rng(0).normal(0, 1, (384, 256)).astype(np.float16)
    pack.tensors[f"{other}.weight"] = stored(noise)
    done, found = imported(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert_matrices(found, pack.matrices)
    assert_rest(found, pack.tensors, pack.matrices)
    assert done.notes == [f"not ternary, and kept as they are: {other}"]
    assert "quantization" not in found.config
    assert found.group("model.layers.0.mlp.down_proj") == (0 if by_row else 128)


def test_a_falcon_whose_weights_were_rounded(tmp_path: Path):
    pack = master_pack()
    pack.config = {k: v for k, v in pack.config.items() if k != "quantization_config"}
    source = pack.write(tmp_path / "plain")
    done = import_model(source, tmp_path / "out")  # an ordinary model
    assert done.source_format == "unquantized safetensors"
    edit_config(source, is_bitnet_config=True)
    refused = run("import", source, "--out", tmp_path / "x", code=1)
    assert_refused(refused, "not ternary", "revision main")


def test_a_model_without_linear_class_divides(tmp_path: Path):
    pack = bitnet_pack(divides=True)
    del pack.config["quantization_config"]["linear_class"]
    _, found = imported(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert_matrices(found, pack.matrices)


@pytest.mark.parametrize("kind", BLOCKS)
def test_gguf(kind: str, tmp_path: Path):
    made = dense_gguf(kind)
    source = made.write(tmp_path / "model.gguf")
    done, found = imported(source, tmp_path / "out")
    assert_matrices(found, made.matrices)
    assert done.source_format == f"GGUF {kind}"
    assert found.config["model_type"] == "qwen3" and found.config["torch_dtype"] == "float16"
    assert found.tensors["model.norm.weight"].dtype == "F16"
    run("verify", done.path)
    stock = import_model(source, tmp_path / "stock", experts="affine2")
    assert "ternary" not in json.loads((stock.path / "config.json").read_text())
    assert_stock(stock.path, made.matrices)


def assert_same_tensors(one: Path, other: Path) -> None:
    found, expected = (read_shards(folder) for folder in (one, other))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].read().tobytes() == tensor.read().tobytes(), name


def assert_stock(folder: Path, expected: dict[str, Ternary]) -> None:
    """Stock mlx-lm loads a folder, and each matrix in it is the expected."""
    model, _ = stock_load_model(folder)
    modules = dict(model.named_modules())
    for path, matrix in expected.items():
        module: Any = modules[path]
        arrays = (module.scales.astype(mx.float32), module.biases.astype(mx.float32))
        found = mx.dequantize(module.weight, *arrays, module.group_size, module.bits)
        np.testing.assert_array_equal(np.array(found), matrix.values, err_msg=path)


def test_gguf_scales(tmp_path: Path):
    """One scale a row of TQ1_0, and groups of 64 that are groups of 128."""
    for name, made, group in (
        ("rows", dense_gguf("TQ1_0", one_scale=True), 0),
        ("pairs", dense_gguf("Q2_0", pairs=True), 128),
    ):
        _, found = imported(made.write(tmp_path / f"{name}.gguf"), tmp_path / name)
        assert_matrices(found, made.matrices)
        assert found.group("model.layers.0.mlp.down_proj") == group


def test_what_is_printed(tmp_path: Path):
    """The form stands on one line, however narrow the table is."""
    pack = mlx_pack()
    said = run("import", pack.write(tmp_path / "pack"), "--out", tmp_path / "rows").err
    assert "rows: from MLX 2-bit codes in groups of 128\n" in said
    card = (tmp_path / "rows" / "README.md").read_text()
    assert f"\n- {len(pack.matrices)} ternary matrices are stored as rows of trits\n" in card


GOLDENS = [
    *("mlx2_qwen3_g128", "mlx2_qwen3_g64_mixed", "mlx2_qwen35"),
    *("prism_v1_text_tied", "prism_v2_vl"),
    *("gguf_tq1_llama", "gguf_tq2_qwen3", "gguf_tq1_qwen2", "gguf_tq2_bitnet"),
    *("gguf_q2_0_qwen3", "gguf_q2_0_merged_qwen3", "gguf_pq2_qwen3"),
    *("gguf_ptq1_qwen35", "gguf_q2_0_qwen35_tied"),
    *("bitnet_packed", "bitnet_master_bf16", "falcon_e_packed", "llama_autobitlinear"),
]


def golden_source(name: str) -> tuple[Path, dict[str, Any]]:
    """The source of a case, and its README."""
    folder = require_shared() / "goldens/ternary_models" / name
    file = folder / "model.gguf"
    return file if file.exists() else folder, json.loads((folder / "README.json").read_text())


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("name", GOLDENS)
def test_reference_cases(name: str, tmp_path: Path):
    """Trits and scales have the stated hashes; where stock mlx-lm has the model, its logits too."""
    source, readme = golden_source(name)
    done, found = imported(source, tmp_path / "out")
    expected = {
        path: case for path, case in readme["tensors"].items() if case.get("ternary") is not False
    }
    assert len(found.modules) == len(expected)
    for given, case in expected.items():
        path = next(
            root + given
            for root in ("", "model.", "language_model.")
            if root + given in found.modules
        )
        assert found.group(path) == case["group"]
        assert sha256(found.trits(path)) == case["trits_sha256"], path
        assert sha256(found.scales(path)) == case["scales_sha256"], path
        rotation = found.modules[path].get("rotation")
        assert (rotation is not None) == bool(case.get("block"))
        if rotation is not None:
            assert found.fields["rotations"][rotation]["block"] == case["block"]
    run("verify", done.path)
    if "bitnet" in found.config["model_type"] or "rotations" in found.fields:
        return
    run("export", done.path, "--format", "mlx2", "--out", tmp_path / "back")
    model, _ = stock_load_model(tmp_path / "back")
    model.set_dtype(mx.float32)
    folder = require_shared() / "goldens/ternary_models" / name
    reference: Any = mx.load(str(folder / "expected.safetensors"))
    logits = np.array(model(reference["input_ids"]))
    np.testing.assert_allclose(logits, np.array(reference["logits"]), atol=LOGITS_ATOL, rtol=1e-4)


def test_llama_with_a_head_of_its_own(tmp_path: Path):
    """What is quantized otherwise, and what is not quantized, in one model."""
    pack = mlx_pack(QWEN3 | {"tie_word_embeddings": False})
    rng = np.random.default_rng(1)
    head = random_ternary((300, 256), 128, rng)
    head.trits[0, 0] = 2
    pack.tensors |= affine2("lm_head", head)
    del pack.matrices["lm_head"]
    done, found = imported(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert "lm_head" not in found.modules
    assert found.config["quantization"] == {"group_size": 128, "bits": 2, "mode": "affine"}
    run("export", done.path, "--format", "mlx2", "--out", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "pack")
    stock_load_model(tmp_path / "back")


@pytest.mark.parametrize("form", ["pack", "gguf"])
def test_progress_of_both_passes(form: str, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    if form == "pack":
        mlx_pack().write(source := tmp_path / "pack")
    else:
        dense_gguf("PQ2_0").write(source)
    steps: list[tuple[int, int | None]] = []
    import_model(source, tmp_path / "out", progress=lambda *step: steps.append(step))
    examined = [done for done, total in steps if total is None]
    written = [done for done, total in steps if total is not None]
    assert [total is None for _, total in steps] == [True] * len(examined) + [False] * len(written)
    assert examined == sorted(set(examined)) and written == sorted(set(written))
    # Norms, which are not examined, are all that is missing.
    assert 0.9 * written[-1] < examined[-1] < written[-1] == steps[-1][1]


def test_codes_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A usual pack is examined by its scales; if it is found out, the model is opened once more."""
    examined: list[str] = []
    examine = AffineSource.examine

    def counted(self: AffineSource, start: int, stop: int) -> Any:
        examined.append(self.where)
        return examine(self, start, stop)

    monkeypatch.setattr(AffineSource, "examine", counted)
    pack = mlx_pack()
    import_model(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert not examined
    pack.matrices[UP].trits[3, 5] = 2
    pack.tensors |= affine2(UP, pack.matrices.pop(UP))
    done, found = imported(pack.write(tmp_path / "other"), tmp_path / "kept")
    assert examined and done.notes and UP in done.notes[0]
    assert_matrices(found, pack.matrices)
    assert_rest(found, pack.tensors, pack.matrices)
    with pytest.raises(CheckpointError, match=r"--strict.*up_proj\.weight: not ternary: row 3"):
        import_model(tmp_path / "other", tmp_path / "strict", strict=True)
    assert {path.name for path in tmp_path.iterdir()} == {"pack", "out", "other", "kept"}


def test_codes_that_make_a_scale_larger(tmp_path: Path):
    """Codes 1 and 3 are 0 and twice the scale, so that two equal scales do not merge."""
    pack = mlx_pack(group=64)
    matrix = pack.matrices[UP]
    matrix.scales[:, 1::2] = matrix.scales[:, ::2]
    matrix.trits[7, :64] = 2 * (np.arange(64) % 2)
    pack.tensors |= affine2(UP, matrix)
    _, found = imported(pack.write(tmp_path / "pack"), tmp_path / "out")
    assert found.group(UP) == 64
    assert_matrices(found, pack.matrices)


def test_a_way_without_rows_is_named_where_there_is_one(tmp_path: Path):
    sources = {"dense": dense_gguf("PQ2_0"), "rotated": qwen35_gguf(rotated=True)}
    sources["hybrid"] = qwen35_gguf("PQ2_0")
    for name, made in sources.items():
        source = made.write(tmp_path / f"{name}.gguf")
        (note,) = [n for n in import_model(source, tmp_path / name).notes if "ternary rows" in n]
        assert "--trust-remote-code" in note
        command = ("import", source, "--experts", "affine2", "--out", tmp_path / f"{name}-affine")
        run(*command, code=0 if "--experts affine2" in note else 1)
        assert ("--experts affine2" in note) == (name == "dense")
