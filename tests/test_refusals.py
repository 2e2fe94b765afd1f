"""Damaged overlays: one clear line on stderr, exit code 1, and nothing changed or left on disk."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.damage import (
    INDEX,
    REMOVE,
    add_tensor,
    corrupt_header,
    drop_tensor,
    truncate,
)
from tests.refusals import (
    EXPERT,
    FIRST,
    HIDDEN,
    MLP,
    SECOND,
    VOCAB,
    WIDTH,
    Site,
    alpha_json,
    changed,
    config,
    holder,
    in_both_shards,
    linked_out,
    listed_elsewhere,
    refuse,
    remove,
    rewrite_header,
    shape,
    shift,
    tensor,
    without_expert,
)

OVERLAYS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("overlay", "config.json")),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "object")),
    "config is cut": (lambda f: truncate(f / "config.json", 9), ("config.json", "not valid JSON")),
    "no shards": (lambda f: remove(f, "*.safetensors"), ("overlay",)),
    # Tensors: missing, of another shape or dtype, twice
    "no norm": (
        lambda f: drop_tensor(f, "model.norm.weight"),
        ("overlay", "model.norm.weight", "(64,)", "missing"),
    ),
    "one bias of three missing": (
        lambda f: drop_tensor(f, "model.layers.0.self_attn.k_proj.bias"),
        ("overlay", "model.layers.0.self_attn.k_proj.bias", "(32,)", "missing"),
    ),
    "no head": (lambda f: drop_tensor(f, "lm_head.weight"), ("lm_head.weight", "(288, 64)")),
    "no router": (lambda f: drop_tensor(f, MLP + "router.weight"), ("overlay", "layers [1]", "[]")),
    "no trits": (
        lambda f: drop_tensor(f, EXPERT + "down_ternary"),
        ("overlay", "layer 1", "expert 1", "down trits", "missing"),
    ),
    "no scale": (
        lambda f: drop_tensor(f, EXPERT + "gate_scale"),
        ("overlay", "layer 1", "expert 1", "gate scale", "missing"),
    ),
    "no expert": (without_expert, ("overlay", "layer 1", "expert 1", "missing")),
    "an expert too many": (
        lambda f: add_tensor(f, MLP + "experts.2.gate_ternary", np.zeros((WIDTH, HIDDEN), np.int8)),
        (FIRST, "experts.2.gate_ternary", "2 experts"),
    ),
    "embedding of another shape": (
        tensor("model.embed_tokens.weight", shape(VOCAB - 1, HIDDEN)),
        (FIRST, "model.embed_tokens.weight", "(287, 64)", "(288, 64)"),
    ),
    "router of another shape": (
        tensor(MLP + "router.weight", shape(3, HIDDEN)),
        ("safetensors", MLP + "router.weight", "(3, 64)", "(2, 64)"),
    ),
    "trits of another shape": (
        tensor(EXPERT + "up_ternary", np.zeros((WIDTH + 1, HIDDEN), np.int8)),
        ("safetensors", EXPERT + "up_ternary", "(41, 64)", "(40, 64)"),
    ),
    "scale of another shape": (
        tensor(EXPERT + "up_scale", shape(WIDTH - 1, 1)),
        ("safetensors", EXPERT + "up_scale", "(39, 1)", "(40, 1)"),
    ),
    "scale of integers": (
        tensor(EXPERT + "up_scale", np.ones(1, np.int32), "I32"),
        ("safetensors", EXPERT + "up_scale", "I32", "float"),
    ),
    "trits in unsigned bytes": (
        tensor(EXPERT + "up_ternary", np.zeros((WIDTH, HIDDEN), np.uint8), "U8"),
        ("safetensors", EXPERT + "up_ternary", "U8", "I8"),
    ),
    "the same key in two shards": (in_both_shards, ("model.norm.weight", FIRST, SECOND)),
    "two spellings": (
        lambda f: add_tensor(f, "base.model.norm.weight", shape(HIDDEN), "BF16"),
        ("base.model.norm.weight", "same weight", ": model.norm.weight"),
    ),
    # Values
    "NaN scale": (tensor(EXPERT + "up_scale", [np.nan]), (EXPERT + "up_scale", "nan", "finite")),
    "infinite scale": (tensor(EXPERT + "up_scale", [np.inf]), (EXPERT + "up_scale", "inf")),
    "negative scale": (tensor(EXPERT + "up_scale", [-0.5]), (EXPERT + "up_scale", "-0.5", "0 or")),
    "a trit of 2": (
        lambda f: changed(f, EXPERT + "up_ternary", (7, 3), 2),
        ("safetensors", EXPERT + "up_ternary", "2 at row 7, column 3", "-1, 0 or 1"),
    ),
    "a trit of -128, last": (
        lambda f: changed(f, EXPERT + "down_ternary", (-1, -1), -128),
        (EXPERT + "down_ternary", "-128 at row 63, column 39"),
    ),
    "NaN in a matrix": (
        lambda f: changed(f, "model.layers.0.mlp.up_proj.weight", (63, 63), np.nan),
        ("safetensors", "model.layers.0.mlp.up_proj.weight", "NaN"),
    ),
    "infinity in a norm": (
        lambda f: changed(f, "model.norm.weight", (0,), np.inf),
        ("safetensors", "model.norm.weight", "infinity"),
    ),
    "NaN in a router": (
        lambda f: changed(f, MLP + "router.weight", (1, 1), np.nan),
        ("safetensors", MLP + "router.weight", "NaN"),
    ),
    # Files
    "truncated": (lambda f: truncate(f / SECOND, 1), (SECOND, "truncated")),
    "padded": (lambda f: (f / SECOND).open("ab").write(b"\0"), (SECOND, "padded")),
    "empty": (lambda f: (f / SECOND).write_bytes(b""), (SECOND, "not a whole")),
    "header longer than the file": (
        lambda f: (f / SECOND).write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"),
        (SECOND, "header"),
    ),
    "header that is no JSON": (lambda f: corrupt_header(f / SECOND), (SECOND, "not valid JSON")),
    "header that is a list": (lambda f: corrupt_header(f / SECOND, b"[]"), (SECOND, "object")),
    "overlapping": (
        lambda f: shift(f / FIRST, "model.embed_tokens.weight", 2),
        (FIRST, "overlaps"),
    ),
    "size that does not fit": (
        lambda f: rewrite_header(
            f / FIRST, lambda h: h["model.embed_tokens.weight"].update(shape=[VOCAB, HIDDEN - 1])
        ),
        (FIRST, "model.embed_tokens.weight", "36864 bytes", "36288"),
    ),
    "unknown dtype": (
        lambda f: rewrite_header(
            f / FIRST, lambda h: h["model.embed_tokens.weight"].update(dtype="F8")
        ),
        (FIRST, "model.embed_tokens.weight", "'F8'"),
    ),
    "a pipe for a shard": (
        lambda f: os.mkfifo(f / "x.safetensors"),
        ("x.safetensors",),
    ),
    # The index
    "index names no such file": (
        lambda f: listed_elsewhere(f, "model-9.safetensors"),
        ("model-9.safetensors", "no such file"),
    ),
    "index names the wrong file": (
        lambda f: listed_elsewhere(f, SECOND if holder(f) == FIRST else FIRST),
        (INDEX, "model.norm.weight", "is not in"),
    ),
    "index names no tensor": (
        lambda f: listed_elsewhere(f, FIRST, "model.norm.bias"),
        (INDEX, "model.norm.bias", FIRST),
    ),
    "index climbs out": (
        lambda f: listed_elsewhere(f, f"../{f.name}/{FIRST}"),
        ("overlay", f"../overlay/{FIRST}"),
    ),
    "index is absolute": (
        lambda f: listed_elsewhere(f, str(f / FIRST)),
        ("overlay", FIRST, "plain path"),
    ),
    "index with a backslash": (
        lambda f: listed_elsewhere(f, f"sub\\{FIRST}"),
        ("overlay", "plain path"),
    ),
    "index with NUL": (lambda f: listed_elsewhere(f, "a\0b"), ("overlay", "plain path")),
    "index without a map": (
        lambda f: (f / INDEX).write_text("{}"),
        (INDEX, "weight_map"),
    ),
    "shard links out": (lambda f: linked_out(f, FIRST), (FIRST, "links out")),
    "config links out": (lambda f: linked_out(f, "config.json"), ("config.json", "links out")),
    "tokenizer links out": (lambda f: linked_out(f, "tokenizer.json"), ("tokenizer.json", "links")),
    # Alphas
    "alphas of another shape": (
        tensor(MLP + "alpha_values", shape(3)),
        (MLP + "alpha_values", "(3,)", "(2,)"),
    ),
    "alphas with NaN": (
        tensor(MLP + "alpha_values", [0.5, np.nan]),
        (MLP + "alpha_values", "expert 1", "nan"),
    ),
    "alpha.json is cut": (alpha_json('{"1": {"0": '), ("alpha.json", "not valid JSON")),
    "alpha.json with NaN": (alpha_json('{"1": {"0": NaN}}'), ("alpha.json", "NaN")),
    "alpha.json with a boolean": (alpha_json('{"1": {"0": true}}'), ("alpha.json", "True")),
    "alpha.json with too large a number": (
        alpha_json('{"1": {"0": 1e999}}'),
        ("alpha.json", "0: the number 1e999 is too large"),
    ),
    "alpha.json beyond the layers": (alpha_json('{"2": {"0": 1}}'), ("alpha.json", "layer 2")),
    "alpha.json beyond the experts": (alpha_json('{"1": {"2": 1}}'), ("alpha.json", "expert 2")),
    "alpha.json with a key twice": (alpha_json('{"1": {"0": 1, "0": 2}}'), ("alpha.json", "twice")),
    # The config
    "no hidden size": (config(hidden_size=REMOVE), ("config.json", "hidden_size", "missing")),
    "hidden size as text": (config(hidden_size="64"), ("config.json", "hidden_size", "'64'")),
    "hidden size that is true": (config(hidden_size=True), ("config.json", "hidden_size", "True")),
    "negative layers": (config(num_hidden_layers=-1), ("config.json", "num_hidden_layers", "-1")),
    "absurd layers": (config(num_hidden_layers=10**12), ("config.json", "num_hidden_layers")),
    "absurd experts": (config(n_experts=10**12), ("config.json", "n_experts")),
    "heads that do not divide": (
        config(num_attention_heads=5),
        ("config.json", "5 attention heads"),
    ),
    "KV heads that do not divide": (config(num_key_value_heads=3), ("config.json", "3 KV heads")),
    "aliases that disagree": (
        config(hidden_dim=128),
        ("config.json", "hidden_dim = 128", "hidden_size = 64"),
    ),
    "no experts a token": (config(top_k=0), ("config.json", "top_k", "0")),
    "MoE layer out of range": (
        config(moe_layer_indices=[2]),
        ("config.json", "moe_layer_indices", "0 to 1"),
    ),
    "MoE layer twice": (config(moe_layer_indices=[1, 1]), ("config.json", "moe_layer_indices")),
    "MoE lists that disagree": (
        config(moe_layers=[0]),
        ("config.json", "moe_layer_indices", "moe_layers", "different layers"),
    ),
    "MoE layer without a router": (
        config(moe_layer_indices=[0, 1]),
        ("overlay", "[0, 1]", "[1]"),
    ),
    "router in a dense layer": (config(moe_layer_indices=[]), ("overlay", "[]", "[1]")),
    "negative eps": (config(rms_norm_eps=-1e-6), ("config.json", "rms_norm_eps", "-1e-06")),
    "infinite RoPE base": (config(rope_theta=10**400), ("config.json", "rope_theta")),
    "RoPE bases that disagree": (
        config(rope_parameters={"rope_theta": 5.0}),
        ("config.json", "rope_theta is 1000000.0", "rope_parameters.rope_theta is 5.0"),
    ),
    "RoPE scaling of another type": (
        config(rope_scaling={"type": "linear", "factor": 2.0}),
        ("config.json", "linear", "yarn"),
    ),
    "RoPE scaling with a list for a type": (
        config(rope_scaling={"type": ["yarn"], "factor": 2.0}),
        ("config.json", "yarn"),
    ),
    "YaRN of factor 0": (
        config(rope_scaling={"type": "yarn", "factor": 0, "original_max_position_embeddings": 64}),
        ("config.json", "factor", "0"),
    ),
    "tying as text": (config(tie_word_embeddings="no"), ("config.json", "tie_word_embeddings")),
    "another architecture": (config(model_type="llama"), ("config.json", "model_type", "llama")),
    "another activation": (config(hidden_act="gelu"), ("config.json", "hidden_act", "gelu")),
}


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_damaged_overlay_is_refused(site: Site, name: str) -> None:
    damage, words = OVERLAYS[name]
    damage(site.overlay)
    refuse(site, "convert", site.overlay, "--out", site.outputs / "tier", words=words)


def test_gapped_offsets_are_refused(site: Site) -> None:
    path = site.overlay / FIRST
    header_end = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]

    def move_all(header: dict[str, Any]) -> None:
        for entry in header.values():
            if "data_offsets" in entry:
                entry["data_offsets"] = [place + 2 for place in entry["data_offsets"]]

    data = path.read_bytes()
    path.write_bytes(data[:header_end] + b"\0\0" + data[header_end:])
    rewrite_header(path, move_all)
    command = ("convert", site.overlay, "--out", site.outputs / "tier")
    refuse(site, *command, words=(FIRST, "leaves a gap"))
