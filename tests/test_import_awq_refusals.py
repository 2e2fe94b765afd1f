"""AWQ models that are refused, and odd values that do no harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.utils import load_model as stock_load_model

from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports import import_model
from outlier_mlx.imports.awq import open_awq_model
from tests.awq_builder import Awq, Built, write_awq
from tests.damage import REMOVE, add_tensor, drop_tensor, edit_config, replace_tensor
from tests.folders import copy_writable
from tests.importing import apart, assert_same_weights, stored_weights
from tests.tensor_file import read_stored, write_stored


def without(*names: str) -> Any:
    def change(folder: Path) -> None:
        for name in names:
            drop_tensor(folder, name)

    return change


def unquantized(module: str, shape: tuple[int, int], leaf: str = "weight") -> Any:
    """A module that is quantized, unquantized (or the other way around)."""

    def change(folder: Path) -> None:
        held = [n for n in read_stored(folder / "model.safetensors") if n.startswith(f"{module}.")]
        without(*held)(folder)
        kind = np.int32 if leaf == "qweight" else np.float16
        add_tensor(folder, f"{module}.{leaf}", np.zeros(shape, kind))

    return change


def settings_of(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        old = json.loads((folder / "config.json").read_text())["quantization_config"]
        new = {k: v for k, v in (old | changes).items() if v is not REMOVE}
        edit_config(folder, quantization_config=new)

    return change


def as_gptq(folder: Path) -> None:
    """Rows in / 8, columns out: packed along the input."""
    value = np.zeros((8, 64), np.int32)
    replace_tensor(folder, "model.layers.0.self_attn.q_proj.qweight", value)


def put(name: str, value: Any, dtype: str | None = None) -> Any:
    return lambda folder: replace_tensor(folder, name, value, dtype)


Q = "model.layers.0.self_attn.q_proj"
W1 = "model.layers.1.block_sparse_moe.experts.1.w1"
REFUSED = {
    "no zeros": (without(f"{W1}.qzeros"), rf"{W1}\.qzeros is missing, but .* has zero_point"),
    "no scales": (without(f"{Q}.scales"), rf"{Q}\.scales is missing"),
    "no weight": (
        without(f"{Q}.qweight"),
        rf"awq: the tensor {Q}\.weight \(or \.qweight\) is missing",
    ),
    "no norm": (without("model.norm.weight"), r"model\.norm\.weight .*is missing"),
    "scales of another shape": (
        put(f"{Q}.scales", np.ones((1, 64), np.float16)),
        rf"{Q}\.scales: F16 \(1, 64\), expected F16 \(2, 64\)",
    ),
    "scales of another type": (
        put(f"{Q}.scales", np.ones((2, 64)), "F32"),
        rf"{Q}\.scales: F32 \(2, 64\), expected F16",
    ),
    "zeros of another shape": (
        put(f"{Q}.qzeros", np.ones((2, 64), np.int32)),
        rf"{Q}\.qzeros: I32 \(2, 64\), expected I32 \(2, 8\)",
    ),
    "a weight of another shape": (
        put(f"{Q}.qweight", np.ones((32, 8), np.int32)),
        rf"{Q}\.qweight: I32 \(32, 8\), expected I32 \(64, 8\)",
    ),
    "NaN": (put(f"{Q}.scales", np.full((2, 64), np.nan), "F16"), rf"{Q}\.scales: holds NaN"),
    "columns": (
        lambda folder: edit_config(folder, intermediate_size=100),
        r"w1\.qweight: 100 columns, expected a multiple of 8",
    ),
    "GPTQ by its order": (
        lambda folder: add_tensor(folder, f"{Q}.g_idx", np.zeros(64, np.int32)),
        rf"{Q}\.g_idx: a tensor of GPTQ",
    ),
    "GPTQ by its shape": (as_gptq, r"q_proj\.qweight: .*GPTQ"),
    "GPTQ by its name": (settings_of(quant_method="gptq"), "quant_method gptq"),
    **{
        f"version {name}": (settings_of(version=name), f"version {name} .*only gemm")
        for name in ("gemv", "gemv_fast", "marlin", "exllama")
    },
    "an unknown version": (settings_of(version="new"), r"version new \(unknown\)"),
    "backend": (settings_of(backend="llm-awq"), "backend llm-awq"),
    "bits as text": (settings_of(bits="4"), "bits '4', expected 4"),
    "8 bits": (settings_of(bits=8), "bits 8, expected 4"),
    "no bits": (settings_of(bits=REMOVE), "bits None, expected 4"),
    "groups of 16": (settings_of(group_size=16), "group_size 16, expected"),
    "groups that do not fit": (settings_of(group_size=128), "groups of 128 do not fit 64 inputs"),
    "zero_point": (settings_of(zero_point=1), "zero_point 1"),
    "nothing said": (
        lambda folder: edit_config(folder, quantization_config=REMOVE),
        "config.json has no quantization_config",
    ),
    "MLX": (lambda folder: edit_config(folder, quantization={"bits": 4}), "already an MLX model"),
    "an expert is missing": (
        without(f"{W1}.qweight", f"{W1}.qzeros", f"{W1}.scales"),
        rf"{W1}\.weight \(or \.qweight\) is missing",
    ),
    "one expert too many": (
        lambda folder: edit_config(folder, num_local_experts=1, num_experts_per_tok=1),
        r"experts\.1\.w1\.qweight: unknown tensor for this model|gate.*expected.*\(1, 64\)",
    ),
    "more experts a token than there are": (
        lambda folder: edit_config(folder, num_experts_per_tok=3),
        "num_experts_per_tok is 3, of 2",
    ),
    "an unknown tensor": (
        lambda folder: add_tensor(folder, "model.extra.weight", np.zeros(3, np.float16)),
        r"model\.extra\.weight: unknown tensor for this model",
    ),
    "a bias": (
        lambda folder: add_tensor(folder, f"{Q}.bias", np.zeros(64, np.float16)),
        rf"{Q}\.bias: unknown tensor",
    ),
    "both forms": (
        lambda folder: add_tensor(folder, f"{Q}.weight", np.zeros((64, 64), np.float16)),
        rf"{Q}\.weight: unknown tensor",
    ),
    "the same twice": (
        lambda folder: add_tensor(
            folder, "model.layers.0.mlp.gate.weight", np.zeros((2, 64), np.float16)
        ),
        "duplicate tensor: .* under another name",
    ),
    "an expert that is not quantized": (
        unquantized(W1, (96, 64)),
        rf"{W1}\.weight: not quantized, but other experts",
    ),
    "quantized embeddings": (
        unquantized("model.embed_tokens", (64, 20), "qweight"),
        "linear layers only",
    ),
    "another family": (lambda folder: edit_config(folder, model_type="gpt2"), "model_type 'gpt2'"),
    "heads": (lambda folder: edit_config(folder, head_dim=32), "head_dim 32 is not hidden_size"),
    "RoPE": (
        lambda folder: edit_config(folder, rope_scaling={"type": "linear", "factor": 2}),
        "rope_scaling 'linear', expected none",
    ),
    "contradiction": (
        lambda folder: edit_config(folder, rope_parameters={"rope_theta": 5.0}),
        "rope_theta is 10000.0, but",
    ),
    "activation": (lambda folder: edit_config(folder, hidden_act="gelu"), "hidden_act 'gelu'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    "pickled": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickled weights are not supported",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no .*safetensors and no .*gguf files",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return write_awq(tmp_path_factory.mktemp("awq") / "sound")


@pytest.mark.parametrize(("damage", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(damage: Any, words: str, sound: Built, tmp_path: Path) -> None:
    folder = copy_writable(sound.path, tmp_path / "awq")
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        import_model(folder, tmp_path / "out" / "mlx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_biases_that_qwen2_must_have(tmp_path: Path) -> None:
    built = write_awq(tmp_path / "awq", Awq("qwen2"))
    drop_tensor(built.path, f"{Q}.bias")
    with pytest.raises(CheckpointError, match=rf"{Q}\.bias is missing"):
        import_model(built.path, tmp_path / "mlx")


def test_scales_too_large_for_float16(sound: Built, tmp_path: Path) -> None:
    folder = copy_writable(sound.path, tmp_path / "awq")
    replace_tensor(folder, f"{Q}.scales", np.full((2, 64), 6e4, np.float16))
    for options in ({"dtype": "float16"}, {"bits": 5}):
        with pytest.raises(CheckpointError, match=rf"{Q}\.scales: .*--dtype float32"):
            import_model(folder, tmp_path / "mlx", **options)
    import_model(folder, tmp_path / "mlx")
    found = apart(stored_weights(stock_load_model(tmp_path / "mlx")[0]))[f"{Q}.weight"]
    assert np.isfinite(found).all() and np.abs(found).max() > 65504


def test_what_is_beside_the_model(sound: Built, tmp_path: Path) -> None:
    """Other weights, code and frequencies of RoPE are left; a tokenizer of SentencePiece is not."""
    folder = copy_writable(sound.path, tmp_path / "awq")
    write_stored(folder / "consolidated.safetensors", read_stored(folder / "model.safetensors"))
    add_tensor(
        folder, f"{Q[:-7]}.rotary_emb.inv_freq", np.ones(8, np.float32), file="model.safetensors"
    )
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "modeling.py").write_text("import os")
    edit_config(folder, auto_map={"AutoModel": "modeling.Model"})
    written = import_model(folder, tmp_path / "mlx")
    assert written.tokenizer
    names = {path.name for path in (tmp_path / "mlx").iterdir()}
    assert "tokenizer.model" in names and "modeling.py" not in names
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & config.keys()
    assert config["dtype"] == config["torch_dtype"] == "float32" and config["rope_theta"] == 1e4
    assert_same_weights(tmp_path / "mlx", sound.weights, experts_apart=True)


ODD: tuple[Any, ...] = (
    None,
    "x",
    -1,
    0,
    2.5,
    10**30,
    True,
    [],
    [1],
    {},
    {"type": []},
    {"rope_theta": {}, "b": []},
)


@pytest.mark.parametrize("family", ["mixtral", "qwen2"])
def test_odd_values_in_configs_are_refused_or_harmless(family: str, tmp_path: Path) -> None:
    """Whatever a field holds: a refusal, or a config that is otherwise the same as before."""
    folder = write_awq(tmp_path / "awq", Awq(family, layers=1)).path
    sound = json.loads((folder / "config.json").read_text())
    fields = [*sound, "head_dim", "rope_scaling", "rope_parameters", "attention_bias", "dtype"]
    opened, refused = open_awq_model(folder).config, 0
    for field in fields:
        for value in ODD:
            (folder / "config.json").write_text(json.dumps(sound | {field: value}))
            try:
                found = open_awq_model(folder).config
            except CheckpointError:
                refused += 1
                continue
            for name in opened.keys() - {field}:
                assert found[name] == opened[name], (field, value, name)
    assert refused > 100
