"""Models whose own matrices are ternary: loaded and run, against a reference that shares no code
with the package."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model as mlx_lm_load_model

from outlier_mlx.engine.loading import load_model, suited_dtype
from outlier_mlx.engine.memory import Budget, needs_of
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.runtime import ternary_layers
from outlier_mlx.runtime.ternary_layers import (
    Rotation,
    RotationSigns,
    TernaryEmbedding,
    TernaryLinear,
    looked_up,
)
from outlier_mlx.tiers.verify import verify_tier
from outlier_mlx.writing.bundle import bundle
from tests.damage import drop_tensor, edit_config, replace_tensor
from tests.engine import as_array, forward, greedy_cached, pack_rows
from tests.goldens import LOGITS_ATOL, LOGITS_RTOL
from tests.library import Library
from tests.metal import Metal
from tests.program import assert_refused, run
from tests.reference import Array
from tests.ternary_models import BITNET, CODE, LLAMA, QWEN2, QWEN3, QWEN35, Ternary, tiled
from tests.test_stored_model import refused_by_both, sign_again
from tests.test_training import loss_of

PROMPT = [5, 17, 101, 3, 64, 220, 9, 77, 41]
ROTATED: dict[str, Any] = {"config": QWEN35, "group": 128, "block": 512}
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


def test_logits_through_the_kernels(case: Ternary, metal: Metal):
    """A prompt, and a step with a cache; the emulator's activations are float32, like the CPU's."""
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


# Layers


@pytest.mark.parametrize(("wide", "group"), [(80, 0), (321, 0), (448, 64), (128, 128)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_looking_up(wide: int, group: int, shape: tuple[int, ...]):
    rng = np.random.default_rng(wide)
    trits = rng.integers(-1, 2, (13, wide), dtype=np.int8)
    scales = rng.uniform(0.5, 2, (13, wide // (group or wide))).astype(np.float16)
    stored = mx.array(tiled(scales)) if group else mx.array(scales[:, 0].astype(np.float32))
    ids = rng.integers(0, 13, shape)
    found = looked_up(mx.array(pack_rows(trits)), stored, mx.array(ids), wide)
    expected = trits * np.repeat(scales.astype(np.float32), group or wide, axis=1)
    np.testing.assert_array_equal(found, expected[ids])


def test_vectors_are_rounded_before_and_after_they_are_rotated_back():
    rng = np.random.default_rng(0)
    signs = RotationSigns(512)
    signs.signs = mx.array(rng.choice([-1.0, 1.0], 512).astype(np.float16))
    layer = TernaryEmbedding(9, 512, 0, rotation=Rotation(signs, 512))
    trits = rng.integers(-1, 2, (9, 512), dtype=np.int8)
    scales = rng.uniform(0.9, 1.1, 9).astype(np.float32)
    layer.load_weights([("weight", mx.array(pack_rows(trits))), ("scales", mx.array(scales))])
    layer.dtype = mx.float16
    rows = (trits * scales[:, None]).astype(np.float16)  # not the float32 products
    blocks = mx.hadamard_transform(mx.array(rows).astype(mx.float32), scale=512**-0.5)
    expected = (blocks * signs.signs.astype(mx.float32)).astype(mx.float16)
    np.testing.assert_array_equal(layer(mx.arange(9)), expected)


# The shared input


class Counted:
    """Rotations of an array by its sum, so that a stale one would show."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def rotate(x: mx.array, *_: Any, **__: Any) -> mx.array:
            self.count += 1
            return x + 1000

        monkeypatch.setattr(ternary_layers, "rotate", rotate)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def rotation_of(readers: int) -> Rotation:
    rotation = Rotation(RotationSigns(4), 4)
    assert [rotation.add_reader() for _ in range(readers)] == list(range(readers))
    return rotation


def test_readers_of_one_input_share_it(counted: Counted):
    rotation, x, other = rotation_of(3), mx.zeros(4), mx.zeros(4)
    first = [rotation(x, reader, False) for reader in range(3)]
    assert counted.count == 1 and first[0] is first[1] is first[2]
    rotation(other, 0, False)
    rotation(x, 1, False)  # another input
    assert counted.count == 3


