"""The portable tier: stock mlx-lm computes what the overlay means, with no code of ours."""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import outlier_mlx
from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.engine.loading import load
from outlier_mlx.errors import CheckpointError
from outlier_mlx.terminal import size
from outlier_mlx.tiers.choose import list_choices
from outlier_mlx.tiers.convert import convert_tier
from outlier_mlx.tiers.plan import Plan
from outlier_mlx.tiers.presets import make_recipe
from outlier_mlx.tiers.verify import verify_tier
from tests.builders import write_overlay
from tests.engine import tier_of
from tests.goldens import assert_logits_close
from tests.program import run, run_command
from tests.reference import Array, forward
from tests.reference_reader import read_overlay

DIMS: dict[str, Any] = {
    "hidden": 64,
    "intermediate": 192,
    "expert_intermediate": 96,
    "moe_layers": (1, 2),
}
# Two experts of 96 are as wide as the shared FFN.
PADDED = DIMS | {"expert_intermediate": 80}


def stock_logits(tier: Path, tokens: list[int]) -> Array:
    model, _ = load_model(tier, trust_remote_code=False)
    assert type(model).__module__ == "mlx_lm.models.ernie4_5_moe"
    return np.array(model(mx.array([tokens]))[0])


@pytest.mark.parametrize(
    "dims",
    [
        {},
        {"tied": True, "kv_heads": 1, "expert_intermediate": 64},
        {"moe_layers": (0, 1, 2, 3), "top_k": 3, "experts": 7, "hidden": 128},
        {"moe_layers": (3,), "experts": 1, "top_k": 1},
        {"expert_intermediate": 80},
        {"expert_intermediate": 48},  # as wide as groups are
        {"expert_intermediate": 128},  # as wide as the shared FFN
    ],
)
@pytest.mark.parametrize("form", ["v32", "real"])
def test_stock_mlx_lm_equals_the_reference(tmp_path: Path, form: str, dims: dict) -> None:
    built = write_overlay(tmp_path / "overlay", form, **DIMS | dims)
    tier = tier_of(built.path, None, tmp_path / "tier", portable=True)
    expected = forward(read_overlay(built.path), built.prompt())
    assert_logits_close(stock_logits(tier, built.prompt()), expected)
    assert not list(tier.glob("*.py"))
    verify_tier(tier)


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ({"moe_layers": (0, 2)}, "leave gaps"),
        ({"expert_intermediate": 224}, "are 224 wide, and no multiple of 32 from there on divides"),
        ({"intermediate": 208}, "are 96 wide, .* divides the width of the base's FFN, 208"),
        ({"hidden": 48}, "32 does not divide the hidden size 48"),
        ({"yarn": {"factor": 4.0, "original_max_position_embeddings": 64}}, "YaRN"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, dims: dict, reason: str) -> None:
    built = write_overlay(tmp_path / "overlay", **DIMS | dims)
    with pytest.raises(CheckpointError, match=rf"no portable tier: .*{reason}.*without --portable"):
        outlier_mlx.convert(built.path, out=tmp_path / "tier", portable=True)
    assert not (tmp_path / "tier").exists()


def test_int4_keeps_the_residual_stream_in_the_tiers_dtype(tmp_path: Path) -> None:
    built = write_overlay(tmp_path / "overlay", **DIMS)
    tier = outlier_mlx.convert(built.path, out=tmp_path / "tier", portable=True, dtype="float16")
    model, _ = load_model(tier, trust_remote_code=False)
    assert model.model(mx.array([built.prompt()])).dtype == mx.float16
    ours, tokenizer = load(tier)
    assert ours(mx.array([built.prompt()])).dtype == mx.float32  # the CPU's dtype, unless told
    assert tokenizer.encode("hello")


