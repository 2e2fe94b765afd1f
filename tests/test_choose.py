"""Choosing a recipe, and refusing to load what does not fit."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import outlier_mlx
from outlier_mlx.engine import machine, memory
from outlier_mlx.engine.machine import Budget, budget
from outlier_mlx.engine.memory import check_fits
from outlier_mlx.engine.needs import Use
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import parse_config
from outlier_mlx.models.sizes import kv_bytes
from outlier_mlx.tiers.choose import best, list_choices
from outlier_mlx.tiers.presets import RECIPES
from tests.builders import Built
from tests.engine import forward, load
from tests.folders import copy_writable
from tests.library import Library
from tests.program import Result, assert_refused, run


@pytest.fixture(scope="module")
def overlay(library: Library) -> Built:
    return library.overlay(layers=8, moe_layers=(2, 3))


@pytest.fixture(scope="module")
def tier(library: Library, overlay: Built) -> Path:
    return library.tier(overlay, tier="q4")


@pytest.mark.parametrize("name", ["q4", "q4-mixed", "q8", "bf16", "f32"])
def test_predicted_sizes_are_those_of_the_files(overlay: Built, tmp_path: Path, name: str) -> None:
    choices, _ = list_choices(overlay.path)
    predicted = next(choice.nbytes for choice in choices if choice.name == name)
    tier = outlier_mlx.convert(overlay.path, out=tmp_path / "tier", tier=name)
    index = json.loads((tier / "model.safetensors.index.json").read_text())
    assert predicted == index["metadata"]["total_size"]


def test_the_cache_is_as_large_as_mlx_lms(tier: Path, overlay: Built) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    model = load(tier)
    cache = make_prompt_cache(model)
    forward(model, overlay.prompt(12) * 22, cache)  # 264 tokens: the cache grows in steps of 256
    config = parse_config(json.loads((tier / "config.json").read_text()))
    # On the CPU the cache holds float32.
    assert sum(entry.nbytes for entry in cache) == 2 * kv_bytes(config, 512)
    # 64 values of 8 bits, and a scale and a bias of 16 bits each.
    assert kv_bytes(config, 64, 8) == kv_bytes(config, 64) * (64 * 8 + 32) / (64 * 16)


@pytest.mark.parametrize(("room", "name"), [("bf16", "bf16"), ("q8", "q8"), ("q4", "q4")])
def test_the_best_that_fits_is_chosen(overlay: Built, room: str, name: str) -> None:
    choices, _ = list_choices(overlay.path)
    limit = next(choice.memory[4096, None] for choice in choices if choice.name == room)
    fitting, available = list_choices(overlay.path, ram_gb=limit / machine.GPU_SHARE / 2**30 + 1e-9)
    assert best(fitting, available) == name
    with pytest.raises(OutlierError, match="no recipe fits: the smallest needs"):
        best(*list_choices(overlay.path, ram_gb=1e-6))


@pytest.mark.parametrize(("stored", "name"), [("F16", "f16"), ("BF16", "bf16"), ("F32", "bf16")])
def test_unquantized_means_the_checkpoints_own_dtype(
    library: Library, stored: str, name: str
) -> None:
    overlay = library.overlay(layers=2, moe_layers=(1,), base_dtype=stored).path
    choices, available = list_choices(overlay)
    assert best(choices, available) == choices[0].name == name
    names = [choice.name for choice in choices]
    assert sorted(names) == sorted([*RECIPES, "q4 --portable"])
    assert run("tiers", overlay, "--json").json["recipes"][0]["name"] == name


def auto(overlay: Path, out: Path, available: int, *options: str, code: int = 0) -> Result:
    """Convert with `--tier auto` on a machine of so much memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "outlier_mlx.tiers.choose.budget", lambda _: Budget(available, "this machine")
        )
        return run("convert", overlay, "--tier", "auto", "--out", out, *options, code=code)


