"""Ternary models that are refused: options, configs, tensors and fields that are not sound."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx.imports import import_model
from tests.damage import edit_config
from tests.forms import FORMS, build
from tests.goldens import require_shared
from tests.program import assert_refused, run
from tests.tensor_file import Stored, read_stored, stored
from tests.ternary_sources import (
    mlx_pack,
    prism_pack,
)

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "option", [("--dtype", "float16"), ("--bits", "5"), ("--experts", "tq1_0")]
)
def test_options_that_are_not_for_packs(option: tuple[str, str], tmp_path: Path):
    source = mlx_pack().write(tmp_path / "pack")
    assert_refused(run("import", source, *option, "--out", tmp_path / "x", code=1), option[0])


@pytest.mark.parametrize(
    "said", [{"quant_method": "jang"}, {"format": "ternary_packed_26b"}, {"mode": "pq2_0"}]
)
def test_formats_of_other_packers(said: dict[str, str], tmp_path: Path):
    source = mlx_pack().write(tmp_path / "pack")
    edit_config(source, quantization_config=said)
    refused = run("import", source, "--out", tmp_path / "x", code=1)
    assert_refused(refused, next(iter(said.values())), "another packer")


@pytest.mark.parametrize(
    "change",
    [
        {"quantization": {"group_size": 128, "bits": [2]}},
        {"quantization": {"group_size": 0, "bits": 2}},
        {"quantization_config": 3, "model_type": "bitnet"},
        {"quantization_config": {"quant_method": "bitnet", "linear_class": []}},
        {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": "all"}},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "two"},
        {"hidden_size": 0},
        {"vocab_size": None},
        {"model_type": []},
        {"model_type": "none such"},
        {"model_type": "prism_hadamard_qwen35", "modules": [3]},
        {"text_config": []},
        {"rope_theta": "a"},
    ],
)
def test_configs_that_are_not_sound(change: dict[str, Any], tmp_path: Path):
    """One line, and no traceback."""
    source = mlx_pack().write(tmp_path / "pack")
    edit_config(source, **change)
    result = run("import", source, "--out", tmp_path / "x", "--quiet", code=None)
    if result.code:
        assert_refused(result)
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "values", [[[1], [1, 2]], ["a"] * 512, [1.5] * 512, {"a": 1}, None, [2**70] * 512]
)
def test_signs_beside_a_pack_that_are_none(values: Any, tmp_path: Path):
    source = prism_pack().write(tmp_path / "pack")
    said = {"prism.hadamard.sign_mode": "explicit", "prism.hadamard.sign_widths": [512]}
    text = json.dumps(said | {"prism.hadamard.sign_values": values})
    (source / "hadamard.json").write_text(text)
    refused = run("import", source, "--out", tmp_path / "x", code=1)
    assert_refused(refused, "hadamard.json", "sign_values")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("missing", lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight (256,)"),
        ("unknown", lambda tensors: tensors.update({"x.y": tensors["model.norm.weight"]}), "x.y"),
        (
            "shape",
            lambda tensors: tensors.update({"model.norm.weight": stored(np.ones(8, np.float16))}),
            "model.norm.weight: shape (8,), expected (256,)",
        ),
        (
            "bias",
            lambda tensors: tensors.update({f"{UP}.bias": stored(np.ones(512, np.float16))}),
            "up_proj.bias: not a tensor of this model",
        ),
        (
            "signs",
            lambda tensors: tensors.update({f"{UP}.signs": stored(np.ones(256, np.float16))}),
            "up_proj.signs: not a tensor of this model",
        ),
    ],
)
def test_other_tensors_are_checked(
    name: str, change: Callable[[dict[str, Stored]], Any], words: str, tmp_path: Path
):
    pack = mlx_pack()
    change(pack.tensors)
    source = pack.write(tmp_path / name)
    assert_refused(run("import", source, "--out", tmp_path / "x", code=1), words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 96}, "group_size is 96"),
        ({"group_size": "128"}, "group_size is '128'"),
        ({"mode": "mxfp4"}, "bits is 2, expected 4"),
    ],
)
def test_quantizations_that_mlx_does_not_have(change: dict[str, Any], words: str, tmp_path: Path):
    pack = mlx_pack()
    pack.config["quantization"] = pack.config["quantization"] | change
    source = pack.write(tmp_path / "pack")
    assert_refused(run("import", source, "--out", tmp_path / "x", code=1), words)


def test_what_is_imported_already(tmp_path: Path):
    done = import_model(mlx_pack().write(tmp_path / "pack"), tmp_path / "rows")
    refused = run("import", done.path, "--out", tmp_path / "x", code=1)
    assert_refused(refused, "rows: config.json has `ternary`", "nothing to import")


def test_damaged_rows_are_found(tmp_path: Path):
    """`verify` reads the bytes, whatever the list of checksums says."""
    done = import_model(mlx_pack().write(tmp_path / "pack"), tmp_path / "rows")
    file = next(done.path.glob("*.safetensors"))
    tensors = read_stored(file)
    name = "model.layers.0.mlp.up_proj.weight"
    data = bytearray(tensors[name].data)
    data[5] = min(set(range(256)) - {(256 * q + 242) // 243 for q in range(243)})
    at = file.read_bytes().index(tensors[name].data)
    blob = bytearray(file.read_bytes())
    blob[at : at + len(data)] = data
    file.write_bytes(blob)
    sums = json.loads((done.path / "checksums.json").read_text())
    sums["files"][file.name]["sha256"] = hashlib.sha256(blob).hexdigest()
    (done.path / "checksums.json").write_text(json.dumps(sums))
    assert_refused(run("verify", done.path, code=1), name, "byte")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "tq1_0_rows"}, "format 'tq1_0_rows'"),
        ({"group_size": 32}, "group_size is 32"),
        ({"modules": {}}, "1 to 100000 modules"),
        ({"modules": {"model.embed_tokens": {}}}, "in_features is None"),
        ({"modules": {"model.embed_tokens": {"in_features": 256, "rotation": 0}}}, "no rotation"),
        ({"modules": {"model.embed_tokens": {"in_features": 256}}}, "ternary does not list it"),
    ],
)
def test_fields_that_are_not_sound(change: dict[str, Any], words: str, tmp_path: Path):
    done = import_model(mlx_pack().write(tmp_path / "pack"), tmp_path / "rows")
    fields = json.loads((done.path / "config.json").read_text())["ternary"]
    edit_config(done.path, ternary=fields | change)
    assert_refused(run("info", done.path, code=1), words)


def test_no_overlay_goes_on_a_ternary_model(tmp_path: Path, overlay_folder: Path):
    done = import_model(mlx_pack().write(tmp_path / "pack"), tmp_path / "rows")
    refused = run("convert", overlay_folder, "--base", done.path, "--out", tmp_path / "x", code=1)
    assert_refused(refused, "ternary model")


@pytest.fixture
def overlay_folder(tmp_path: Path) -> Path:
    return build(tmp_path / "overlay", next(iter(FORMS))).path


@pytest.mark.slow
def test_files_that_are_refused(tmp_path: Path):
    """Each of the listed bad inputs: one line that names what is wrong, and nothing is written."""
    here = require_shared() / "goldens/ternary_models/refuse"
    items = json.loads((here / "refuse.json").read_text())["items"]
    wrong = []
    for item in items:
        source = materialized(item, here, tmp_path / "in")
        out = tmp_path / "out"
        result = run("import", source, "--out", out, "--quiet", code=None)
        line = result.err.lower()
        named = all(word in line for word in item["message_should_name"])
        if result.code != 1 or line.count("\n") != 1 or not named or out.exists():
            wrong.append((item["id"], result))
    assert len(items) == 65 and not wrong


def materialized(item: dict[str, Any], here: Path, out: Path) -> Path:
    """The path of a bad input; see `refuse/materialize.py`, which makes it from a good one."""
    if "path" in item:
        return here / item["path"]
    folder = out / item["id"]
    folder.mkdir(parents=True)
    for path in (here / item["base"]).iterdir():
        shutil.copyfile(path, folder / path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "copytree", lambda *_, **__: None)
        patch.syspath_prepend(str(here))
        patch.setattr(sys, "dont_write_bytecode", True)
        import materialize  # type: ignore[import-not-found]

        return Path(materialize.build(item, here, out))
