"""Opening overlays: what is found, under whatever spelling, and how little is read for it."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx import open_overlay
from outlier_mlx.checkpoints.base import join, open_base
from tests import damage, tensor_file
from tests.builders import Dims, model_config, write_base, write_overlay
from tests.forms import assert_same_contents, contents, written


@pytest.mark.parametrize("form", ["v32", "real"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_form": ("0d", "per_row", "flat_row"), "scale_dtype": "F32", "shards": 5},
        {"base_dtype": "F16", "alpha": "both", "tied": True, "moe_layers": None},
        {"base_dtype": "F32", "alpha": "partial", "hidden": 44, "heads": 2, "experts": 1},
    ],
    ids=["plain", "shards", "every-layer", "one-expert"],
)
def test_an_overlay_holds_what_was_written(form: str, options: dict[str, Any], tmp_path: Path):
    built = write_overlay(tmp_path / "o", form, tokenizer=False, **options)
    overlay = open_overlay(built.path)
    assert overlay.form == {"v32": "v3.2", "real": "real"}[form]
    assert overlay.path == built.path and not overlay.unused
    dims, config = built.dims, overlay.config
    assert (config.hidden, config.layers, config.vocab) == (dims.hidden, dims.layers, dims.vocab)
    assert config.moe_layers == dims.routed_layers == tuple(sorted(overlay.experts))
    assert overlay.expert_intermediate == dims.expert_intermediate
    assert_same_contents(contents(overlay), written(built))


def test_rows_are_read_as_asked_for(tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False, scale_form="per_row")
    matrix = open_overlay(built.path).experts[3][2].down
    trits = built.trits[3, 2, "down"]
    for start, stop in [(0, None), (0, 1), (5, 9), (63, 64), (60, 999), (7, 7)]:
        np.testing.assert_array_equal(matrix.trits.read(start, stop), trits[start:stop])
    norm = open_overlay(built.path).base["model.norm.weight"]
    np.testing.assert_array_equal(norm.read_float32(3, 8), built.base["model.norm.weight"][3:8])


@pytest.mark.parametrize("form", ["v32", "real"])
def test_spellings_of_an_experts_tensors(form: str, tmp_path: Path):
    built = write_overlay(tmp_path / "o", form, tokenizer=False, shards=2)
    prefix = "base." if form == "real" else ""
    for n, e, part in built.trits:
        if (n + e) % 2:
            stem = f"{prefix}model.layers.{n}.mlp.experts.{e}.{part}"
            damage.rename_tensor(built.path, f"{stem}_ternary", f"{stem}_proj.weight")
            damage.rename_tensor(built.path, f"{stem}_scale", f"{stem}_proj.scale")
    assert_same_contents(contents(open_overlay(built.path)), written(built))


def test_a_repacked_folder_mixes_the_forms(tmp_path: Path):
    """Base shards are plain Qwen2, expert shards have `base.` before their keys."""
    built = write_overlay(tmp_path / "o", "v32", tokenizer=False)
    for n, e, part in built.trits:
        for leaf in ("ternary", "scale"):
            key = f"model.layers.{n}.mlp.experts.{e}.{part}_{leaf}"
            damage.rename_tensor(built.path, key, f"base.{key}")
    for n in built.routers:
        key = f"model.layers.{n}.mlp.router.weight"
        damage.rename_tensor(built.path, key, key.removeprefix("model.") if n == 1 else key)
    assert_same_contents(contents(open_overlay(built.path)), written(built))


def test_what_is_not_loaded_is_listed(tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False)
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    damage.add_tensor(built.path, extra, np.ones(8, np.float32))
    overlay = open_overlay(built.path)
    assert overlay.unused == (extra,)
    assert_same_contents(contents(overlay), written(built))


def test_a_base_gives_what_the_overlay_has_not(tmp_path: Path):
    options: dict[str, Any] = {"tokenizer": False, "base_dtype": "F16"}
    overlay = write_overlay(tmp_path / "o", with_base=False, **options)
    base = write_base(tmp_path / "b", shards=3, rope="new", **options)
    model = join(open_overlay(overlay.path), open_base(base.path))
    assert {name: tensor.file.parent for name, tensor in model.base.items()} == dict.fromkeys(
        base.base, base.path
    )
    assert not model.twins and list(model.config.moe_layers) == list(overlay.dims.routed_layers)
    assert model.config.max_positions == 512
    damage.edit_config(overlay.path, max_position_embeddings=damage.REMOVE, max_seq_len=4096)
    model = join(open_overlay(overlay.path), open_base(base.path))
    assert model.config.max_positions == 4096

    # A tensor that both hold is taken from the overlay, and kept to be compared with the base's.
    damage.add_tensor(overlay.path, "model.norm.weight", base.base["model.norm.weight"], "F32")
    model = join(open_overlay(overlay.path), open_base(base.path))
    assert model.base["model.norm.weight"].file.parent == overlay.path
    assert model.twins["model.norm.weight"].file.parent == base.path
    assert list(model.twins) == ["model.norm.weight"]


# How little is read


def write_holes(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """A safetensors file whose data is a hole in the file system; returns its size."""
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = int(np.prod(shape)) * {"I8": 1, "F16": 2, "BF16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end


def big_shapes(dims: Dims) -> dict[str, tuple[str, tuple[int, ...]]]:
    """An overlay of Qwen2.5-14B's shapes, base included."""
    h, kv = dims.hidden, dims.kv_heads * dims.hidden // dims.heads
    ffn = {"gate": (dims.intermediate, h), "up": (dims.intermediate, h)}
    ffn["down"] = (h, dims.intermediate)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in ("model.embed_tokens", "lm_head"):
        shapes[f"{name}.weight"] = ("BF16", (dims.vocab, h))
    shapes["model.norm.weight"] = ("BF16", (h,))
    for n in range(dims.layers):
        layer = f"model.layers.{n}."
        for norm in ("input", "post_attention"):
            shapes[f"{layer}{norm}_layernorm.weight"] = ("BF16", (h,))
        for name, out in (("q", h), ("k", kv), ("v", kv), ("o", h)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = ("BF16", (out, h))
            if name != "o":
                shapes[f"{layer}self_attn.{name}_proj.bias"] = ("BF16", (out,))
        for part, shape in ffn.items():
            shapes[f"{layer}mlp.{part}_proj.weight"] = ("BF16", shape)
        if n not in dims.routed_layers:
            continue
        shapes[f"{layer}mlp.router.weight"] = ("BF16", (dims.experts, h))
        for e in range(dims.experts):
            for part, shape in ffn.items():
                shapes[f"{layer}mlp.experts.{e}.{part}_ternary"] = ("I8", shape)
                shapes[f"{layer}mlp.experts.{e}.{part}_scale"] = ("F16", (shape[0], 1))
    return shapes


def test_opening_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dims = Dims(
        hidden=5120,
        intermediate=13824,
        vocab=152064,
        layers=48,
        moe_layers=tuple(range(20, 24)),
        experts=8,
        heads=40,
        kv_heads=8,
    )
    size = write_holes(tmp_path / "model.safetensors", big_shapes(dims))
    assert size > 35e9
    config = model_config(dims) | {"n_experts": 8, "moe_layer_indices": [20, 21, 22, 23]}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def refuse(*_: Any) -> int:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(os, "preadv", refuse)
    start = time.perf_counter()
    overlay = open_overlay(tmp_path)
    whole = join(overlay, None)
    assert time.perf_counter() - start < 2
    assert len(whole.base) == 2 + 1 + 48 * 12
    assert overlay.experts[23][7].down.trits.shape == (5120, 13824)
    with pytest.raises(AssertionError, match="data was read"):
        overlay.experts[23][7].down.trits.read(0, 1)


def test_sources_are_not_touched(tmp_path: Path):
    built = write_overlay(tmp_path / "o", alpha="both", shards=2)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in built.path.iterdir()}
    contents(open_overlay(built.path))
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in built.path.iterdir()} == before
    assert tensor_file.read_stored(sorted(built.path.glob("*.safetensors"))[0])
