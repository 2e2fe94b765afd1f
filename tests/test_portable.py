"""The portable tier: stock mlx-lm computes what the overlay means, with no code of ours."""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import outlier_mlx
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.engine.loading import load
from outlier_mlx.errors import CheckpointError
from outlier_mlx.tiers.convert import convert_tier
from outlier_mlx.tiers.presets import make_recipe
from outlier_mlx.tiers.verify import verify_tier
from tests.builders import write_overlay
from tests.engine import tier_of
from tests.goldens import assert_logits_close
from tests.program import run_command
from tests.reference import Array, forward
from tests.reference_reader import read_overlay

DIMS: dict[str, Any] = {
    "hidden": 64,
    "intermediate": 192,
    "expert_intermediate": 96,
    "moe_layers": (1, 2),
}


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
        ({"expert_intermediate": 128}, "does not divide the shared width"),
        ({"expert_intermediate": 48}, "32 does not divide"),
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


@pytest.mark.slow
def test_the_stock_command_line_needs_no_flag(tmp_path: Path) -> None:
    built = write_overlay(tmp_path / "overlay", tokenizer=True, **DIMS)
    tier = outlier_mlx.convert(built.path, out=tmp_path / "tier", portable=True, dtype="float32")
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", tier, "-p", "hello", "-m", 8]
    assert "Generation:" in run_command(*command).out


@pytest.mark.parametrize("portable", [True, False])
def test_convert_and_info_count_alike(tmp_path: Path, portable: bool) -> None:
    """Biases of zero belong to the matrix that has them, as any other bias does."""
    built = write_overlay(tmp_path / "overlay", **DIMS)
    recipe = make_recipe(portable=portable)
    report = convert_tier(built.path, out=tmp_path / "tier", recipe=recipe)
    assert report.rows == inspect(report.path).rows
