"""Models whose own matrices are ternary: loaded and run, against a reference that shares no code
with the package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_lm_load_model

from outlier_mlx.engine import loading
from outlier_mlx.engine.loading import suited_dtype
from outlier_mlx.engine.needs import needs_of
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.runtime.ternary_layers import (
    TernaryEmbedding,
    TernaryLinear,
)
from outlier_mlx.tiers.verify import verify_tier
from outlier_mlx.writing.bundle import bundle
from tests.damage import add_tensor, drop_tensor, edit_config, replace_tensor
from tests.engine import as_array, forward, greedy_cached
from tests.goldens import LOGITS_ATOL, LOGITS_RTOL
from tests.library import Library
from tests.marks import slow_but
from tests.metal import Metal
from tests.program import assert_refused, run
from tests.reference import Array
from tests.serving import running
from tests.ternary_models import BITNET, CODE, LLAMA, QWEN2, QWEN3, QWEN35, ROTATED, Ternary
from tests.test_stored_model import refused_by_both, sign_again

load_model: Any = loading.load_model
PROMPT = [5, 17, 101, 3, 64, 220, 9, 77, 41]
CASES: dict[str, dict[str, Any]] = {
    "qwen3, groups, tied": {"config": QWEN3, "group": 128},
    "qwen3, bfloat16": {"config": QWEN3, "group": 64, "dtype": "BF16"},
    "qwen2, odd widths, biases": {"config": QWEN2},
    "llama, plain embedding": {"config": LLAMA, "group": 128, "plain": ["embed_tokens"]},
    "bitnet": {"config": BITNET, "dtype": "BF16", "plain": ["embed_tokens"]},
    "bitnet, silu": {"config": BITNET | {"hidden_act": "silu"}, "group": 64},
    "qwen3_5": {"config": QWEN35, "group": 128, "seed": 3},
    "qwen3_5, rotated": ROTATED,
    "qwen3_5, no signs": {"config": QWEN35, "group": 64, "block": 128, "signed": False},
    "qwen2, rotated": {"config": QWEN2, "block": 2},
}


# A kernel is compiled for each of their shapes.
FEW = ("qwen3, groups, tied", "qwen2, odd widths, biases")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, library: Library) -> Ternary:
    return library.ternary(**CASES[request.param])


@pytest.fixture
def rotated(library: Library) -> Ternary:
    return library.ternary(**ROTATED)


@pytest.fixture
def folder(rotated: Ternary, tmp_path: Path) -> Path:
    return shutil.copytree(rotated.folder, tmp_path / "model")


def assert_logits(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, atol=LOGITS_ATOL, rtol=LOGITS_RTOL)


def cosines(found: Array, expected: Array) -> Array:
    dot = (found * expected).sum(axis=-1)
    result: Array = dot / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
    return result


# What is computed


def test_logits_and_greedy_tokens(case: Ternary):
    model, _ = load_model(case.folder)
    logits = forward(model, PROMPT)
    assert logits.dtype == np.float32
    assert_logits(logits, case.logits(PROMPT))
    assert greedy_cached(model, PROMPT, 3, chunks=[4])[0] == case.greedy(PROMPT, 3)


@pytest.mark.parametrize("name", slow_but(FEW, CASES))
def test_logits_through_the_kernels(name: str, library: Library, metal: Metal):
    """In the emulator, activations are float32 like the CPU's."""
    case = library.ternary(**CASES[name])
    model, _ = load_model(case.folder)
    assert_logits(forward(model, PROMPT), case.logits(PROMPT))
    assert set(metal.names) <= {"tq1_0_linear", "tq1_0_rotate"}
    linears = [m for m in model.modules() if isinstance(m, TernaryLinear)]
    tied = isinstance(embedding(model), TernaryEmbedding) and not hasattr(text(model), "lm_head")
    assert metal.names.count("tq1_0_linear") == len(linears) + tied
    assert all(m.prepared is None for m in linears)


