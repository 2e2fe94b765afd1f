"""Bad input: one clear line on stderr, exit code 1, and nothing changed or left on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import outlier_mlx
from outlier_mlx.cli import app
from outlier_mlx.errors import CheckpointError, OutlierError, OutputExistsError
from tests.builders import write_base, write_overlay
from tests.damage import (
    INDEX,
    REMOVE,
    add_tensor,
    corrupt_header,
    drop_tensor,
    edit_config,
    edit_json,
    find_tensor,
    replace_tensor,
    truncate,
)

DIMS: dict[str, Any] = {
    "intermediate": 64,
    "expert_intermediate": 40,
    "layers": 2,
    "moe_layers": (1,),
    "experts": 2,
}
HIDDEN, WIDTH, VOCAB = 64, 40, 288
MLP = "model.layers.1.mlp."
EXPERT = MLP + "experts.1."
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@dataclass(frozen=True)
class Site:
    """A place to work in: sound inputs, and a folder for outputs that holds something already."""

    root: Path

    @property
    def overlay(self) -> Path:
        """A V3.2 overlay with its base, in two shards."""
        return self.root / "overlay"

    @property
    def bare(self) -> Path:
        """The same without base."""
        return self.root / "bare"

    @property
    def base(self) -> Path:
        """Its base."""
        return self.root / "base"

    @property
    def tier(self) -> Path:
        """A tier made from them."""
        return self.root / "tier"

    @property
    def outputs(self) -> Path:
        """Where outputs go."""
        return self.root / "outputs"


def build(root: Path) -> Site:
    site = Site(root)
    write_overlay(site.overlay, shards=2, **DIMS)
    write_overlay(site.bare, with_base=False, tokenizer=False, **DIMS)
    write_base(site.base, shards=2, layers=2, intermediate=64)
    site.outputs.mkdir()
    (site.outputs / "note").write_text("here before")
    return site


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = build(tmp_path_factory.mktemp("sound"))
    outlier_mlx.convert(site.overlay, out=site.tier)
    return site


@pytest.fixture
def site(sound: Site, tmp_path: Path) -> Site:
    return Site(shutil.copytree(sound.root, tmp_path / "site"))


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, link and folder below, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"-> {path.readlink()}"
        elif not path.is_file():
            what = "folder" if path.is_dir() else "pipe"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = what
    return found


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def assert_refused(result: Result, *words: str) -> None:
    """One line on stderr that holds all the words, nothing on stdout, exit code 1."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in lines[0]
    assert len(lines[0]) < 500
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]!r}"


def refuse(site: Site, *command: object, words: tuple[str, ...]) -> None:
    """Run a command that must be refused and must not change a byte below the site."""
    before = snapshot(site.root)
    assert_refused(run(*command), *words)
    assert snapshot(site.root) == before


# -- a damaged overlay ------------------------------------------------------------------------


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the parsed header of a shard and leave its data as it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    corrupt_header(path, json.dumps(header).encode())


def shift(path: Path, key: str, by: int) -> None:
    """Say that a tensor's data begins `by` bytes later."""

    def change(header: dict[str, Any]) -> None:
        header[key]["data_offsets"] = [place + by for place in header[key]["data_offsets"]]

    rewrite_header(path, change)


def changed(folder: Path, key: str, place: tuple[int, ...], value: float) -> None:
    """Put one value into a tensor."""
    array = find_tensor(folder, key)[1].array().copy()
    array[place] = value
    replace_tensor(folder, key, array)


def without_expert(folder: Path) -> None:
    for part in ("gate", "up", "down"):
        drop_tensor(folder, f"{EXPERT}{part}_ternary")
        drop_tensor(folder, f"{EXPERT}{part}_scale")


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def holder(folder: Path) -> str:
    """The shard of the last norm."""
    return find_tensor(folder, "model.norm.weight")[0].name


def listed_elsewhere(folder: Path, name: str, key: str = "model.norm.weight") -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {key: name})


