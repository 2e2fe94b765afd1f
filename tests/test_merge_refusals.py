"""Merges that are refused, in one line that says what is wrong and where."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import OutlierError
from outlier_mlx.merge import merge
from outlier_mlx.merge.merge_config import EXPERT_KEYS, read_merge_config
from tests.damage import (
    REMOVE,
    add_tensor,
    drop_tensor,
    edit_config,
    edit_json,
    find_tensor,
    replace_tensor,
)
from tests.merging import write_merge_config, write_models
from tests.tensor_file import read_stored, write_stored

EXPERT = {"source_model": "./expert_0", "positive_prompts": ["a"]}
OTHER = {"source_model": "./expert_1", "positive_prompts": ["b"]}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("sound"), experts=3)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "models")


def refused(file: Path, **options: Any) -> str:
    """The message that a merge ends with; it leaves nothing behind."""
    out = file.parent / "out"
    before = sorted(file.parent.iterdir())
    with pytest.raises(OutlierError) as caught:
        merge(file, out, **options)
    assert sorted(file.parent.iterdir()) == before
    return str(caught.value)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"gate_mod": "hidden"}, "merge.yaml: gate_mod: unknown key; did you mean 'gate_mode'?"),
    ({"experts": [EXPERT | {"positive_promts": []}]}, "experts[0].positive_promts: unknown key"),
    ({"experts": [EXPERT, "two"]}, "experts[1]: expected keys with values"),
    ({"experts": None}, "experts: 0 experts, expected 1 to 256"),
    ({"experts": {}}, "experts: dict, expected a list"),
    ({"experts": [EXPERT] * 257}, "257 experts"),
    ({"experts": [EXPERT | {"source_model": 3}]}, "experts[0].source_model: 3, expected a string"),
    ({"experts": [{"positive_prompts": ["a"]}]}, "source_model: is missing, expected a string"),
    ({"experts": [EXPERT | {"positive_prompts": "a"}]}, "'a', expected a list of strings"),
    (
        {"experts": [EXPERT | {"positive_prompts": [2024]}]},
        "2024 is not a string; put it in quotation",
    ),
    (
        {"experts": [EXPERT | {"noise_scale": -1}]},
        "noise_scale: -1, expected a number of 0 or more",
    ),
    ({"experts": [EXPERT | {"noise_scale": True}]}, "noise_scale: True, expected a number"),
    (
        {"experts": [EXPERT | {"residual_scale": float("nan")}]},
        ".nan is not a finite number",
    ),
    ({"experts": [EXPERT | {"texts": ["none.txt"]}]}, "experts[0].texts: none.txt: no such file"),
    ({"gate_mode": "hiden"}, "gate_mode: 'hiden', expected one of hidden, hidden_avg, cheap_embed"),
    ({"dtype": "int8"}, "dtype: 'int8', expected one of bfloat16, float16, float32"),
    ({"no_positive": "skip"}, "no_positive: 'skip', expected one of error, bos, zero"),
    ({"experts_per_token": 0}, "experts_per_token: 0, expected a whole number of 1 or more"),
    ({"experts_per_token": 4}, "experts_per_token: 4, but there are 3 experts"),
    ({"base_model": None}, "base_model: is missing, expected a string"),
    ({"base_model": "./nowhere"}, "nowhere: no such folder"),
    ({"base_model": "nowhere"}, "nowhere: no such folder, and not a hub repository (OWNER/NAME)"),
    ({"architecture": "deepseek"}, "architecture: 'deepseek', expected one of mixtral, qwen"),
    ({"architecture": "qwen"}, "architecture qwen2_moe: it needs one entry in shared_experts"),
    ({"shared_experts": [EXPERT, EXPERT]}, "shared_experts: 2 experts, expected at most one"),
    ({"shared_experts": [EXPERT | {"texts": []}]}, "shared_experts[0].texts: unknown key"),
    ({"shared_experts": [EXPERT], "architecture": "mixtral"}, "it has no shared expert"),
    ({"experts": [EXPERT, {"source_model": "./expert_1"}]}, "expert 1 has no positive prompts"),
    (
        {"experts": [EXPERT, {"source_model": "./expert_1"}], "no_positive": "zero"},
        "expert 1 has neither positive nor negative prompts",
    ),
    (
        {"experts": [EXPERT, OTHER | {"positive_prompts": ["a"]}]},
        "all experts have the same router",
    ),
    (
        {"experts": [EXPERT, OTHER | {"positive_prompts": ["a" * 2000]}]},
        "has 1001 tokens; the base's limit is 512",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[m[:40] for _, m in CONFIGS])
def test_configurations(sound: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refused(write_merge_config(sound, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts: [", "merge.yaml: not valid YAML"),
        ("", "the configuration: expected keys with values"),
        ("- 1", "the configuration: expected keys with values"),
        ("dtype: float32\ndtype: float16", "duplicate key 'dtype'"),
        ("base_model: !!python/object/apply:os.getpid []", "not valid YAML"),
        ("a: " + "[" * 600, "merge.yaml: not valid YAML"),
        ("? [1, 2]\n: 3", "not valid YAML"),
        ("#" + " " * 1_000_000, "larger than 1000000 bytes"),
        ("\x00", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        (
            "".join(
                f"a{n}: &a{n} {{{', '.join(f'k{n}x{m}: v' for m in range(40))}}}\n"
                for n in range(30)
            )
            + f"all: {{<<: [{', '.join(f'*a{n}' for n in range(30))}]}}\n",
            "more than 1000 keys",
        ),
    ],
)
def test_yaml(sound: Path, text: str, message: str) -> None:
    file = sound / "merge.yaml"
    file.write_text(text)
    assert message in refused(file)


def test_yaml_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"dtype: \xe9")
    assert "not valid YAML" in refused(tmp_path / "latin.yaml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = ("base_model", "gate_mode", "dtype", "experts_per_token", "architecture", "no_positive")


@given(
    changes=st.dictionaries(st.sampled_from([*KEYS, "experts", "shared_experts"]), VALUES),
    expert=st.dictionaries(st.sampled_from(EXPERT_KEYS), VALUES, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_any_values(changes: dict[str, Any], expert: dict[str, Any]) -> None:
    """What is no configuration is refused, whatever it holds instead."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "merge.yaml"
        whole = {"base_model": "a/b", "experts": [{"source_model": "c/d"} | expert]} | changes
        file.write_text(yaml.safe_dump(whole), encoding="utf-8")
        try:
            merge_config = read_merge_config(file)
        except OutlierError as error:
            assert "merge.yaml: " in str(error)
        else:
            assert 1 <= merge_config.experts_per_token <= len(merge_config.experts)
            assert all(isinstance(e.noise_scale, float) for e in merge_config.experts)