@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.995), ("bfloat16", 0.99)])
def test_half_precision(case: Ternary, dtype: str, least: float):
    model, _ = load_model(case.folder, dtype=dtype)
    logits = model(mx.array([PROMPT]))
    assert logits.dtype == getattr(mx, dtype)
    assert cosines(as_array(logits[0]), case.logits(PROMPT)).min() >= least


def test_a_rotation_is_computed_once_for_all_that_read_the_same(rotated: Ternary, metal: Metal):
    """A delta net has two inputs, of which one is rotated here; attention and FFN have two each;
    the embedding is rotated back, and forward as the head."""
    model, _ = load_model(rotated.folder)
    metal.clear()
    forward(model, PROMPT)
    assert metal.names.count("tq1_0_rotate") == (1 + 2) + (2 + 2) + 1 + 1


def test_a_long_prompt_is_converted_for_mlx(library: Library, metal: Metal):
    case = library.ternary(**CASES["qwen2, odd widths, biases"])
    model, _ = load_model(case.folder)
    tokens = PROMPT * 4
    assert_logits(forward(model, tokens), case.logits(tokens))
    assert set(metal.names) == {"tq1_0_to_affine2"}


def test_everything_in_the_dtypes_that_are_stored(library: Library, monkeypatch: Any):
    """On a GPU nothing is converted: vectors have the dtype of the embedding's scales."""
    case = library.ternary(**CASES["qwen3, bfloat16"])
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    model, _ = load_model(case.folder)
    assert embedding(model)(mx.array([3])).dtype == mx.bfloat16
    assert model(mx.array([PROMPT])).dtype == mx.bfloat16
    case = library.ternary(config=BITNET | {"dtype": "bfloat16"})
    model, _ = load_model(case.folder)
    assert embedding(model).scales.dtype == mx.float32
    assert embedding(model)(mx.array([3])).dtype == mx.bfloat16


def text(model: Any) -> Any:
    return getattr(model, "language_model", model)


def embedding(model: Any) -> Any:
    return text(model).model.embed_tokens


def test_a_model_keeps_no_input(rotated: Ternary):
    model, _ = load_model(rotated.folder)
    forward(model, PROMPT)
    shared = {m.rotation for m in model.modules() if getattr(m, "rotation", None) is not None}
    assert len(shared) == 5 and all(rotation._last is None for rotation in shared)


# Elsewhere


def test_the_model_s_own_code_computes_the_same(case: Ternary):
    model, _ = mlx_lm_load_model(case.folder, trust_remote_code=True)
    ours, _ = load_model(case.folder)
    assert type(model).__module__ == "custom_model" and type(ours).__module__ != "custom_model"
    np.testing.assert_array_equal(forward(model, PROMPT), forward(ours, PROMPT))


def test_mlx_lm_runs_no_code_unasked(rotated: Ternary):
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm_load_model(rotated.folder)


@pytest.mark.slow
def test_commands(rotated: Ternary, tmp_path: Path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 20)
    where = rotated.folder
    assert run("generate", where, "--prompt", "ab", "--max-tokens", 3).out
    assert "perplexity" in run("perplexity", where, "--text", tmp_path / "text.txt").out
    assert "whole" in run("verify", where).both
    assert run("chat", where, "--max-tokens", 3, input="hello\n").out
    assert "tg4" in run("bench", where, "-p", 8, "-g", 4, "-n", 1).out


def test_the_server_answers_several_at_once(library: Library):
    """Of one batch: inputs that several layers read belong to one call of their block."""
    case = library.ternary(**ROTATED)
    with running(case.folder, max_tokens=8) as server, ThreadPoolExecutor(3) as pool:
        asked = [{"temperature": 0, "max_tokens": n} for n in (8, 5, 8)]
        replies = [*pool.map(lambda options: server.chat(**options), asked)]
    texts = [reply.choices[0].message.content for reply in replies]
    assert texts[0] == texts[2] and texts[0].startswith(texts[1].rstrip("\ufffd"))


# Refused


