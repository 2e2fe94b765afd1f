"""Broken overlays of the forms that have more than one file, of V0, and of forms nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx import open_overlay
from outlier_mlx.errors import CheckpointError
from tests import damage
from tests.builders import Built, write_base, write_overlay
from tests.form_builders import write_toy_dense
from tests.forms import build, refused
from tests.tensor_file import Stored, read_stored, stored, write_stored

ONE = "experts/layer_01_expert_02.safetensors"


def edit(built: Built, file: str, change: Callable[[dict[str, Stored]], Any]) -> None:
    """Change the tensors of a file."""
    tensors = read_stored(built.path / file)
    change(tensors)
    write_stored(built.path / file, tensors)


def replace(path: Path, make: Callable[[Path], Any]) -> None:
    """Put something else in a file's place."""
    path.unlink()
    make(path)


def outside(built: Built) -> Path:
    """A sound file of another expert, beside the overlay."""
    path = built.path.parent / "outside"
    path.write_bytes((built.path / "experts/layer_01_expert_00.safetensors").read_bytes())
    return path


EXPERT_FILES: dict[str, tuple[Callable[[Built], Any], tuple[str, ...]]] = {
    "a file is missing": (lambda b: (b.path / ONE).unlink(), (ONE, "missing")),
    "a name that says nothing": (
        lambda b: (b.path / ONE).rename(b.path / "experts/layer_1_exp_2.safetensors"),
        ("layer_1_exp_2.safetensors", "layer_N_expert_E"),
    ),
    "two files for one expert": (
        lambda b: (b.path / "experts/layer_1_expert_2.safetensors").write_bytes(
            (b.path / ONE).read_bytes()
        ),
        ("layer_1_expert_2.safetensors", "same expert", ONE),
    ),
    "an extra key": (
        lambda b: edit(b, ONE, lambda t: t.update({"bias": stored(np.ones(3, np.float32))})),
        (ONE, "bias"),
    ),
    "a missing key": (
        lambda b: edit(b, ONE, lambda t: t.pop("up_scale")),
        ("layer 1, expert 2", "up scale is missing"),
    ),
    "a key twice": (
        lambda b: edit(b, ONE, lambda t: t.update({"up_proj.scale": t["up_scale"]})),
        ("layer_01_expert_02", "same weight"),
    ),
    "a router is missing": (
        lambda b: edit(b, "router_state.safetensors", lambda t: t.pop("layers.3.router.weight")),
        ("no router for layer 3", "layers.1.router.weight"),
    ),
    "keys of routers that nobody knows": (
        lambda b: edit(
            b,
            "router_state.safetensors",
            lambda t: t.update({"r.3": t.pop("layers.3.router.weight")}),
        ),
        ("no router for layer 3", "layers.1.router.weight"),
    ),
    "an expert of a layer that is not MoE": (
        lambda b: (b.path / "experts/layer_02_expert_00.safetensors").write_bytes(
            (b.path / ONE).read_bytes()
        ),
        ("[2]", "not MoE"),
    ),
    "an expert too many": (
        lambda b: (b.path / "experts/layer_01_expert_04.safetensors").write_bytes(
            (b.path / ONE).read_bytes()
        ),
        ("layer_01_expert_04", "4 experts"),
    ),
    "a layer too many": (
        lambda b: (b.path / "experts/layer_99999999999999999999_expert_0.safetensors").write_bytes(
            (b.path / ONE).read_bytes()
        ),
        ("layer_9999", "4 layers"),
    ),
    "a truncated file": (
        lambda b: damage.truncate(b.path / ONE, 5),
        ("layer_01_expert_02", "truncated"),
    ),
    "a file that is none": (
        lambda b: replace(b.path / ONE, Path.mkdir),
        (ONE, "no such file"),
    ),
    "a link out of the folder": (
        lambda b: replace(b.path / ONE, lambda path: path.symlink_to(outside(b))),
        ("layer_01_expert_02", "links out"),
    ),
    "no config": (lambda b: (b.path / "config.json").unlink(), ("no config.json", "base")),
    "widths that differ": (
        lambda b: edit(
            b, ONE, lambda t: t.update({"gate_ternary": stored(np.zeros((81, 64), np.int8))})
        ),
        ("gate_ternary", "(81, 64)", "(80, 64)"),
    ),
    "a scale of another shape": (
        lambda b: edit(b, ONE, lambda t: t.update({"gate_scale": stored(np.ones((2, 1)), "F16")})),
        ("gate_scale", "(2, 1)"),
    ),
    "a scale that is no float": (
        lambda b: edit(b, ONE, lambda t: t.update({"gate_scale": stored(np.ones(1, np.int32))})),
        ("gate_scale", "I32"),
    ),
    "a scale that is not finite": (
        lambda b: edit(b, ONE, lambda t: t.update({"gate_scale": stored([np.nan], "F16")})),
        ("gate_scale", "nan"),
    ),
    "a negative scale": (
        lambda b: edit(b, ONE, lambda t: t.update({"gate_scale": stored([-0.5], "F16")})),
        ("gate_scale", "-0.5"),
    ),
}


@pytest.mark.parametrize("case", EXPERT_FILES)
def test_expert_files_refused(case: str, tmp_path: Path):
    built = build(tmp_path / "o", "per-file")
    harm, said = EXPERT_FILES[case]
    harm(built)
    refused(built, *said)