def test_held_out_file(sound: Path, tmp_path: Path) -> None:
    file = write_merge_config(sound)
    (tmp_path / "few.yaml").write_text("[[a], [b]]")
    assert "expected a list of 3 lists: the prompts of each expert" in refused(
        file, held_out=tmp_path / "few.yaml"
    )
    (tmp_path / "numbers.yaml").write_text("[[a], [b], [3]]")
    assert "expert 2.held_out: 3 is not a string" in refused(
        file, held_out=tmp_path / "numbers.yaml"
    )
    (tmp_path / "none.yaml").write_text("[[], [], []]")
    assert "none.yaml: no prompts" in refused(file, held_out=tmp_path / "none.yaml")


@pytest.mark.parametrize("bits", [None, 4])
def test_numbers_that_do_not_fit(sound: Path, bits: int | None) -> None:
    """Infinities are refused, not written."""
    file = write_merge_config(sound, experts=[EXPERT, OTHER | {"residual_scale": 1e7}])
    message = refused(file, dtype="float16", bits=bits, group_size=32, measure=False)
    assert "mlp.down_proj.weight: holds numbers too large for float16" in message
    file = write_merge_config(sound, experts=[EXPERT, OTHER | {"noise_scale": 1e40}])
    message = refused(file, bits=bits, group_size=32, measure=False)
    assert "mlp.gate_proj.weight: noise_scale or residual_scale is too large" in message


DIFFERENCES = {
    "hidden_size": (64, "hidden_size is 64, but 32 in the base base"),
    "intermediate_size": (128, "intermediate_size is 128, but 64 in the base base"),
    "num_hidden_layers": (3, "num_hidden_layers is 3, but 2 in the base base"),
    "num_attention_heads": (2, "num_attention_heads is 2, but 4 in the base base"),
    "num_key_value_heads": (4, "num_key_value_heads is 4, but 2 in the base base"),
    "vocab_size": (301, "vocab_size is 301, but 300 in the base base"),
    "model_type": ("mistral", "model_type is mistral, but llama in the base base"),
}