def test_other_code_is_refused(folder: Path):
    (folder / CODE).write_text(bundle(CODE) + "\nimport os\n")
    with pytest.raises(CheckpointError, match=rf"{CODE}: not what this version"):
        verify_signed(folder)
    (folder / CODE).write_text(bundle())
    with pytest.raises(CheckpointError, match=rf"{CODE}: not what this version"):
        verify_signed(folder)
    edit_config(folder, model_file="outlier_moe.py")
    with pytest.raises(CheckpointError, match=r"model_file is 'outlier_moe\.py'"):
        verify_signed(folder)
    with pytest.raises(CheckpointError, match="needs its own model code"):
        load_model(folder)


def verify_signed(folder: Path) -> None:
    sign_again(folder)
    verify_tier(folder)


ROTATION = {"block": 512, "width": 512, "signed": True}
QKV = "language_model.model.layers.0.linear_attn.in_proj_qkv"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: drop_tensor(f, f"{QKV}.scales"), "scales is missing"),
        (
            lambda f: replace_tensor(f, f"{QKV}.weight", mx.zeros((8, 8), mx.uint8)),
            "weight.*expected",
        ),
        (lambda f: drop_tensor(f, "language_model.model.norm.weight"), "norm.weight.*is missing"),
        (lambda f: add_tensor(f, "language_model.x", np.ones(3)), "not a tensor of this model"),
        (lambda f: drop_tensor(f, "rotations.0.signs"), "rotations.0.signs is missing"),
        (
            lambda f: edit_ternary(f, "rotations", [{"block": 3, "width": 512, "signed": True}]),
            "block",
        ),
        (
            lambda f: edit_ternary(f, "rotations", [ROTATION | {"block": 1}]),
            "rotation 0: width 512, block 1,",
        ),
        (lambda f: edit_ternary(f, "rotations", [ROTATION | {"signed": "yes"}]), "signed 'yes'"),
        (
            lambda f: replace_tensor(f, "rotations.0.signs", np.ones(1024, np.int8)),
            r"rotations\.0\.signs: expected signs, I8 \(512,\)",
        ),
        (
            lambda f: replace_tensor(f, "rotations.0.signs", np.zeros(512, np.int8)),
            r"rotations\.0\.signs: expected signs, I8 \(512,\), 1 or -1",
        ),
        (lambda f: edit_ternary(f, "version", 1), "version 1, expected 2"),
        (lambda f: edit_ternary(f, "version", 2.0), r"version 2\.0, expected 2"),
        (lambda f: edit_ternary(f, "pack_schema_version", 9), "pack_schema_version 9"),
        (lambda f: edit_ternary(f, "pack_schema_version", [1]), r"pack_schema_version \[1\]"),
        (lambda f: add_module(f, "../../x"), r"modules: '\.\./\.\./x' is not the path of a module"),
        (lambda f: add_module(f, "x" * 5000), r"modules: 'x+\.\.\. is not the path of a module"),
        (
            lambda f: edit_ternary(f, "modules", dict.fromkeys(map(str, range(100_001)), 0)),
            "1 to 100000 modules",
        ),
        (lambda f: edit_config(f, model_type="outlier_moe"), "mlx-lm cannot make a model"),
        (
            lambda f: add_tensor(f, f"{QKV}.bias", np.ones(512, np.float16)),
            "in_proj_qkv.bias: not a tensor of this model",
        ),
        (
            lambda f: add_tensor(f, f"{QKV}.biases", np.ones((512, 4), np.float16)),
            "in_proj_qkv.biases: not a tensor of this model",
        ),
        (lambda f: edit_text(f, num_hidden_layers=10**9), "layers, but only"),
    ],
)
def test_what_is_wrong_is_refused_by_both(
    folder: Path, change: Callable[[Path], object], words: str
):
    change(folder)
    refused_by_both(folder, words)