def test_two_spellings_of_a_router(tmp_path: Path):
    built = build(tmp_path / "o", "per-file")
    edit(
        built,
        "router_state.safetensors",
        lambda t: t.update({"layer_01_router_weight": t["layers.1.router.weight"]}),
    )
    refused(built, "layer_01_router_weight", "same weight")


def test_a_base_for_another_model(tmp_path: Path):
    built = build(tmp_path / "o", "per-file")
    base = write_base(tmp_path / "b", tokenizer=False, vocab=300)
    refused(built, "different models", "vocab 288 and 300", base=base.path)


def test_a_base_is_named_and_not_chosen(tmp_path: Path):
    built = build(tmp_path / "o", "per-file")
    damage.edit_config(built.path, base_model_name_or_path="/cluster/path/Qwen2.5-32B")
    refused(built, "--base", "config names 'Qwen2.5-32B'")
    damage.edit_config(built.path, base_model_name_or_path=damage.REMOVE)
    refused(built, "give one with --base")
    for card in ("base_model: Qwen/Qwen2.5-14B", "base_model:\n- 'Qwen/Qwen2.5-14B'"):
        (built.path / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
        refused(built, "--base", "card names 'Qwen/Qwen2.5-14B'")


def test_an_overlay_may_not_change_the_base(tmp_path: Path):
    built = build(tmp_path / "o", "per-file-with-base", seed=1)
    base = write_base(tmp_path / "b", tokenizer=False, seed=2)
    refused(built, "differs from", base=base.path, convert=tmp_path / "t")


TOYS: dict[str, tuple[Callable[[Built], Any], tuple[str, ...]]] = {
    "a router is missing": (
        lambda b: damage.drop_tensor(b.path, "layers.2.ffn.router_weight"),
        ("MoE", "[0, 1, 3]"),
    ),
    "one of three biases": (
        lambda b: damage.drop_tensor(b.path, "layers.2.attn.k_proj.bias"),
        ("layers.2.self_attn.k_proj.bias", "missing"),
    ),
    "a norm is missing": (
        lambda b: damage.drop_tensor(b.path, "layers.0.ffn_norm.weight"),
        ("post_attention_layernorm", "missing"),
    ),
    "a key with and without model.": (
        lambda b: damage.add_tensor(
            b.path, "model.layers.0.attn_norm.weight", np.ones(64, np.float32)
        ),
        ("layers.0.attn_norm.weight", "same weight"),
    ),
    "a latent FFN beside the shared": (
        lambda b: damage.add_tensor(
            b.path, "layers.0.ffn.up_proj.latent_weight", np.ones((128, 64), np.float32)
        ),
        ("up_proj", "same weight"),
    ),
    "a layer too many": (
        lambda b: damage.add_tensor(b.path, "layers.4.attn_norm.weight", np.ones(64, np.float32)),
        ("layers.4.attn_norm.weight", "4 layers"),
    ),
    "an expert's part is missing": (
        lambda b: damage.drop_tensor(b.path, "layers.0.ffn.experts.1.up_proj.scale"),
        ("layer 0, expert 1", "up scale"),
    ),
    "a router of another shape": (
        lambda b: damage.replace_tensor(b.path, "layers.0.ffn.router_weight", np.ones((4, 63))),
        ("router_weight", "(4, 63)", "(4, 64)"),
    ),
}


@pytest.mark.parametrize("case", TOYS)
def test_toy_refused(case: str, tmp_path: Path):
    built = build(tmp_path / "o", "toy")
    harm, said = TOYS[case]
    harm(built)
    refused(built, *said)


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [(np.ones(64), "F32", "(64,)"), (np.ones((76, 64)), "I32", "I32"), ([[np.nan]], "F32", "")],
)
def test_latent_weights_refused(value: Any, dtype: str, said: str, tmp_path: Path):
    built = write_toy_dense(tmp_path / "o", intermediate=76)
    value = np.broadcast_to(value, (76, 64)) if np.shape(value) == (1, 1) else value
    damage.replace_tensor(built.path, "layers.0.ffn.up_proj.latent_weight", value, dtype)
    with pytest.raises(CheckpointError, match=r"up_proj\.latent_weight") as error:
        open_overlay(built.path).base["model.layers.0.mlp.up_proj.weight"].read_float32()
    assert said in str(error.value)


UNSUPPORTED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rotation matrices": (
        lambda o: write_stored(
            o / "rotation_matrices.safetensors", {"hadamard_64": stored(np.eye(64), "F32")}
        ),
        "rotated",
    ),
    "rotation metadata": (lambda o: (o / "rotation_metadata.json").write_text("{}"), "rotated"),
    "a rotation among the tensors": (
        lambda o: damage.add_tensor(o, "model.hadamard_64", np.eye(64, dtype=np.float32)),
        "rotated",
    ),
    "architectures": (
        lambda o: damage.edit_config(o, architectures=["OutlierReXMoEForCausalLM"]),
        "ReXMoE",
    ),
    "model type": (lambda o: damage.edit_config(o, model_type="rex_moe"), "ReXMoE"),
    "a field": (lambda o: damage.edit_config(o, rexmoe_group_size=4), "ReXMoE"),
    "a key": (
        lambda o: damage.add_tensor(o, "model.rexmoe.scales", np.ones(4, np.float32)),
        "ReXMoE",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_forms_are_refused_by_name(case: str, tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False)
    harm, said = UNSUPPORTED[case]
    harm(built.path)
    refused(built, said)