@pytest.mark.parametrize("key", DIFFERENCES)
def test_models_of_different_shape(folder: Path, key: str) -> None:
    value, message = DIFFERENCES[key]
    edit_config(folder / "expert_1", **{key: value})
    assert refused(write_merge_config(folder)) == f"expert_1: {message}"


MODELS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: edit_config(f / "base", model_type="gemma"), "model_type 'gemma' cannot be merged"),
    (lambda f: edit_config(f / "base", head_dim=16), "head_dim 16 is not hidden_size / heads"),
    (
        lambda f: edit_config(f / "base", attention_bias=True),
        "attention_bias is not supported in a mixture",
    ),
    (
        lambda f: edit_config(f / "base", rope_scaling={"rope_type": "llama3", "factor": 8}),
        "rope_scaling 'llama3'",
    ),
    (
        lambda f: edit_config(f / "base", quantization_config={"bits": 4}),
        "base: quantized models cannot be merged",
    ),
    (lambda f: edit_config(f / "base", hidden_size="x"), "hidden_size is 'x', expected a whole"),
    (lambda f: edit_config(f / "base", hidden_act="gelu"), "hidden_act 'gelu'"),
    (lambda f: edit_config(f / "base", num_hidden_layers=REMOVE), "num_hidden_layers is missing"),
    (lambda f: (f / "base/config.json").unlink(), "not a model: no config.json"),
    (lambda f: (f / "expert_1/model.safetensors").unlink(), "no *.safetensors file"),
    (
        lambda f: drop_tensor(f / "expert_1", "model.layers.1.mlp.up_proj.weight"),
        "expert_1: the tensor model.layers.1.mlp.up_proj.weight (64, 32) is missing",
    ),
    (
        lambda f: add_tensor(f / "base", "model.layers.0.mlp.up_proj.bias", np.zeros(64), "F32"),
        "base: model.layers.0.mlp.up_proj.bias: not a tensor of this model",
    ),
    (
        lambda f: replace_tensor(f / "base", "model.norm.weight", np.ones(31)),
        "base: model.norm.weight: shape (31,), expected (32,)",
    ),
    (
        lambda f: replace_tensor(f / "expert_2", "model.norm.weight", np.ones(32), "I32"),
        "model.norm.weight: dtype I32, expected a float",
    ),
    (
        lambda f: replace_tensor(
            f / "expert_2", "model.layers.1.mlp.up_proj.weight", np.full((64, 32), np.nan)
        ),
        "model.layers.1.mlp.up_proj.weight: holds NaN or infinity",
    ),
    (
        lambda f: replace_tensor(
            f / "base", "model.layers.0.mlp.up_proj.weight", np.full((64, 32), np.inf)
        ),
        "gate_mode hidden: routers hold NaN or infinity",
    ),
    (lambda f: (f / "base/tokenizer.json").write_text("{}"), "base: tokenizer.json: not a token"),
    (
        lambda f: list(map(Path.unlink, (f / "base").glob("tokenizer*"))),
        "no usable tokenizer",
    ),
]