def needed(overlay: Path, name: str, **changes: Any) -> int:
    choices, _ = list_choices(overlay, changes=changes)
    return next(choice.memory[4096, None] for choice in choices if choice.name == name)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (["--portable"], {"portable": True}),
        (["--experts", "affine2"], {"experts": "affine2"}),
        (["--group-size", "32"], {"group_size": 32}),
        (["--dtype", "float32"], {"dtype": "float32"}),
    ],
)
def test_auto_chooses_for_what_will_be_written(
    library: Library, tmp_path: Path, options: list[str], changes: dict[str, Any]
) -> None:
    dims = {"hidden": 64, "intermediate": 128, "expert_intermediate": 64, "layers": 2}
    overlay = library.overlay(moe_layers=(1,), **dims).path
    room = needed(overlay, "q8", **changes)
    assert room != needed(overlay, "q8")
    auto(overlay, tmp_path / "fits", room, *options)
    recipe = json.loads((tmp_path / "fits" / "tier.json").read_text())["recipe"]
    assert recipe["base_bits"] == 8 and recipe | changes == recipe
    smaller = needed(overlay, "q4", **changes)
    assert smaller < room
    auto(overlay, tmp_path / "less", room - 1, *options)
    recipe = json.loads((tmp_path / "less" / "tier.json").read_text())["recipe"]
    assert recipe["base_bits"] == 4 and recipe | changes == recipe
    refused = auto(overlay, tmp_path / "none", smaller - 1, *options, code=1)
    assert_refused(refused, "no recipe fits: the smallest needs")
    assert not (tmp_path / "none").exists()


def test_auto_says_why_nothing_can_be_written(library: Library, tmp_path: Path) -> None:
    gaps = library.overlay().path  # experts in layers 1 and 3
    refused = auto(gaps, tmp_path / "out", 10**12, "--portable", code=1)
    assert_refused(refused, "no portable tier: its MoE layers [1, 3] leave gaps")
    unsound = copy_writable(library.overlay(alpha="json").path, tmp_path / "overlay")
    (unsound / "alpha.json").write_text('{"1": {"9": 1.0}}')
    refused = auto(unsound, tmp_path / "out", 10**12, code=1)
    assert_refused(refused, "alpha.json")
    assert run("tiers", unsound, code=1).err == refused.err
    plain = run("convert", unsound, "--out", tmp_path / "out", code=1)
    assert plain.err == refused.err


def test_mixed_keeps_more_of_the_sensitive_matrices(overlay: Built, tmp_path: Path) -> None:
    tier = outlier_mlx.convert(overlay.path, out=tmp_path / "tier", tier="q4-mixed")
    quantization = json.loads((tier / "config.json").read_text())["quantization"]
    assert quantization["lm_head"]["bits"] == 6
    assert quantization["model.layers.0.self_attn.v_proj"]["bits"] == 6
    assert quantization["model.layers.3.mlp.shared_expert.down_proj"]["bits"] == 6
    assert "model.layers.2.mlp.shared_expert.down_proj" not in quantization
    assert "model.layers.0.self_attn.q_proj" not in quantization
    assert forward(load(tier), overlay.prompt()).shape[-1] == overlay.dims.vocab
    assert RECIPES["q4-mixed"].bits("model.norm.weight", 8) == 4


def test_what_does_not_fit_is_refused_with_cures(library: Library) -> None:
    wide = {"hidden": 128, "heads": 2, "kv_heads": 1}  # heads of 64, which MLX can quantize
    tier = library.tier(library.overlay(layers=8, moe_layers=(2, 3), **wide), tier="q4")
    check_fits(tier, Use(4096))
    weights = json.loads((tier / "model.safetensors.index.json").read_text())["metadata"]
    little = Budget(weights["total_size"] * 12, "this Mac's GPU")
    with pytest.raises(OutlierError) as refused:
        check_fits(tier, Use(4096, step=4), little)
    text = str(refused.value)
    for words in ("KV cache", "--kv-bits 4", "smaller recipe", "iogpu.wired_limit_mb=", "--ignore"):
        assert words in text
    assert "\n" not in text
    check_fits(tier, Use(4096, kv_bits=4, step=4), little)


def test_generate_checks_unless_told_not_to(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "budget", lambda ram_gb=None: Budget(1000, "this machine"))
    command = ["generate", "--model", str(tier), "-p", "hello", "-m", "2"]
    refused = run(*command, code=1)
    assert "this machine gives 1.0 kB" in refused.err
    run(*command, "--ignore-memory")


def test_the_budget_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget(32).nbytes == 24 * 2**30
    assert budget().nbytes > 2**28
    limit = {"max_recommended_working_set_size": 12345}
    monkeypatch.setattr(mx, "device_info", lambda: limit)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert budget() == Budget(12345, "this Mac's GPU")


def test_the_command(overlay: Built) -> None:
    done = run("tiers", overlay.path, "--ram", "16")
    assert "q4-mixed" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines() if "portable" not in line)
    listed = json.loads(run("tiers", overlay.path, "--json").out)
    names = [recipe["name"] for recipe in listed["recipes"]]
    assert names[:4] == ["bf16", "q8", "q4-mixed", "q4"]