def test_an_input_that_was_changed_in_place_is_rotated_again(counted: Counted):
    rotation, x = rotation_of(2), mx.zeros(4)
    rotation(x, 0, False)
    x += 1
    assert float(rotation(x, 0, False)[0]) == 1001
    assert float(rotation(x, 1, False)[0]) == 1001
    assert counted.count == 2


def test_nothing_is_kept_once_all_have_read_or_the_input_is_gone(counted: Counted):
    rotation, x = rotation_of(2), mx.zeros(4)
    kept = weakref.ref(rotation(x, 0, False))
    assert kept() is not None
    rotation(x, 1, False)
    assert kept() is None
    kept = weakref.ref(rotation(x, 1, False))
    del x
    assert kept() is None


def test_threads_do_not_get_each_other_s_inputs(counted: Counted):
    rotation, wrong = rotation_of(3), []

    def read(value: float) -> None:
        for _ in range(300):
            x = mx.full(4, value)
            wrong.extend(r for r in range(3) if float(rotation(x, r, False)[0]) != value + 1000)

    threads = [threading.Thread(target=read, args=(float(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_model_keeps_no_input(rotated: Ternary):
    model, _ = load_model(rotated.folder)
    forward(model, PROMPT)
    shared = {m.rotation for m in model.modules() if getattr(m, "rotation", None) is not None}
    assert len(shared) == 5 and all(rotation._last is None for rotation in shared)


# Training and conversions


def test_gradients_are_those_of_the_dense_weights(library: Library):
    """Also through a rotation that several layers share."""
    case = library.ternary(**ROTATED)
    model, _ = load_model(case.folder)
    mlp, prefix = model.layers[0].mlp, "language_model.model.layers.0.mlp"
    w = {
        n: mx.array(case.weights[f"{prefix}.{n}_proj.weight"], mx.float32)
        for n in ("gate", "up", "down")
    }
    mx.random.seed(0)
    x, against = mx.random.normal((2, 5, 512))

    def dense(x: mx.array) -> mx.array:
        y = (nn.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T
        return (y * against).sum()

    expected = mx.grad(dense)(x)
    for mode in (True, False):
        mlp.train(mode)
        found = mx.grad(lambda x: (mlp(x) * against).sum())(x)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def with_lora(folder: Path) -> Any:
    model, _ = load_model(folder)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    return model


@pytest.fixture
def attention(library: Library) -> Ternary:
    """Rotated, and quickly compiled."""
    return library.ternary(config=QWEN3 | {"num_hidden_layers": 1}, group=64, block=64)


def test_lora_trains_under_compile_and_changes_no_trit(attention: Ternary):
    model = with_lora(attention.folder)
    before = forward(model, PROMPT)
    np.testing.assert_array_equal(before, forward(load_model(attention.folder)[0], PROMPT))
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert names and all("lora" in name for name in names)
    assert "model.layers.0.self_attn.q_proj.lora_b" in names
    packed = frozen(model)
    model.train()
    optimizer = optim.Adam(3e-3)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_of)(model, tokens)
        optimizer.update(model, gradients)
        return loss

    tokens, losses = mx.array([PROMPT]), []
    for _ in range(4):
        losses.append(float(step(tokens)))
        mx.eval(state)
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    assert np.abs(forward(model, PROMPT) - before).max() > 0.1
    for name, value in frozen(model).items():
        np.testing.assert_array_equal(value, packed[name])


def frozen(model: Any) -> dict[str, Array]:
    flat: Any = tree_flatten(model.parameters())
    leaves = ("linear.weight", "linear.scales", "signs")
    return {name: np.array(value) for name, value in flat if name.endswith(leaves)}


def test_mlx_lm_trains_adapters_that_load_again(attention: Ternary, tmp_path: Path):
    model = with_lora(attention.folder)
    adapters, data = tmp_path / "adapters.safetensors", [(PROMPT, 0)] * 2
    args = TrainingArgs(
        batch_size=1,
        iters=2,
        val_batches=1,
        steps_per_report=100,
        steps_per_eval=100,
        steps_per_save=100,
        max_seq_length=64,
        adapter_file=str(adapters),
        grad_checkpoint=True,
    )
    train(model, optim.Adam(3e-3), data, data, args)
    model.eval()
    again = with_lora(attention.folder)
    again.load_weights(str(adapters), strict=False)
    np.testing.assert_array_equal(forward(again, PROMPT), forward(model, PROMPT))
    lora = model.layers[0].mlp.gate_proj
    with pytest.raises(ValueError, match="cannot be fused"):
        lora.fuse()


def test_who_unfreezes_trains_no_trits(rotated: Ternary):
    model, _ = load_model(rotated.folder)
    for module in model.modules():
        module.unfreeze(recurse=False)
    model.unfreeze()
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert names and not any(
        ".scales" in n or "signs" in n or "_proj.weight" in n
        for n in names
        if "in_proj_a" not in n and "in_proj_b" not in n
    )


def test_a_compiled_model_is_the_same(attention: Ternary):
    model, _ = load_model(attention.folder)
    before = forward(model, PROMPT)
    for inputs in ([model.state], None):
        compiled = mx.compile(lambda tokens: model(tokens), inputs=inputs)
        for _ in range(2):
            np.testing.assert_allclose(compiled(mx.array([PROMPT]))[0], before, atol=2e-4)
    gc.collect()
    np.testing.assert_array_equal(forward(model, PROMPT), before)


def test_scales_and_signs_stay_as_they_are(rotated: Ternary):
    model, _ = load_model(rotated.folder)
    model.set_dtype(mx.bfloat16)
    layer = model.layers[0].mlp.gate_proj
    assert layer.scales.dtype == mx.float16 and model.rotations[0].signs.dtype == mx.float16
    assert model(mx.array([PROMPT])).dtype == mx.bfloat16


# Elsewhere


def test_the_model_s_own_code_computes_the_same(case: Ternary):
    model, _ = mlx_lm_load_model(case.folder, trust_remote_code=True)
    ours, _ = load_model(case.folder)
    assert type(model).__module__ == "custom_model" and type(ours).__module__ != "custom_model"
    np.testing.assert_array_equal(forward(model, PROMPT), forward(ours, PROMPT))


def test_mlx_lm_runs_no_code_unasked(rotated: Ternary):
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm_load_model(rotated.folder)


def test_commands(rotated: Ternary, tmp_path: Path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 20)
    where = rotated.folder
    assert run("generate", where, "--prompt", "ab", "--max-tokens", 3).out
    assert "perplexity" in run("perplexity", where, "--text", tmp_path / "text.txt").out
    assert "whole" in run("verify", where).both
    assert run("chat", where, "--max-tokens", 3, input="hello\n").out
    assert "tg4" in run("bench", where, "-p", 8, "-g", 4, "-n", 1).out


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
        (lambda f: drop_tensor(f, "rotations.0.signs"), "rotations.0.signs is missing"),
        (
            lambda f: edit_ternary(f, "rotations", [{"block": 3, "width": 512, "signed": True}]),
            "block",
        ),
        (lambda f: edit_ternary(f, "version", 1), "version 1, expected 2"),
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


def edit_text(folder: Path, **fields: object) -> None:
    edit_config(folder, text_config=read(folder)["text_config"] | fields)


def test_modules_that_the_model_does_not_have(folder: Path):
    ternary = read(folder)["ternary"]
    modules = {
        name.replace("in_proj_z", "in_proj_y"): how for name, how in ternary["modules"].items()
    }
    edit_ternary(folder, "modules", modules)
    with pytest.raises(CheckpointError, match="is missing"):
        load_model(folder)
    edit_text(folder, hidden_size=256)
    edit_ternary(folder, "modules", ternary["modules"])
    with pytest.raises(CheckpointError, match="rows of 512 weights"):
        load_model(folder)


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
    gpu = needs_of(rotated.folder, Budget(1, "this Mac's GPU")).weights
    assert stored - 8192 <= gpu <= stored
    model, _ = load_model(rotated.folder)
    arrays = [value.nbytes for _, value in tree_flatten(model.parameters())]
    copies = [
        a.nbytes for m in model.modules() if getattr(m, "prepared", None) for a in m.prepared.arrays
    ]
    assert sum(arrays) + sum(copies) <= needs_of(rotated.folder, Budget(1, "this machine")).weights