@pytest.mark.parametrize("scale_form", ["one", "per_row"])
def test_what_is_added_is_zeros(tmp_path: Path, scale_form: str) -> None:
    built = write_overlay(tmp_path / "overlay", scale_form=scale_form, **PADDED)
    tier = tier_of(built.path, None, tmp_path / "tier", portable=True)
    model, _ = load_model(tier, trust_remote_code=False)
    for (layer, expert, part), trits in built.trits.items():
        module = getattr(model.layers[layer].mlp.switch_mlp, f"{part}_proj")
        stored = (module.weight[expert], module.scales[expert], module.biases[expert])
        found = np.array(mx.dequantize(*stored, group_size=module.group_size, bits=module.bits))
        alpha = built.alphas[layer][expert] if part == "down" else 1
        scale = np.float32(built.scales[layer, expert, part].astype(np.float64) * alpha)
        out, width = trits.shape
        np.testing.assert_array_equal(found[:out, :width], scale.reshape(-1, 1) * trits)
        assert found.shape == ((64, 96) if part == "down" else (96, 64))
        assert not found[out:].any() and not found[:, width:].any()


def test_experts_that_are_stored_in_bytes_are_widened_alike(tmp_path: Path) -> None:
    built = write_overlay(tmp_path / "overlay", tokenizer=False, **PADDED)
    packed = export_tier(built.path, tmp_path / "packed", "packed").path
    one, other = (
        tier_of(overlay, None, tmp_path / f"{overlay.name}-tier", portable=True)
        for overlay in (built.path, packed)
    )
    assert weights(one) == weights(other)


def weights(tier: Path) -> bytes:
    (file,) = tier.glob("*.safetensors")
    return file.read_bytes()


def test_how_much_padding_adds_is_told_first(tmp_path: Path) -> None:
    built = write_overlay(tmp_path / "overlay", **PADDED)
    # In 2 layers, 4 experts: 2 * 16 rows of 64 codes and a group's scale and bias in 16 bits, and
    # 64 rows of 16 codes and half a group's.
    zeros = 2 * 4 * (2 * 16 * (64 * 2 // 8 + 4) + 64 * (16 * 2 // 8 + 2))
    note = f"experts are 96 wide instead of 80: the rest is zeros, {size(zeros)}"
    told: list[Plan] = []

    def tell(plan: Plan) -> None:
        assert not (tmp_path / "tier").exists()
        told.append(plan)

    recipe = make_recipe(portable=True)
    report = convert_tier(built.path, out=tmp_path / "tier", recipe=recipe, planned=tell)
    (choice,) = [each for each in list_choices(built.path)[0] if each.name == "q4 --portable"]
    index = json.loads((report.path / "model.safetensors.index.json").read_text())
    assert choice.nbytes == told[0].nbytes == index["metadata"]["total_size"]
    assert list(choice.notes) == told[0].notes == report.notes == [note]
    assert f"- {note}\n" in (report.path / "README.md").read_text()
    plain = convert_tier(built.path, out=tmp_path / "plain")
    assert plain.notes == []


def test_the_command_tells_of_padding_before_and_after(tmp_path: Path) -> None:
    built = write_overlay(tmp_path / "overlay", **PADDED)
    done = run("convert", built.path, "--portable", "--out", tmp_path / "tier")
    first, *_, again, last = done.err.splitlines()
    assert first == again and first.startswith("experts are 96 wide instead of 80")
    assert last.startswith("wrote ")


@pytest.mark.slow
def test_the_stock_command_line_needs_no_flag(tmp_path: Path) -> None:
    built = write_overlay(tmp_path / "overlay", tokenizer=True, **PADDED)
    tier = tier_of(built.path, None, tmp_path / "tier", portable=True)
    asked = ["-p", "hello", "-m", 8]
    done = run_command(sys.executable, "-m", "mlx_lm", "generate", "--model", tier, *asked)
    said = done.out.split("==========\n")[1]
    plain = tier_of(built.path, None, tmp_path / "plain")
    assert said == run("generate", "--model", plain, *asked).out


@pytest.mark.parametrize("portable", [True, False])
def test_convert_and_info_count_alike(tmp_path: Path, portable: bool) -> None:
    """Biases of zero belong to the matrix that has them, as any other bias does."""
    built = write_overlay(tmp_path / "overlay", **DIMS)
    recipe = make_recipe(portable=portable)
    report = convert_tier(built.path, out=tmp_path / "tier", recipe=recipe)
    assert report.rows == inspect(report.path).rows
