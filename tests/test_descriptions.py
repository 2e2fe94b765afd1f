"""What is said of a model is what mlx-lm makes of it: caches, contexts, heads, files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import outlier_mlx
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.engine.generate import Options, check_kv_cache, described
from outlier_mlx.engine.loading import load_model, load_tokenizer, suited_dtype
from outlier_mlx.engine.machine import Budget
from outlier_mlx.engine.memory import check_fits
from outlier_mlx.engine.needs import Use, needs_of
from outlier_mlx.errors import CheckpointWarning, OutlierError
from outlier_mlx.measure import eval_harness
from outlier_mlx.models.config import describe
from outlier_mlx.models.head import NOTE
from outlier_mlx.models.sizes import context_length, kv_bytes
from outlier_mlx.storage.shards import choose_shards, read_shards
from tests.builders import write_overlay
from tests.damage import edit_config, edit_json
from tests.plain_models import SIZES, make_model, write_model
from tests.program import run

# Qwen3 0.6B.
QWEN3 = SIZES | {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TOKENS = mx.array([[7, 3, 250, 1, 9, 9, 120, 44, 5, 17] * 4])

# KV caches

PLAIN: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 24},
    "mistral": {},
    "qwen2": {"head_dim": 999},  # which it does not have
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {
        "head_dim": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "mixtral": {},
    "olmo2": {},
    "glm4": {"head_dim": 32, "attention_bias": True, "partial_rotary_factor": 0.5},
    "phi3": {},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_the_kv_cache_is_as_large_as_mlx_lms(kind: str) -> None:
    raw = SIZES | PLAIN[kind] | {"model_type": kind}
    model: Any = make_model(raw)
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 256), mx.int32), cache)  # it grows in steps of 256
    stored = sum(layer.nbytes for layer in cache)
    # These are float32.
    for found in (describe(raw), described(model)):
        assert kv_bytes(found, 256) == stored // 2


def test_heads_of_their_own_width(tmp_path: Path) -> None:
    config = describe(QWEN3)
    assert kv_bytes(config, 1) == 114_688
    small = write_model(tmp_path / "qwen3", SIZES | {"model_type": "qwen3", "head_dim": 64})
    per_token = 2 * 2 * 2 * 2 * 64  # layers, keys and values, KV heads, bytes
    assert inspect(small).kv_bytes_per_token == per_token
    assert needs_of(small, on_cpu=False).cache(100) == 100 * per_token


NOT_PLAIN: dict[str, dict[str, Any]] = {
    "MLA": {"model_type": "deepseek_v3", "kv_lora_rank": 512, "head_dim": 64},
    "linear attention": {
        "model_type": "qwen3_next",
        "head_dim": 64,
        "full_attention_interval": 4,
        "linear_num_key_heads": 2,
    },
    "hybrid": {"model_type": "x", "layer_types": ["full_attention", "linear_attention"]},
    "numbers": {"model_type": "llama", "layer_types": [0, 1]},
    "lists of lists": {"model_type": "llama", "layer_types": [["full_attention"], None]},
    "states": {"model_type": "falcon_h1", "mamba_d_state": 16},
    "shared keys": {"model_type": "gemma3n", "num_kv_shared_layers": 1},
    "lists": {"model_type": "openelm", "num_key_value_heads": [1, 2]},
    "pattern in letters": {"model_type": "exaone4", "sliding_window_pattern": "LG"},
    "nothing": {"model_type": "mamba", "num_attention_heads": None},
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_no_plain_attention_is_not_known(name: str) -> None:
    found = describe(SIZES | NOT_PLAIN[name])
    assert kv_bytes(found, 1000) is None
    assert found.vocab == 300 and context_length(found) == 512


def test_sliding_windows_are_counted_as_wide_as_they_are() -> None:
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 100}
    raw = SIZES | {"model_type": "gpt_oss", "head_dim": 64} | windows
    row = 2 * 2 * 2 * 64
    assert kv_bytes(describe(raw), 50) == row * 100
    assert kv_bytes(describe(raw), 1000) == row * 1100
    pattern = SIZES | {"model_type": "gemma3_text", "head_dim": 64, "num_hidden_layers": 6}
    pattern |= {"sliding_window": 100, "sliding_window_pattern": 3}
    assert kv_bytes(describe(pattern), 1000) == row * (4 * 100 + 2 * 1000)
    # mlx-lm's Qwen2 has no window.
    qwen2 = SIZES | windows | {"model_type": "qwen2"}
    assert kv_bytes(describe(qwen2), 1000) == 2 * 2 * 2 * 16 * 2000


def test_quantized_kv_caches() -> None:
    config = describe(QWEN3)
    for bits, group in ((8, 64), (4, 32), (2, 128)):
        bits_per_value = bits + 32 / group
        assert kv_bytes(config, 64, bits, group) == 114_688 * 64 * bits_per_value / 16


def test_kv_bits_of_heads_of_their_own_width(tmp_path: Path) -> None:
    """288 / 6 is 48, which no group divides; but a head has 64."""
    wide = {"model_type": "llama", "hidden_size": 288, "num_attention_heads": 6, "head_dim": 64}
    wide = SIZES | wide | {"num_key_value_heads": 6}
    folder = write_model(tmp_path / "wide", wide)
    flags = ("--max-tokens", 3, "--quiet", "--kv-bits", 8, "--quantized-kv-start", 0)
    run("generate", "--model", folder, "--prompt", "x", *flags)
    narrow = wide | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 40}
    folder = write_model(tmp_path / "narrow", narrow)
    found = run(
        "generate", "--model", folder, "--prompt", "x", *flags, "--kv-group-size", 32, code=1
    )
    assert found.err == (
        "error: --kv-group-size 32 does not divide the head width 40; leave out --kv-bits\n"
    )


def test_kv_bits_of_a_sliding_window() -> None:
    model = make_model(
        SIZES
        | {"model_type": "llama", "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "full_attention"]}
    )
    check_kv_cache(model, Options())
    with pytest.raises(OutlierError, match="does not quantize the cache of sliding windows"):
        check_kv_cache(model, Options(kv_bits=8, kv_group_size=32))


# Nested configs

NESTED: dict[str, Any] = {
    "model_type": "mistral3",
    "eos_token_id": 2,
    "text_config": SIZES | {"model_type": "mistral", "head_dim": 32, "rope_parameters": {}},
}


def test_a_nested_config_is_lifted(tmp_path: Path) -> None:
    found = describe(NESTED)
    assert (found.family, found.head_dim, found.eos_ids) == ("mistral", 32, (2,))
    assert kv_bytes(found, 1) == 2 * 2 * 2 * 2 * 32 and context_length(found) == 512
    folder = write_model(tmp_path / "nested", NESTED)
    info = inspect(folder)
    assert (info.kv_bytes_per_token, info.context_length, info.vocab) == (512, 512, 300)
    flags = ("--max-tokens", 2, "--quiet", "--kv-group-size", 32)
    run("generate", "--model", folder, "--prompt", "x", "--kv-bits", 8, *flags)
    run("generate", "--model", folder, "--prompt", "x", "--top-k", 5, *flags)


def test_a_nested_config_says_what_ends_a_text(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "nested", NESTED)
    inner = {"text_config": NESTED["text_config"] | {"eos_token_id": [5, 7]}}
    tokenizer = load_tokenizer(folder, inner)
    # The tokenizer's own counts, too, and the one with which its template ends a reply.
    own = {tokenizer.eos_token_id, *tokenizer.encode("<|im_end|>")}
    assert tokenizer.eos_token_ids - own == {5, 7}
    assert load_tokenizer(folder, inner | {"eos_token_id": [9]}).eos_token_ids - own == {9}


def test_a_nested_config_in_new_names_is_read_by_mlx_lm(tmp_path: Path) -> None:
    inner = NESTED["text_config"] | {"rope_theta": 1e6}
    new = {k: v for k, v in inner.items() if not k.startswith("rope_")}
    new |= {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    folder = write_model(
        tmp_path / "nested", NESTED | {"text_config": inner}, NESTED | {"text_config": new}
    )
    expected = make_model(NESTED | {"text_config": inner})(TOKENS)
    found = load_model(folder, dtype="float32")[0](TOKENS)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)


# Contexts and YaRN


def test_context_lengths() -> None:
    def length(**changes: Any) -> int | None:
        return context_length(describe(SIZES | {"model_type": "qwen2"} | changes))

    yarn = {"type": "yarn", "factor": 4.0}
    assert length() == 512
    assert length(rope_scaling=yarn) == 2048
    assert length(rope_scaling=yarn | {"original_max_position_embeddings": 256}) == 1024
    # Configs of DeepSeek already say the longer context.
    stretched = yarn | {"original_max_position_embeddings": 128}
    assert length(rope_scaling=stretched) == 512
    assert length(rope_parameters=yarn | {"rope_theta": 1e4, "rope_type": "yarn"}) == 2048
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}
    assert length(rope_scaling=llama3) == 512
    assert length(rope_scaling={"type": "linear", "factor": 4.0}) == 512
    assert length(max_position_embeddings="512") is None
    assert context_length(describe({"model_type": "other"})) is None
    assert length(max_position_embeddings=None) == 32768


def test_eval_takes_the_context_that_chat_takes(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    raw = SIZES | {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_scaling": yarn}
    model, _ = load_model(write_model(tmp_path / "yarn", raw))
    assert eval_harness._max_length(model) == context_length(described(model)) == 131_072


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_the_original_context_is_by_default_that_of_the_config(
    spelling: str, kind: str, tmp_path: Path
) -> None:
    """As in transformers; mlx-lm would take 4096 for YaRN and 8192 for Llama 3."""
    scaling: dict[str, Any] = {"rope_type": kind, "factor": 8.0}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = SIZES | {"model_type": "llama", "max_position_embeddings": 32}
    full = plain | {"rope_scaling": scaling | {"original_max_position_embeddings": 32}}
    said = plain | {spelling: scaling | ({"rope_theta": 1e4} if "params" in spelling else {})}
    folder = write_model(tmp_path / "model", full, said)
    expected = np.array(make_model(full)(TOKENS))
    found, config = load_model(folder, dtype="float32")
    np.testing.assert_allclose(np.array(found(TOKENS)), expected, atol=1e-5)
    assert config["rope_scaling"]["original_max_position_embeddings"] == 32
    other = make_model(plain | {"rope_scaling": scaling})
    assert np.abs(np.array(other(TOKENS)) - expected).max() > 0.05


def test_convert_takes_the_same_original_context(tmp_path: Path) -> None:
    """Tiers of half a YaRN and of a whole one are the same, and compute as transformers does."""
    folders = []
    for name in ("half", "whole"):
        yarn = {"factor": 4.0, "original_max_position_embeddings": 512}
        built = write_overlay(tmp_path / name, yarn=yarn)
        if name == "half":
            edit_config(built.path, rope_scaling={"type": "yarn", "factor": 4.0})
        folders.append(outlier_mlx.convert(built.path, out=tmp_path / f"{name}-tier", tier="f32"))
    half, whole = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert half == whole
    assert half["rope_scaling"]["original_max_position_embeddings"] == 512


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_defaults_are_those_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(kind)
    found = describe({"model_type": kind, "num_attention_heads": 4, "hidden_size": 512})
    assert found.max_positions == theirs.max_position_embeddings
    assert found.rms_norm_eps == theirs.rms_norm_eps
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]


# Heads


def with_head(folder: Path, *, equal: bool, stated: bool | None = True) -> Path:
    """A llama whose config ties the head, with a head in the file."""
    raw = SIZES | {"model_type": "llama", "tie_word_embeddings": False}
    said = {k: v for k, v in raw.items() if k != "tie_word_embeddings"}
    write_model(folder, raw, said if stated is None else said | {"tie_word_embeddings": stated})
    if equal:
        weights: Any = mx.load(str(folder / "model.safetensors"))
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.mark.parametrize("stated", [True, False, None])
def test_a_stored_head_is_the_head(stated: bool | None, tmp_path: Path) -> None:
    folder = with_head(tmp_path / "model", equal=False, stated=stated)
    expected = make_model(SIZES | {"model_type": "llama"})(TOKENS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, config = load_model(folder, dtype="float32")
    np.testing.assert_allclose(np.array(found(TOKENS)), np.array(expected), atol=1e-5)
    assert config["tie_word_embeddings"] is False
    notes = [str(w.message) for w in caught if w.category is CheckpointWarning]
    assert notes == ([f"model: {NOTE}"] if stated else [])


def test_a_stored_head_that_is_the_embedding_is_not_loaded_twice(tmp_path: Path) -> None:
    folder = with_head(tmp_path / "model", equal=True)
    found, config = load_model(folder)
    assert config["tie_word_embeddings"] is True and "lm_head" not in found


def test_a_head_that_nothing_says_and_nothing_holds_is_tied(tmp_path: Path) -> None:
    tied = SIZES | {"model_type": "llama", "tie_word_embeddings": True}
    said = {k: v for k, v in tied.items() if k != "tie_word_embeddings"}
    assert load_model(write_model(tmp_path / "m", tied, said))[1]["tie_word_embeddings"] is True


# Files


def test_a_second_set_of_weights_is_not_counted(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", SIZES | {"model_type": "mistral"})
    nbytes = inspect(folder).nbytes
    weights: Any = mx.load(str(folder / "model.safetensors"))
    other = {f"layers.0.{name}": value for name, value in weights.items()}
    mx.save_safetensors(str(folder / "consolidated.safetensors"), other)
    assert inspect(folder).nbytes == nbytes
    assert needs_of(folder, on_cpu=False).weights == nbytes
    assert len(read_shards(folder, every=True)) == 2 * len(read_shards(folder))


def test_windows_are_those_of_each_conversation(tmp_path: Path) -> None:
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 100}
    folder = write_model(tmp_path / "model", SIZES | {"model_type": "llama"} | windows)
    weights = inspect(folder).nbytes
    row = 2 * 2 * 2 * 16
    use = Use(1000, 3)
    work = needs_of(folder, on_cpu=False).working(use)
    enough = weights + 3 * row * (100 + 1000) + work
    check_fits(folder, use, Budget(enough, "this Mac's GPU"))
    with pytest.raises(OutlierError, match="3 conversations of 1000 tokens"):
        check_fits(folder, use, Budget(enough - 1, "this Mac's GPU"))


def test_which_files_hold_the_model() -> None:
    index = {"part-1.safetensors", "part-2.safetensors"}
    names = ["b.safetensors", "model.safetensors", "config.json", "part-1.safetensors"]
    assert choose_shards(names) == ["model.safetensors"]
    assert choose_shards(names, index) == ["model.safetensors", "part-1.safetensors"]
    assert choose_shards(["b.safetensors", "a.safetensors", "x.bin"]) == [
        "a.safetensors",
        "b.safetensors",
    ]


# The chips without bfloat16


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("real", None),
        ("real + alpha_overlay.pt", None),
        ("toy", None),
        ("toy dense", None),
        ("packed", None),
        ("packed + alpha_overlay.pt", None),
        ("monolith", None),
        ("v3.2", "float16"),
        ("v3.2 + alpha_overlay.pt", "float16"),
        ("per-file", "float16"),
        (None, "float16"),
    ],
)
def test_forms_that_overflow_float16_keep_bfloat16(
    form: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M2"})
    (tmp_path / "tier.json").write_text("{}")
    if form is not None:
        edit_json(tmp_path / "tier.json", overlay={"form": form})
    assert suited_dtype(tmp_path, {"dtype": "bfloat16"}) == expected


# Whatever a config holds

ODD: list[Any] = [None, True, -1, 0, 2**70, 1.5, "64", [1], {"a": 1}, float("inf")]


def test_no_config_is_too_odd_to_describe() -> None:
    raw = SIZES | NESTED | {"num_experts": 4, "quantization": {"bits": 4, "group_size": 64}}
    raw |= {"dtype": "float16", "layer_types": ["full_attention"] * 2, "rope_scaling": None}
    names = [*raw, "head_dim", "rope_parameters", "ternary", "n_experts", "model_type"]
    for name in names:
        for value in ODD:
            for kind in ("llama", "other", "outlier_moe"):
                found = describe(raw | {"model_type": kind} | {name: value})
                kv_bytes(found, 10), context_length(found)
                json.dumps(str(found))
