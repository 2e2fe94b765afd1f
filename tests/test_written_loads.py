"""What convert, import and merge write can be loaded, whatever a config says; else they refuse."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlier_mlx.engine.loading import load
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.imports import import_model
from outlier_mlx.merge import merge
from outlier_mlx.tiers.convert import convert_tier
from outlier_mlx.tiers.presets import RECIPES, make_recipe
from tests.awq_builder import Awq, write_awq
from tests.builders import write_base, write_overlay
from tests.damage import edit_json
from tests.folders import snapshot
from tests.gguf_builder import build as build_gguf
from tests.merging import write_merge_config, write_models
from tests.program import assert_refused, run

# As small as it can be, and yet quantized.
DIMS: dict[str, Any] = {"hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 32, "layers": 2}
EXPERTS: dict[str, Any] = {"expert_intermediate": 32, "moe_layers": (1,), "experts": 2}
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

FIELDS = (
    *("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_traditional", "layer_types"),
    *("partial_rotary_factor", "original_max_position_embeddings", "tie_word_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias"),
    *("hidden_act", "model_type", "architectures", "base_model_type", "model_file", "auto_map"),
    *("dtype", "torch_dtype", "activation_dtype", "quantization", "quantization_config"),
    *("quantize_activations", "eos_token_id", "bos_token_id", "pad_token_id", "text_config"),
    *("n_experts", "top_k", "moe_layer_indices", "moe_layers", "moe_intermediate_size"),
    *("num_experts", "num_experts_per_tok", "num_local_experts", "norm_topk_prob"),
    *("scoring_func", "routed_scaling_factor", "n_group", "ternary", "ternary_switch"),
    *("id2label", "label2id", "num_labels", "is_encoder_decoder", "use_cache", "return_dict"),
    *("transformers_version", "_name_or_path", "attn_implementation", "tokenizer_class"),
    *("problem_type", "output_attentions", "chunk_size_feed_forward", "hidden_dim", "max_seq_len"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 64, 10**30, 0.5, 1.0, 1e-46, 3e38, 1e39, "", "x", "silu"),
    *("float16", "float64", [], {}, [1], [0, 1], ["x"], [None], [[1]], {"a": 1}, {"0": "x"}),
    *([FULL], [FULL, FULL], [FULL, SLIDING], [SLIDING, SLIDING], [FULL] * 3, ["x", "y"]),
    *(YARN, YARN | {"factor": 1e-30}, YARN | {"original_max_position_embeddings": 1}, LLAMA3),
    *(YARN | {"attention_factor": 2}, {"rope_type": "default"}, {"type": "linear", "factor": 2}),
    *(LLAMA3 | {"high_freq_factor": 1.0}, {"rope_type": "longrope", "factor": 2.0}),
    *({"rope_type": "dynamic", "factor": 2.0}, {"rope_theta": 1.0, **YARN}, {"rope_theta": 1e6}),
    *({FULL: {"rope_theta": 1e4}}, {"bits": 4, "group_size": 64}, {"quant_method": "x"}),
    *("qwen2", "llama", "mistral", "qwen3", "outlier_moe", "qwen2_moe", "mixtral"),
)
CHANGES = st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(VALUES), min_size=1, max_size=3)
TOKENIZER_FIELDS = (
    *("additional_special_tokens", "extra_special_tokens", "eos_token", "bos_token", "unk_token"),
    *("pad_token", "chat_template", "tokenizer_class", "added_tokens_decoder", "auto_map"),
    *("model_max_length", "padding_side", "clean_up_tokenization_spaces", "model_input_names"),
    *("add_bos_token", "tool_parser_type", "chat_template_type", "backend", "legacy"),
)
TOKENIZER_VALUES = (
    *VALUES[:36],
    *(["<|im_end|>"], ["<|im_end|>", 3], {"t": "<|im_end|>"}, {"content": "<|im_end|>"}),
    *([{"content": "<|im_end|>"}], {"5": {"content": "y", "special": True}}, {"x": "y"}),
    *("PreTrainedTokenizerFast", "LlamaTokenizer", "left", "{% for %}", {"__type": "AddedToken"}),
)
TOKENIZER_CHANGES = st.dictionaries(
    st.sampled_from(TOKENIZER_FIELDS), st.sampled_from(TOKENIZER_VALUES), min_size=1, max_size=2
)
IN_ONE_FOLDER = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Make = Callable[[Path, Path], object]


def convert_overlay(source: Path, out: Path) -> None:
    convert_tier(source, None, out, force=True)


def convert_portable(source: Path, out: Path) -> None:
    convert_tier(source, None, out, recipe=make_recipe(portable=True), force=True)


def convert_on_base(source: Path, out: Path) -> None:
    convert_tier(source.parent / "bare", source, out, recipe=RECIPES["f32"], force=True)


def import_plain(source: Path, out: Path) -> None:
    import_model(source, out, force=True)


def merge_base(source: Path, out: Path) -> None:
    merge(source.parent / "merge.yaml", out, measure=False, force=True)


def write_source(folder: Path, name: str) -> Path:
    """Write the sources of a case into a folder; returns the one whose files are changed."""
    if name in ("overlay", "portable"):
        return write_overlay(folder / "overlay", **DIMS, **EXPERTS).path
    if name.startswith("base"):
        how = DIMS | {"family": name.split()[1]}
        write_overlay(folder / "bare", with_base=False, tokenizer=False, **how, **EXPERTS)
        return write_base(folder / "base", **how).path
    if name == "merge":
        write_models(folder, experts=2, **DIMS)
        write_merge_config(
            folder,
            gate_mode="random",
            experts=[{"source_model": f"./expert_{n}"} for n in range(2)],
        )
        return folder / "base"
    if name == "awq":
        return write_awq(folder / "awq", Awq()).path
    return write_base(folder / "plain", **DIMS, family=name.split()[1]).path


MAKERS: dict[str, Make] = {
    "overlay": convert_overlay,
    "portable": convert_portable,
    "base qwen2": convert_on_base,
    "base llama": convert_on_base,
    "base qwen3": convert_on_base,
    "import llama": import_plain,
    "import qwen3": import_plain,
    "awq": import_plain,
    "merge": merge_base,
}


@pytest.fixture(scope="module", params=MAKERS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Make]:
    """A source, and what makes a model of it."""
    folder = tmp_path_factory.mktemp("written")
    return write_source(folder, request.param), MAKERS[request.param]


def check(case: tuple[Path, Make], file: str, changes: dict[str, Any]) -> None:
    """With these changes in a file, the model is refused, or what is written loads and runs."""
    source, make = case
    out = source.parent / "out"
    path = source / file
    kept = path.read_text()
    shutil.rmtree(out, ignore_errors=True)
    try:
        edit_json(path, **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                make(source, out)
            except OutlierError as error:
                assert "\n" not in str(error) and ".part-" not in str(error), error
                assert not out.exists()
                return
            json.loads((out / "config.json").read_text(), parse_constant=pytest.fail)
            model, _ = load(out)
            mx.eval(model(mx.array([[1, 2, 3]])))
    finally:
        path.write_text(kept)


@settings(IN_ONE_FOLDER, max_examples=12)
@given(changes=CHANGES)
def test_any_config(case: tuple[Path, Make], changes: dict[str, Any]) -> None:
    check(case, "config.json", changes)


@pytest.mark.slow
@settings(IN_ONE_FOLDER, max_examples=150)
@given(changes=CHANGES)
def test_any_config_thoroughly(case: tuple[Path, Make], changes: dict[str, Any]) -> None:
    check(case, "config.json", changes)


@pytest.mark.slow
@settings(IN_ONE_FOLDER, max_examples=60)
@given(changes=TOKENIZER_CHANGES)
def test_any_tokenizer_config(case: tuple[Path, Make], changes: dict[str, Any]) -> None:
    check(case, "tokenizer_config.json", changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": [FULL]},
        {"layer_types": [FULL, "x"]},
        {"layer_types": FULL},
        {"rope_theta": 1.0, "rope_scaling": YARN},
        {"rope_theta": 1, "rope_scaling": YARN | {"type": "yarn"}},
        {"rope_theta": 1e39},
        {"eos_token_id": "x"},
        {"eos_token_id": [0, True]},
        {"eos_token_id": -1},
        {"num_labels": 10**30},  # transformers would make a text for each
        {"num_labels": "x"},
    ],
    ids=str,
)
def test_configs_that_made_tiers_which_could_not_be_loaded(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = write_source(tmp_path, "overlay")
    edit_json(source / "config.json", **changes)
    before = snapshot(tmp_path)
    refused = run("convert", source, "--out", tmp_path / "tier", code=1)
    assert_refused(refused, "config.json", next(iter(changes)))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"eos_token_id": [1', "not valid JSON"),
        ("[1, 2]", "a JSON object was expected"),
        ('{"eos_token_id": "2"}', "eos_token_id is '2'"),
        ('{"eos_token_id": [1, 2.0]}', "eos_token_id is [1, 2.0]"),
        ('{"temperature": 1e999}', "temperature: the number 1e999 is too large"),
        ('{"temperature": NaN}', "NaN is not a number"),
        ('{"top_p": 1, "top_p": 2}', "'top_p' appears twice"),
        (r'{"note": "\ud800"}', "half a surrogate pair"),
    ],
)
def test_generation_config_is_read(tmp_path: Path, text: str, said: str) -> None:
    """By whom it is copied, and by whom it is used."""
    name = "generation_config.json"
    source = write_source(tmp_path, "overlay")
    convert_overlay(source, tmp_path / "tier")
    for folder in (source, tmp_path / "tier"):
        (folder / name).write_text(text)
    refused = run("convert", source, "--out", tmp_path / "other", code=1)
    assert_refused(refused, f"overlay/{name}: ", said)
    refused = run("generate", "--model", tmp_path / "tier", "--prompt", "a", code=1)
    assert_refused(refused, f"{name}: ", said)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1e999}', r'{"a": "\udfff"}', '{"a":1,"a":2}'])
def test_files_of_tokenizers_are_read(tmp_path: Path, name: str, text: str) -> None:
    source = write_source(tmp_path, "overlay")
    convert_overlay(source, tmp_path / "tier")
    for folder in (source, tmp_path / "tier"):
        (folder / name).write_text(text)
    assert_refused(run("convert", source, "--out", tmp_path / "other", code=1), name)
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path / "tier")


@pytest.mark.parametrize(
    "value", [5, "x", True, {"a": "b"}, [1], [None], [["a"]], [{"content": 5}], {"content": "x"}]
)
def test_special_tokens_are_a_list_of_tokens(tmp_path: Path, value: Any) -> None:
    source = write_source(tmp_path, "overlay")
    edit_json(source / "tokenizer_config.json", additional_special_tokens=value)
    refused = run("convert", source, "--out", tmp_path / "tier", code=1)
    assert_refused(refused, "overlay/tokenizer_config.json: additional_special_tokens")


@pytest.mark.parametrize(
    "value",
    [["<|im_end|>"], [{"__type": "AddedToken", "content": "<|im_end|>"}], [], None],
    ids=str,
)
def test_special_tokens_that_are_sound(tmp_path: Path, value: Any) -> None:
    source = write_source(tmp_path, "overlay")
    changes = {"additional_special_tokens": value, "extra_special_tokens": ["<|im_start|>"]}
    edit_json(source / "tokenizer_config.json", **changes)
    convert_overlay(source, tmp_path / "tier")
    _, tokenizer = load(tmp_path / "tier")
    expected = ["<|im_start|>", "<|im_end|>"][: 2 if value else 1]
    assert all(len(tokenizer.encode(token)) == 1 for token in expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.freq_base", 0.0),
        ("llama.attention.layer_norm_rms_epsilon", float("inf")),
        ("llama.rope.freq_base", float("nan")),
        ("llama.context_length", 0),
        ("llama.rope.scaling.factor", 1e30),
    ],
)
def test_metadata_of_gguf(tmp_path: Path, key: str, value: float) -> None:
    model = build_gguf(layers=1)
    model.fields[key] = value
    path = model.write(tmp_path / "x.gguf")
    try:
        import_model(path, tmp_path / "out")
    except OutlierError as error:
        assert "x.gguf" in str(error) and not (tmp_path / "out").exists()
    else:
        loaded, _ = load(tmp_path / "out")
        assert mx.isfinite(loaded(mx.array([[1, 2, 3]]))).all()
