"""What the builders write is what a reader finds, and damage does what it says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import builders, damage, reference, tensor_file
from tests.folders import copy_writable
from tests.goldens import golden
from tests.reference import ReferenceModel, forward, gaps, greedy, trace, with_alphas
from tests.reference_reader import read_overlay

SCALES: list[Any] = ["0d", "one", "per_row", "flat_row", ("one", "per_row", "0d")]
ALPHAS = ["tensor", "json", "partial", "both", "none"]
TINY: dict[str, Any] = {
    "hidden": 16,
    "intermediate": 24,
    "expert_intermediate": 12,
    "vocab": 20,
    "layers": 3,
    "moe_layers": (0, 2),
}


def check_read_back(built: builders.Built, model: ReferenceModel) -> None:
    dims = built.dims
    assert (model.heads, model.kv_heads) == (dims.heads, dims.kv_heads)
    assert (model.top_k, model.eps) == (dims.top_k, dims.eps)
    assert model.rope_theta == dims.rope_theta
    assert (model.lm_head is None) == dims.tied
    found = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    if model.lm_head is not None:
        found["lm_head.weight"] = model.lm_head
    for n, layer in enumerate(model.layers):
        found |= {f"model.layers.{n}.{key}": value for key, value in layer.weights.items()}
        assert (layer.experts is not None) == (n in dims.routed_layers)
        if layer.experts is None:
            continue
        np.testing.assert_array_equal(layer.experts.router, built.routers[n])
        np.testing.assert_array_equal(layer.experts.alpha, built.alphas[n])
        for part, e in itertools.product(builders.PARTS, range(dims.experts)):
            ternary = getattr(layer.experts, part)[e]
            np.testing.assert_array_equal(ternary.trits, built.trits[n, e, part])
            scale = np.broadcast_to(ternary.scale[:, 0], len(ternary.trits))
            written = np.broadcast_to(built.scales[n, e, part].reshape(-1), len(ternary.trits))
            np.testing.assert_array_equal(scale, written)
    assert set(found) == set(built.base)
    for key, value in found.items():
        np.testing.assert_array_equal(value, built.base[key], err_msg=key)


@pytest.mark.parametrize("form", ["v32", "real"])
def test_builders_in_every_combination(form: str, tmp_path: Path):
    """Scale forms, alphas, base inside or beside: all; the other options in turn."""
    others = itertools.cycle(
        itertools.product(["old", "new", "both"], ["F32", "BF16", "F16"], [(1,), (0, 2), None])
    )
    combinations = itertools.product(SCALES, ALPHAS, [True, False])
    for count, (scale, alpha, with_base) in enumerate(combinations):
        rope, dtype, moe_layers = next(others)
        options = TINY | {
            "tokenizer": False,
            "seed": count,
            "tied": count % 3 == 0,
            "rope": rope,
            "rope_theta": 1e4 + count,
            "base_dtype": dtype,
            "moe_layers": moe_layers,
            "shards": 1 + count % 4,
        }
        folder = tmp_path / str(count)
        built = builders.write_overlay(
            folder / "overlay",
            form,
            with_base=with_base,
            scale_form=scale,
            alpha=alpha,
            scale_dtype=("F16", "F32")[count % 2],
            **options,
        )
        base = None
        if not with_base:
            base = folder / "base"
            assert set(builders.write_base(base, **options).base) == set(built.base)
        check_read_back(built, read_overlay(built.path, base))
        if alpha == "both":  # then the reader had something to get wrong
            stated = json.loads((built.path / "alpha.json").read_text())
            for n, values in built.alphas.items():
                assert not np.isclose(list(stated[str(n)].values()), values).any()


def test_built_yarn_is_read_in_old_and_new_fields(tmp_path: Path):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.9}
    for rope in ("old", "new", "both"):
        built = builders.write_overlay(tmp_path / rope, rope=rope, yarn=yarn, **TINY)
        assert read_overlay(built.path).scaling == reference.Yarn(4.0, 32, attention_factor=0.9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["v32", "real"])
def test_built_models_are_neither_dull_nor_on_the_edge(form: str, tied: bool, tmp_path: Path):
    built = builders.write_overlay(tmp_path / "o", form, tied=tied)
    model = read_overlay(built.path)
    run = trace(model, built.prompt())
    assert 2 < np.abs(run.logits).max() < 20
    for routing in run.routing.values():
        assert len(np.unique(routing.indices)) == built.dims.experts
    tokens, _ = greedy(model, built.prompt(), 16)
    assert len(set(tokens)) >= 8
    greedy_gap, routing_gap = gaps(model, built.prompt(), 16)
    assert greedy_gap > 0.01 and routing_gap > 1e-4
    silent = with_alphas(model, lambda n, alpha: alpha * 0)
    assert np.abs(forward(silent, built.prompt()) - run.logits).max() > 0.5


def test_tokenizer_loads_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    builders.write_tokenizer(tmp_path, 288, special_list=True)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(tokenizer) == 288
    text = "The heron stands in the water;\n\tnaïve 雨 <|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text.encode())
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    builders.write_tokenizer(tmp_path, 110)
    small = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(small) == 110 and small.decode(small.encode("a b\nc")) == "a b\nc"


def test_damage_does_what_it_says(tmp_path: Path):
    built = builders.write_overlay(tmp_path / "o", shards=2, tokenizer=False, **TINY)
    folder = built.path

    def index() -> dict[str, str]:
        return json.loads((folder / damage.INDEX).read_text())["weight_map"]

    damage.edit_config(folder, top_k=1, rope_theta=damage.REMOVE)
    config = json.loads((folder / "config.json").read_text())
    assert config["top_k"] == 1 and "rope_theta" not in config
    norm = "model.norm.weight"
    file, before = damage.find_tensor(folder, norm)
    damage.replace_tensor(folder, norm, np.full(16, np.nan))
    after = damage.find_tensor(folder, norm)[1]
    assert after.dtype == before.dtype == "BF16" and np.isnan(after.array()).all()
    damage.rename_tensor(folder, norm, "model.norm.w")
    assert damage.find_tensor(folder, "model.norm.w") == (file, after)
    assert norm not in index() and index()["model.norm.w"] == file.name
    damage.drop_tensor(folder, "model.norm.w")
    with pytest.raises(KeyError, match=r"model\.norm\.w"):
        damage.find_tensor(folder, "model.norm.w")
    assert "model.norm.w" not in index()
    damage.add_tensor(folder, norm, np.ones(16, np.float32), "F16", file.name)
    assert index()[norm] == file.name and damage.find_tensor(folder, norm)[1].dtype == "F16"
    size = file.stat().st_size
    damage.truncate(file, 3)
    assert file.stat().st_size == size - 3
    damage.corrupt_header(file)
    with pytest.raises(json.JSONDecodeError):
        tensor_file.read_stored(file)


def test_a_copied_golden_can_be_changed(tmp_path: Path):
    case = golden("v1_real_sharded")
    copy = copy_writable(case.overlay, tmp_path / "copy")
    damage.drop_tensor(copy, "base.model.norm.weight")
    assert (copy / "config.json").stat().st_mode & 0o200
    with pytest.raises(KeyError):
        read_overlay(copy)