def test_rotations_that_no_module_has_are_refused(folder: Path):
    """A file would not bound their memory."""
    config = read(folder)
    many = [*config["ternary"]["rotations"], {"block": 2, "width": 1 << 24, "signed": False}]
    edit_ternary(folder, "rotations", many)
    refused_by_both(folder, "rotation 1: no module has it")


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def edit_ternary(folder: Path, name: str, value: object) -> None:
    edit_config(folder, ternary=read(folder)["ternary"] | {name: value})


def add_module(folder: Path, path: str) -> None:
    modules = read(folder)["ternary"]["modules"]
    edit_ternary(folder, "modules", modules | {path: {"in_features": 512, "group_size": 128}})


def test_a_model_that_does_not_load_is_not_exported(folder: Path, tmp_path: Path):
    drop_tensor(folder, "language_model.model.norm.weight")
    out = tmp_path / "out"
    refused = run("export", folder, "--format", "mlx2", "--out", out, code=1)
    assert_refused(refused, "language_model.model.norm.weight", "is missing")
    assert not out.exists()


def test_the_format_that_a_ternary_model_is_exported_in(rotated: Ternary, tmp_path: Path):
    refused = run("export", rotated.folder, "--out", tmp_path / "out", code=1)
    assert_refused(refused, "but a ternary model: --format mlx2")
    done = run("export", rotated.folder, "--format", "mlx2", "--out", tmp_path / "out")
    assert "mlx2, " in done.err and "base" not in done.err


def edit_text(folder: Path, **fields: object) -> None:
    edit_config(folder, text_config=read(folder)["text_config"] | fields)


def test_modules_that_the_model_does_not_have(folder: Path):
    ternary = read(folder)["ternary"]
    modules = {
        name.replace("in_proj_z", "in_proj_y"): how for name, how in ternary["modules"].items()
    }
    edit_ternary(folder, "modules", modules)
    refused_by_both(folder, "is missing")
    edit_text(folder, intermediate_size=256)
    edit_ternary(folder, "modules", ternary["modules"])
    refused_by_both(folder, r"rows of trits \(512, 512\), expected \(256, 512\)")


def test_no_overlay_is_put_on_a_ternary_model(folder: Path, library: Library, tmp_path: Path):
    """Its own form, and the packs that it may have come from."""
    overlay, out = library.overlay().path, tmp_path / "tier"
    args = ("convert", overlay, "--base", folder, "--out", out)
    assert_refused(run(*args, code=1), "a ternary model; no overlay can be put on it")
    (folder / "config.json").write_text(json.dumps({"model_type": "prism_hadamard_qwen35"}))
    assert_refused(run(*args, code=1), "a ternary model; no overlay can be put on it")
    pack = QWEN2 | {"quantization": {"bits": 2, "group_size": 128}}
    (folder / "config.json").write_text(json.dumps(pack))
    assert_refused(run(*args, code=1), "a quantized model; the base must not be quantized")
    assert not out.exists()


# Dtypes and memory


def test_squared_activations_are_kept_out_of_float16(library: Library, monkeypatch: Any):
    case = library.ternary(config=BITNET | {"dtype": "bfloat16"})
    monkeypatch.setattr("outlier_mlx.engine.loading.chip_name", lambda: "Apple M1")
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert suited_dtype(case.folder, case.config) is None
    assert suited_dtype(case.folder, case.config | {"hidden_act": "silu"}) == "float16"
    with pytest.warns(CheckpointWarning, match="may overflow float16"):
        load_model(case.folder, dtype="float16")


def test_memory_of_a_ternary_model(rotated: Ternary):
    stored = sum(t.stat().st_size for t in rotated.folder.glob("*.safetensors"))
    gpu = needs_of(rotated.folder, on_cpu=False).weights
    assert stored - 8192 <= gpu <= stored
    model, _ = load_model(rotated.folder)
    flat: Any = tree_flatten(model.parameters())
    arrays = [value.nbytes for _, value in flat]
    copies = [
        a.nbytes for m in model.modules() if getattr(m, "prepared", None) for a in m.prepared.arrays
    ]
    assert sum(arrays) + sum(copies) <= needs_of(rotated.folder, on_cpu=True).weights