def linked_out(folder: Path, name: str) -> None:
    """Move a file out of the folder and leave a link to it."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)


def in_both_shards(folder: Path) -> None:
    _, tensor = find_tensor(folder, "model.norm.weight")
    other = SECOND if holder(folder) == FIRST else FIRST
    add_tensor(folder, "model.norm.weight", tensor.array(), tensor.dtype, other)


def alpha_json(text: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "alpha.json").write_text(text)

    return write


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **changes)


def tensor(key: str, value: Any, dtype: str | None = None) -> Callable[[Path], object]:
    return lambda folder: replace_tensor(folder, key, value, dtype)


def shape(*sizes: int) -> np.ndarray:
    return np.zeros(sizes, np.float32)


# What is done to the overlay, and what the message must say.
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
        ("alpha.json", "layer 1, expert 0", "inf"),
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
    "heads that do not divide": (config(num_attention_heads=5), ("config.json", "5 heads")),
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
        ("config.json", "rope_theta = 1000000.0", "rope_parameters.rope_theta = 5.0"),
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


# -- a damaged base, and pairs that do not fit ------------------------------------------------

BASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("base", "config.json")),
    "no shards": (lambda f: remove(f, "*.safetensors"), ("base",)),
    "truncated": (lambda f: truncate(f / FIRST, 1), (FIRST, "truncated")),
    "another hidden size": (
        config(hidden_size=128),
        ("different models", "hidden", "64", "128"),
    ),
    "another vocabulary": (config(vocab_size=300), ("different models", "vocab", "288", "300")),
    "another depth": (config(num_hidden_layers=3), ("different models", "layers", "2", "3")),
    "a tensor missing": (
        lambda f: drop_tensor(f, "model.layers.0.mlp.gate_proj.weight"),
        ("base", "model.layers.0.mlp.gate_proj.weight", "(64, 64)", "missing"),
    ),
    "a tensor of another shape": (
        tensor("lm_head.weight", shape(VOCAB, HIDDEN + 1)),
        ("safetensors", "lm_head.weight", "(288, 65)", "(288, 64)"),
    ),
    "NaN": (
        lambda f: changed(f, "lm_head.weight", (-1, -1), np.nan),
        ("safetensors", "lm_head.weight", "NaN"),
    ),
    "a shard that links out": (lambda f: linked_out(f, FIRST), (FIRST, "links out")),
}


@pytest.mark.parametrize("name", BASES)
def test_a_damaged_base_is_refused(site: Site, name: str) -> None:
    damage, words = BASES[name]
    damage(site.base)
    command = ("convert", site.bare, "--base", site.base, "--out", site.outputs / "tier")
    refuse(site, *command, words=words)


def test_a_base_that_changes_a_tensor_of_the_overlay_is_refused(site: Site) -> None:
    changed(site.base, "model.norm.weight", (5,), 3.0)
    command = ("convert", site.overlay, "--base", site.base, "--out", site.outputs / "tier")
    refuse(site, *command, words=("model.norm.weight", "differs", "base"))


# -- arguments --------------------------------------------------------------------------------

# Placeholders are replaced by the site's paths.
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no such overlay": (("convert", "{root}/nowhere"), ("nowhere", "no such folder")),
    "no such overlay, nor repository": (("convert", "no/such/place"), ("no/such/place", "OWNER")),
    "a file for an overlay": (("convert", "{outputs}/note"), ("note", "no such folder")),
    "an empty folder": (("convert", "{root}/empty"), ("empty", "not an overlay")),
    "a base for an overlay": (("convert", "{base}"), ("base", "not an overlay")),
    "a tier for an overlay": (("convert", "{tier}"), ("tier", "tier already")),
    "no base": (("convert", "{bare}"), ("bare", "--base")),
    "no such base": (("convert", "{bare}", "--base", "{root}/nowhere"), ("nowhere", "folder")),
    "a tier for a base": (("convert", "{bare}", "--base", "{tier}"), ("tier", "a base model")),
    "revision of a folder": (("convert", "{overlay}", "--revision", "main"), ("no revision",)),
    "no such alphas": (("convert", "{overlay}", "--alpha", "{root}/a.json"), ("a.json", "No such")),
    "alphas that are no JSON": (
        ("convert", "{overlay}", "--alpha", "{outputs}/note"),
        ("note", "not valid JSON"),
    ),
    "a width that affine2 cannot hold": (
        ("convert", "{overlay}", "--experts", "affine2"),
        ("safetensors", "down_ternary", "40", "affine2", "tq1_0"),
    ),
    "an overlay for a tier": (
        ("generate", "--model", "{overlay}", "--prompt", "x"),
        ("overlay", "an overlay", "outlier-mlx convert"),
    ),
    "no such tier": (("generate", "--model", "{root}/nowhere", "--prompt", "x"), ("nowhere",)),
    "KV cache in 7 bits": (
        ("generate", "--model", "{tier}", "--prompt", "x", "--kv-bits", "7"),
        ("--kv-bits 7", "8"),
    ),
    "KV cache in groups that do not divide": (
        ("generate", "--model", "{tier}", "--prompt", "x", "--kv-bits", "4"),
        ("--kv-group-size 64", "16"),
    ),
    "KV cache quantized and bounded": (
        ("generate", "--model", "{tier}", "--prompt", "x", "--kv-bits", "4", "--max-kv-size", "8"),
        ("--kv-bits", "--max-kv-size"),
    ),
    "nothing to describe": (("info", "{outputs}"), ("outputs", "config.json")),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_refused(site: Site, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.root / "empty").mkdir()
    monkeypatch.chdir(site.outputs)
    command, words = ARGUMENTS[name]
    paths = {n: getattr(site, n) for n in ("root", "overlay", "bare", "base", "tier", "outputs")}
    refuse(site, *(word.format(**paths) for word in command), words=words)


@pytest.mark.parametrize(
    "command",
    [
        ("convert",),
        ("convert", "x", "--tier", "q5"),
        ("convert", "x", "--group-size", "48"),
        ("convert", "x", "--unknown"),
        ("generate", "--prompt", "x"),
        ("generate", "--model", "x", "--prompt", "x", "--max-tokens", "0"),
        ("generate", "--model", "x", "--prompt", "x", "--temp", "-1"),
        ("generate", "--model", "x", "--prompt", "x", "--top-p", "1.5"),
        ("info",),
        ("unknown",),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(command: tuple[str, ...]) -> None:
    result = run(*command)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr
    assert "Traceback" not in result.stderr


# -- a damaged tier ---------------------------------------------------------------------------

WEIGHTS = "model-00001-of-00001.safetensors"
SWITCH = MLP + "switch_mlp."
TIERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (lambda f: truncate(f / WEIGHTS, 1), (WEIGHTS, "truncated")),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("tier",)),
    "header that is no JSON": (lambda f: corrupt_header(f / WEIGHTS), (WEIGHTS, "JSON")),
    "a tensor missing": (
        lambda f: drop_tensor(f, SWITCH + "up_proj.scales"),
        ("tier", SWITCH + "up_proj.scales"),
    ),
    "a tensor too many": (
        lambda f: add_tensor(f, "model.extra.weight", shape(2)),
        ("tier", "model.extra.weight"),
    ),
    "a tensor of another shape": (
        tensor(SWITCH + "up_proj.scales", shape(2, WIDTH - 1)),
        ("tier", SWITCH + "up_proj.scales", "(2, 39)", "(2, 40)"),
    ),
    "no tokenizer": (
        lambda f: remove(f, "tokenizer*"),
        ("tier", "no usable tokenizer"),
    ),
    "tokenizer that is no JSON": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        ("tier", "no usable tokenizer"),
    ),
    "config that is no JSON": (lambda f: truncate(f / "config.json", 5), ("config.json", "JSON")),
    "format of the future": (
        config(ternary={"format": "tq1_0_rows", "version": 2}),
        ("tier", "version 2"),
    ),
    "unknown format": (config(ternary={"format": "tq9", "version": 1}), ("tier", "tq9")),
    "format as text": (config(ternary="tq1_0_rows"), ("tier",)),
    "no heads": (config(num_attention_heads=0), ("config.json", "num_attention_heads")),
    "no such layer": (config(moe_layers=[1, 9]), ("config.json", "moe_layers", "0 to 1")),
    "absurd layers": (config(num_hidden_layers=10**12), ("config.json", "num_hidden_layers")),
}


@pytest.mark.parametrize("name", TIERS)
def test_a_damaged_tier_does_not_generate(site: Site, name: str) -> None:
    damage, words = TIERS[name]
    damage(site.tier)
    refuse(site, "generate", "--model", site.tier, "--prompt", "x", words=words)


# -- outputs that exist -----------------------------------------------------------------------


def test_an_existing_output_needs_force(site: Site) -> None:
    command = ("convert", site.overlay, "--out", site.tier)
    refuse(site, *command, words=("tier", "exists", "--force"))


def test_force_replaces_a_tier_whole(site: Site) -> None:
    (site.tier / "leftover").write_text("of the old tier")
    assert (
        run("convert", site.overlay, "--out", site.tier, "--tier", "f32", "--force").exit_code == 0
    )
    assert not (site.tier / "leftover").exists()
    assert json.loads((site.tier / "config.json").read_text())["dtype"] == "float32"
    assert [path.name for path in site.root.iterdir() if path.name.startswith(".")] == []


def test_force_fills_an_empty_folder(site: Site) -> None:
    (site.root / "empty").mkdir()
    assert run("convert", site.overlay, "--out", site.root / "empty", "--force").exit_code == 0
    assert (site.root / "empty" / "tier.json").exists()


def test_force_replaces_nothing_that_is_no_tier(site: Site) -> None:
    for target in (site.outputs, site.overlay, site.root):
        command = ("convert", site.overlay, "--out", target, "--force")
        refuse(site, *command, words=(target.name, "not a tier"))


def test_an_output_that_is_no_folder_is_refused(site: Site) -> None:
    link = site.root / "link"
    link.symlink_to(site.tier)
    for target in (site.outputs / "note", link):
        command = ("convert", site.overlay, "--out", target, "--force")
        refuse(site, *command, words=(target.name, "not a folder"))
    below_a_file = ("convert", site.overlay, "--out", site.outputs / "note" / "tier")
    refuse(site, *below_a_file, words=("note", "cannot write"))


# -- what is said, and to whom ----------------------------------------------------------------


def test_without_a_tokenizer_the_tier_is_made_and_a_warning_says_so(site: Site) -> None:
    remove(site.overlay, "tokenizer*")
    result = run("convert", site.overlay, "--out", site.outputs / "tier", "--quiet")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: overlay: no tokenizer")


def test_debug_raises_what_happened(site: Site) -> None:
    result = run("convert", site.root / "nowhere", "--debug")
    assert isinstance(result.exception, CheckpointError)


def test_python_raises_the_same_errors(site: Site) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        outlier_mlx.convert(site.root / "nowhere")
    with pytest.raises(OutputExistsError, match="exists"):
        outlier_mlx.convert(site.overlay, out=site.tier)
    with pytest.raises(CheckpointError, match="an overlay"):
        outlier_mlx.load(site.overlay)
    with pytest.raises(OutlierError, match="'q5': expected one of q4"):
        outlier_mlx.convert(site.overlay, tier="q5")


def test_links_of_a_hub_cache_are_followed(site: Site) -> None:
    """Snapshots there hold links to blobs of the repository, which may be links to shared ones."""
    repo = site.root / "models--owner--name"
    snapshot_folder = repo / "snapshots" / "0123abcd"
    (repo / "blobs").mkdir(parents=True)
    snapshot_folder.mkdir(parents=True)
    shared = site.root / "blobs" / "ab"
    shared.mkdir(parents=True)
    for number, path in enumerate(sorted(site.overlay.iterdir())):
        blob = f"{number:040x}"
        if path.suffix == ".safetensors":
            path.rename(shared / blob)
            (repo / "blobs" / blob).symlink_to(Path("../../blobs/ab") / blob)
        else:
            path.rename(repo / "blobs" / blob)
        (snapshot_folder / path.name).symlink_to(Path("../../blobs") / blob)
    assert run("convert", snapshot_folder, "--out", site.outputs / "tier").exit_code == 0
    written, expected = snapshot(site.outputs / "tier"), snapshot(site.tier)
    for differs in ("README.md", "tier.json"):
        del written[differs], expected[differs]
    assert written == expected