@pytest.mark.parametrize(("damage", "message"), MODELS, ids=[m[:40] for _, m in MODELS])
def test_models(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    write_tokenizer_of_base(folder, "expert_1")
    damage(folder)
    if "tokenizer.json: not" in message:
        shutil.copy(folder / "expert_1/tokenizer_config.json", folder / "base")
    assert message in refused(write_merge_config(folder), measure=False)


def write_tokenizer_of_base(folder: Path, name: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "base" / file, folder / name)


def test_tokenizers_that_differ(folder: Path) -> None:
    write_tokenizer_of_base(folder, "expert_1")
    file = folder / "expert_1" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    edit_json(file, model=content["model"])
    message = refused(write_merge_config(folder))
    assert "expert_1: its tokenizer differs from that of the base base: token 'a' is " in message
    write_tokenizer_of_base(folder, "expert_1")
    added = content["added_tokens"]
    added[1]["content"] = "<|new|>"
    edit_json(file, added_tokens=added)
    notes = merge(write_merge_config(folder), folder / "out", measure=False).notes
    assert any("its added tokens differ" in note and "'<|new|>'" in note for note in notes)


def test_qwen2_needs_a_shared_expert(tmp_path: Path) -> None:
    write_models(tmp_path, "qwen2", experts=3)
    assert "needs one entry in shared_experts" in refused(write_merge_config(tmp_path))


def test_a_tokenizer_without_bos(tmp_path: Path) -> None:
    write_models(tmp_path, bos=False)
    empty = [EXPERT, OTHER | {"positive_prompts": [""]}]
    message = refused(write_merge_config(tmp_path, experts=empty))
    assert "the prompt '' has no tokens: the base's tokenizer has no BOS" in message
    negative = [EXPERT, {"source_model": "./expert_1", "negative_prompts": ["a"]}]
    file = write_merge_config(tmp_path, experts=negative)
    message = refused(file, no_positive="bos")
    assert "expert 1: no_positive: bos, but the tokenizer has no BOS" in message
    assert merge(file, tmp_path / "out", no_positive="zero").routers.routing[0].tokens == 1


def test_a_token_that_the_model_does_not_have(tmp_path: Path) -> None:
    write_models(tmp_path, vocab=200)
    content = json.loads((tmp_path / "base/tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = 400
    content["model"]["merges"].append(["z", "z"])
    edit_json(tmp_path / "base/tokenizer.json", model=content["model"])
    file = write_merge_config(tmp_path, experts=[EXPERT, OTHER | {"positive_prompts": ["zz"]}])
    assert "the tokenizer produced token 400, but the base's embedding has 200 rows" in refused(
        file
    )


def test_what_is_odd_is_told(sound: Path, tmp_path: Path) -> None:
    alike = [
        {"source_model": f"./expert_{n}", "negative_prompts": [text]}
        for n, text in enumerate(("cat", "cats", "hat"))
    ]
    outlying = write_models(tmp_path / "bos", experts=3)
    rows = 50.0 * np.eye(1, 32, dtype=np.float32)  # what BOS is in every layer, as in large models
    path = "model.embed_tokens.weight"
    embedding = find_tensor(outlying / "base", path)[1].array().copy()
    embedding[1] = rows
    replace_tensor(outlying / "base", path, embedding)
    file = write_merge_config(outlying, experts=alike)
    notes = " ".join(merge(file, tmp_path / "out", no_positive="bos").notes)
    assert "3 experts: old versions of llama.cpp need a power of two" in notes
    assert "condition number of the router above 5 in 2 of 2 layers" in notes
    assert "no_positive: bos gives all rows the hidden state" in notes
    assert "mean cosine between rows 0.9" in notes
    assert "no_positive: bos" not in " ".join(
        merge(file, tmp_path / "zero", no_positive="zero").notes
    )
    (outlying / "cat.txt").write_text("cat")
    file = write_merge_config(outlying, experts=[alike[0] | {"texts": ["cat.txt"]}, *alike[1:]])
    notes = " ".join(merge(file, tmp_path / "texts", no_positive="zero").notes)
    assert "expert 0: texts are ignored: they are for gate_mode trained" in notes

    cancel = [EXPERT | {"negative_prompts": ["bca"]}, OTHER]
    merged = merge(write_merge_config(sound, experts=cancel), tmp_path / "cancel")
    assert "expert 0: its router row is zero in layers [0]" in " ".join(merged.notes)
    assert "every token uses all 2 experts" in " ".join(merged.notes)
    single = merge(write_merge_config(sound, experts=[EXPERT]), tmp_path / "single")
    assert (single.notes, single.mixture.top_k) == ([], 1)
    model, _ = load_model(single.path)
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()


def test_sharded_sources(tmp_path: Path) -> None:
    write_models(tmp_path)
    whole = merge(write_merge_config(tmp_path), tmp_path / "whole", measure=False).path
    path = tmp_path / "base" / "model.safetensors"
    tensors = read_stored(path)
    path.unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    placed = {key: names[n % 2] for n, key in enumerate(tensors)}
    for name in names:
        own = {key: tensors[key] for key in tensors if placed[key] == name}
        write_stored(tmp_path / "base" / name, own)
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    split = merge(tmp_path / "merge.yaml", tmp_path / "split", measure=False).path
    shard = "model-00001-of-00001.safetensors"
    assert (whole / shard).read_bytes() == (split / shard).read_bytes()
    placed.pop("model.norm.weight")
    index.write_text(json.dumps({"weight_map": placed | {"model.other": names[0]}}))
    assert "model.other is not in" in refused(tmp_path / "merge.yaml")
