"""A whole tier as a GGUF file: what the package `gguf` reads in it is what is in the tier.

What llama.cpp computes with such files is tested in `test_llamacpp.py`.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.checkpoints.gguf_encode import TERNARY
from outlier_mlx.errors import OutlierError
from tests import damage
from tests.builders import PARTS, Built, write_overlay
from tests.engine import tier_of
from tests.library import Library
from tests.program import assert_refused, run

DIMS: dict[str, Any] = {"hidden": 256, "intermediate": 96, "expert_intermediate": 512, "experts": 3}
# Alphas that float16 scales can take: powers of two.
EVEN = np.array([1, -0.5, 2], np.float32)
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


class Read:
    """A GGUF file as its own package reads it."""

    def __init__(self, folder: Path) -> None:
        reader = gguf.GGUFReader(folder / "model.gguf")
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(self, name: str) -> Any:
        return self.fields[f"{self.fields['general.architecture']}.{name}"]

    def kind(self, name: str) -> str:
        return str(self.tensors[name].tensor_type.name)

    def weights(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        if self.kind(name) == "BF16":
            return (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def name_in_gguf(key: str, routed: tuple[int, ...]) -> str | None:
    words = key.split(".")
    if "layers" not in words:
        return NAMES.get(key)
    name = NAMES.get(".".join(words[3:]))
    if name is None:
        return None
    if int(words[2]) in routed and name.startswith("ffn_") and name != "ffn_norm.weight":
        name = name.replace(".weight", "_shexp.weight")
    return f"blk.{words[2]}.{name}"


def with_alphas(built: Built, values: np.ndarray) -> Built:
    for layer in built.alphas:
        key = f"model.layers.{layer}.mlp.alpha_values"
        damage.replace_tensor(built.path, key, values)
        built.alphas[layer][:] = values
    return built


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("even") / "o"
    return with_alphas(write_overlay(folder, **DIMS, scale_form="per_row"), EVEN)


@pytest.mark.parametrize(("tier", "experts"), zip(("f32", "bf16", "f32"), TERNARY, strict=True))
def test_every_weight_is_the_tiers(even: Built, tier: str, experts: str, tmp_path: Path):
    made = tier_of(even.path, None, tmp_path / "t", tier=tier)
    read = Read(export_tier(made, tmp_path / "e", "gguf", experts=experts).path)
    found = {key: name_in_gguf(key, even.dims.routed_layers) for key in even.base}
    for key, name in found.items():
        if name is not None:
            np.testing.assert_array_equal(read.weights(name), even.base[key], key)
    matrix = "F32" if tier == "f32" else "BF16"
    assert read.kind("token_embd.weight") == matrix and read.kind("blk.1.attn_q.bias") == "F32"
    for layer, router in even.routers.items():
        np.testing.assert_array_equal(read.weights(f"blk.{layer}.ffn_gate_inp.weight"), router)
        for part in PARTS:
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            assert read.kind(name) == experts.upper()
            for e, weights in enumerate(read.weights(name)):
                alpha = even.alphas[layer][e] if part == "down" else 1
                scale = even.scales[layer, e, part].reshape(-1, 1) * alpha
                np.testing.assert_array_equal(weights, scale * even.trits[layer, e, part])


def test_the_config_and_what_is_turned_off(even: Built, tmp_path: Path):
    made = tier_of(even.path, None, tmp_path / "t")
    exported = export_tier(made, tmp_path / "e", "gguf")
    assert exported.base is None and not any("scales" in note for note in exported.notes)
    assert sorted(path.name for path in exported.path.iterdir()) == [
        "checksums.json",
        "model.gguf",
    ]
    read = Read(exported.path)
    assert read.fields["general.architecture"] == "step35" and read.fields["general.name"] == "o"
    said = {
        "block_count": 4,
        "feed_forward_length": 96,
        "expert_count": 3,
        "expert_used_count": 2,
        "expert_feed_forward_length": 512,
        "expert_shared_feed_forward_length": 96,
        "expert_gating_func": 1,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.0,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "rope.dimension_count": 128,
        "rope.dimension_count_swa": 64,
        "rope.freq_base_swa": 1e6,
        "attention.sliding_window": 512,
        "attention.sliding_window_pattern": [True, False, False, False],
        "vocab_size": 288,
    }
    assert {name: read.field(name) for name in said} == said
    with pytest.raises(KeyError):
        read.field("rope.scaling.type")
    assert "blk.0.ffn_gate_inp.weight" not in read.tensors
    assert "blk.0.ffn_gate.weight" in read.tensors


def test_the_command_and_what_can_be_done_with_the_folder(even: Built, tmp_path: Path):
    made = tier_of(even.path, None, tmp_path / "t")
    out = tmp_path / "e"
    said = run("export", made, "--format", "gguf", "--out", out)
    assert "gguf, " in said.err and "without the base" not in said.err
    assert "NFC" not in said.err
    assert "whole: 1 files" in run("verify", out).out
    about = run("info", out, "--json").json
    assert about["architecture"] == "step35"
    assert about["moe_layers"] == len(even.dims.routed_layers) < about["layers"]
    assert_refused(run("export", made, "--format", "gguf", "--out", out, code=None), "--force")
    run("export", made, "--format", "gguf", "--out", out, "--experts", "tq1_0", "--force")
    assert Read(out).kind("blk.1.ffn_up_exps.weight") == "TQ1_0"
    with (out / "model.gguf").open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"xxx")
    assert_refused(run("verify", out, code=None), "model.gguf", "damaged")
    wrong = run("export", made, "--out", tmp_path / "x", "--experts", "q4_0", code=2)
    assert "--format gguf" in wrong.err


# A base that is quantized


@pytest.mark.parametrize(("group", "dtype"), [(32, "bfloat16"), (64, "float16"), (128, "bfloat16")])
def test_four_bits_are_q4_1_exactly(group: int, dtype: str, tmp_path: Path, library: Library):
    built = library.overlay(**DIMS | {"intermediate": 128})
    made = tier_of(built.path, None, tmp_path / "t", tier="q4", group_size=group, dtype=dtype)
    exported = export_tier(made, tmp_path / "e", "gguf")
    assert not any("base" in note for note in exported.notes)
    read = Read(exported.path)
    stored: dict[str, mx.array] = mx.load(str(made / "model-00001-of-00001.safetensors"))  # type: ignore[assignment]
    checked = 0
    for key in stored:
        path = key.removesuffix(".scales")
        name = name_in_gguf(
            f"{path}.weight".replace("shared_expert.", ""), built.dims.routed_layers
        )
        if path == key or name is None or "switch_mlp" in key:
            continue
        s, b = (stored[f"{path}.{leaf}"].astype(mx.float32) for leaf in ("scales", "biases"))
        weights = mx.dequantize(stored[f"{path}.weight"], s, b, group_size=group, bits=4)
        assert read.kind(name) == "Q4_1"
        np.testing.assert_array_equal(read.weights(name), np.array(weights), name)
        checked += 1
    assert checked == 18


@pytest.mark.parametrize("bits", [3, 5])
def test_other_bits_that_blocks_of_32_take(bits: int, tmp_path: Path):
    """Codes of any width are read as MLX stores them."""
    from outlier_mlx.checkpoints.base_matrices import AffineMatrix
    from outlier_mlx.checkpoints.gguf_encode import affine_kind, affine_slabs
    from outlier_mlx.storage.safetensors import read_header

    weights = mx.random.normal((48, 128), dtype=mx.float16)
    w, s, b = mx.quantize(weights, group_size=64, bits=bits)
    mx.save_safetensors(str(tmp_path / "m.safetensors"), {"w": w, "s": s, "b": b})
    found = read_header(tmp_path / "m.safetensors")
    matrix = AffineMatrix(found["w"], found["s"], found["b"], bits, 64)
    exact = mx.dequantize(w, s.astype(mx.float32), b.astype(mx.float32), group_size=64, bits=bits)
    np.testing.assert_array_equal(matrix.read_float32(), np.array(exact))
    kind = affine_kind(matrix)
    raw = np.concatenate(list(affine_slabs(matrix)))
    type_ = gguf.GGMLQuantizationType[str(kind)]
    assert kind == ("Q4_1" if bits == 3 else "Q5_1")
    np.testing.assert_array_equal(gguf.quants.dequantize(raw, type_), np.array(exact))


def test_scales_that_float16_rounds_are_told(tmp_path: Path, library: Library):
    built = library.overlay(**DIMS)
    made = tier_of(built.path, None, tmp_path / "t", tier="q4", group_size=32, dtype="float32")
    notes = export_tier(made, tmp_path / "e", "gguf").notes
    (told,) = (note for note in notes if "matrices of the base" in note)
    error = float(told.split("at most ")[1].split()[0])
    assert 1e-5 < error <= 2**-11


def test_eight_bits_are_quantized_again(tmp_path: Path, library: Library):
    """To within half a step of Q8_0: the largest weight of 32, divided by 127, in float16."""
    built = library.overlay(**DIMS)
    made = tier_of(built.path, None, tmp_path / "t", tier="q8", group_size=32)
    exported = export_tier(made, tmp_path / "e", "gguf")
    assert any("quantized again, to Q8_0" in note for note in exported.notes)
    read = Read(exported.path)
    stored: dict[str, mx.array] = mx.load(str(made / "model-00001-of-00001.safetensors"))  # type: ignore[assignment]
    path = "model.layers.2.mlp.up_proj"
    parts = (stored[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases"))
    w, s, b = parts
    exact = np.array(
        mx.dequantize(w, s.astype(mx.float32), b.astype(mx.float32), group_size=32, bits=8)
    )
    assert read.kind("blk.2.ffn_up.weight") == "Q8_0"
    blocks = np.abs(exact.reshape(96, -1, 32)).max(-1, keepdims=True)
    off = np.abs(read.weights("blk.2.ffn_up.weight") - exact).reshape(96, -1, 32)
    assert (off <= blocks / 127 * (0.5 + 0.07)).all()


# Alphas


def test_one_alpha_for_all_stays_a_number_of_its_own(tmp_path: Path):
    built = with_alphas(write_overlay(tmp_path / "o", **DIMS), np.full(3, 0.1, np.float32))
    made = tier_of(built.path, None, tmp_path / "t")
    exported = export_tier(made, tmp_path / "e", "gguf")
    assert not any("rounded" in note for note in exported.notes)
    assert np.float32(Read(exported.path).field("expert_weights_scale")) == np.float32(0.1)


def test_alphas_and_one_scale_a_matrix_come_closer_than_float16(tmp_path: Path):
    """The product of two float16 numbers is within four millionths; alpha 0 is exactly 0."""
    built = write_overlay(tmp_path / "o", **DIMS, scale_form="one", scale_dtype="F32", seed=4)
    values = np.array([0.777, -1.234567, 0], np.float32)
    for layer, e, part in built.scales:
        if part == "gate":
            key = f"model.layers.{layer}.mlp.experts.{e}.gate_scale"
            damage.replace_tensor(built.path, key, np.full(1, 0.25, np.float32))
    built = with_alphas(built, values)
    made = tier_of(built.path, None, tmp_path / "t")
    exported = export_tier(made, tmp_path / "e", "gguf")
    (told,) = (note for note in exported.notes if "scales of experts" in note)
    assert float(told.split("at most ")[1].split()[0]) < 4e-6
    read = Read(exported.path)
    for layer in built.dims.routed_layers:
        for e, alpha in enumerate(values):
            up, down = (
                np.abs(read.weights(f"blk.{layer}.ffn_{part}_exps.weight")[e]).max()
                for part in ("up", "down")
            )
            exact = float(np.prod([built.scales[layer, e, p][0] for p in ("up", "down")]))
            assert float(up) * float(down) == pytest.approx(abs(alpha) * exact, rel=4e-6, abs=0)


def test_row_scales_times_alpha_are_rounded_and_told(tmp_path: Path):
    built = write_overlay(tmp_path / "o", **DIMS, scale_form="per_row")
    made = tier_of(built.path, None, tmp_path / "t")
    exported = export_tier(made, tmp_path / "e", "gguf")
    (told,) = (note for note in exported.notes if "scales of experts" in note)
    assert 1e-5 < float(told.split("at most ")[1].split()[0]) <= 2**-11


def test_scales_that_float16_does_not_hold(tmp_path: Path):
    """The message names an option that helps."""
    built = with_alphas(write_overlay(tmp_path / "o", **DIMS), np.array([1e30, 1, 1], np.float32))
    made = tier_of(built.path, None, tmp_path / "t")
    refused(made, tmp_path / "e", "times alpha", "float16", "--format transformers keeps them")
    export_tier(made, tmp_path / "e", "transformers")


# Widths


def test_the_width_of_experts_is_filled_up_with_zeros(tmp_path: Path):
    built = write_overlay(tmp_path / "o", **DIMS | {"expert_intermediate": 300})
    made = tier_of(built.path, None, tmp_path / "t")
    exported = export_tier(made, tmp_path / "e", "gguf")
    assert any("512 wide instead of 300" in note for note in exported.notes)
    read = Read(exported.path)
    assert read.field("expert_feed_forward_length") == 512
    up, down = (read.weights(f"blk.3.ffn_{part}_exps.weight")[1] for part in ("up", "down"))
    assert up.shape == (512, 256) and not up[300:].any() and not down[:, 300:].any()
    scale = built.scales[3, 1, "up"].reshape(-1, 1)
    if "rounded" not in " ".join(exported.notes):
        np.testing.assert_array_equal(up[:300], scale * built.trits[3, 1, "up"])
    np.testing.assert_array_equal(
        np.sign(down[:, :300]) * np.sign(built.alphas[3][1]), built.trits[3, 1, "down"]
    )


def refused(tier: Path, out: Path, *said: str, **how: Any) -> None:
    with pytest.raises(OutlierError) as error:
        export_tier(tier, out, "gguf", **how)
    message = str(error.value)
    assert all(part in message for part in said), message
    assert "\n" not in message and not out.exists()


def test_hidden_sizes_that_blocks_do_not_divide(tmp_path: Path):
    built = write_overlay(tmp_path / "o", **DIMS | {"hidden": 96})
    made = tier_of(built.path, None, tmp_path / "t")
    refused(made, tmp_path / "e", "hidden size 96", "256", "TQ2_0", "--experts q4_0")
    read = Read(export_tier(made, tmp_path / "e", "gguf", experts="q4_0").path)
    assert read.kind("blk.1.ffn_up_exps.weight") == "Q4_0"
    odd = write_overlay(tmp_path / "odd", **DIMS | {"hidden": 44, "heads": 2})
    made = tier_of(odd.path, None, tmp_path / "t2")
    refused(made, tmp_path / "e2", "hidden size 44", "32", "Q4_0", experts="q4_0")


# Bases


def test_a_tied_head_is_written_once_more(tmp_path: Path):
    built = write_overlay(tmp_path / "o", **DIMS, tied=True)
    made = tier_of(built.path, None, tmp_path / "t")
    read = Read(export_tier(made, tmp_path / "e", "gguf").path)
    embedding = built.base["model.embed_tokens.weight"]
    np.testing.assert_array_equal(read.weights("output.weight"), embedding)


def test_llama3s_rope_and_yarn(tmp_path: Path):
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    built = write_overlay(tmp_path / "o", **DIMS, form="real", family="llama", scaling=llama3)
    read = Read(export_tier(tier_of(built.path, None, tmp_path / "t"), tmp_path / "e", "gguf").path)
    factors = read.weights("rope_freqs.weight")
    assert factors.shape == (32,) and factors[0] == 1 and factors[-1] == 8
    assert (np.diff(factors) >= 0).all() and ((factors > 1) & (factors < 8)).any()
    assert (read.field("block_count"), read.field("nextn_predict_layers")) == (5, 1)
    assert read.field("attention.sliding_window_pattern") == [False] * 4 + [True]
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.25}
    built = write_overlay(tmp_path / "y", **DIMS, yarn=yarn)
    read = Read(
        export_tier(tier_of(built.path, None, tmp_path / "yt"), tmp_path / "ye", "gguf").path
    )
    assert read.field("rope.scaling.attn_factor") == 1.25
    factors = read.weights("rope_freqs.weight")
    assert factors.shape == (32,) and factors[0] == 1 and factors[-1] == 4


def test_what_the_architecture_does_not_have(tmp_path: Path):
    built = write_overlay(tmp_path / "o", "real", **DIMS, family="llama", biases=True)
    made = tier_of(built.path, None, tmp_path / "t")
    refused(made, tmp_path / "e", "step35", "o_proj.bias", "--format gguf-experts")


@pytest.mark.slow
def test_memory_is_a_few_slabs(tmp_path: Path):
    """Matrices of four million weights go through in slabs of one."""
    options = DIMS | {"hidden": 1280, "expert_intermediate": 3072, "experts": 1, "vocab": 3000}
    built = write_overlay(tmp_path / "o", **options, layers=1, moe_layers=(0,), heads=4, top_k=1)
    made = tier_of(built.path, None, tmp_path / "t", tier="q4")
    export_tier(made, tmp_path / "e", "gguf")  # what is imported meanwhile does not count
    tracemalloc.start()
    export_tier(made, tmp_path / "e2", "gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25_000_000, peak
