"""What a model needs of memory, whether that is there, and what is told if it is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.engine import machine, memory
from outlier_mlx.engine.machine import UNLIMITED, Budget, budget
from outlier_mlx.engine.memory import check_fits
from outlier_mlx.engine.needs import Use, needs_of
from outlier_mlx.errors import OutlierError
from outlier_mlx.storage.shards import read_shards
from tests.builders import write_base
from tests.damage import edit_config
from tests.library import Library
from tests.program import assert_refused, run

TOKENS, STEP = 8192, 4


@pytest.fixture(scope="module")
def tier(library: Library) -> Path:
    """Heads of 64."""
    return library.tier(library.overlay(hidden=128, heads=2, layers=2, moe_layers=(1,)))


def room_for(folder: Path, tokens: int, bits: int | None = None) -> Budget:
    """Memory for the weights and a conversation, on a GPU."""
    weights = sum(tensor.nbytes for tensor in read_shards(folder).values())
    needs = needs_of(folder, on_cpu=False)
    assert needs.weights == weights
    # With short steps: attention to a quantized cache keeps its scores.
    taken = weights + needs.working(Use(tokens, step=STEP, kv_bits=bits))
    taken += needs.cache(tokens, bits, 32)
    return Budget(taken, "this Mac's GPU")


def advice(folder: Path, tokens: int = TOKENS, start: int = 0, **how: Any) -> str:
    """What is said where the cache fits in 4 bits, but not in 16."""
    with pytest.raises(OutlierError) as refused:
        check_fits(
            folder, Use(tokens, step=STEP, kv_start=start), room_for(folder, tokens, 4), **how
        )
    return str(refused.value)


@pytest.mark.parametrize(
    ("heads", "option"),
    [(1, "--kv-bits 4,"), (2, "--kv-bits 4,"), (4, "--kv-bits 4 --kv-group-size 32,"), (8, "")],
)
def test_the_cache_is_advised_to_be_quantized_only_in_groups_that_fit(
    tmp_path: Path, heads: int, option: str
) -> None:
    folder = write_base(tmp_path / "base", hidden=128, heads=heads, kv_heads=1, layers=2).path
    text = advice(folder)
    assert (option in text) if option else ("--kv-bits" not in text)


def test_no_advice_that_cannot_be_followed(tmp_path: Path, tier: Path) -> None:
    assert "--kv-bits 4," in advice(tier)
    assert "--kv-bits" not in advice(tier, may_quantize=False)
    windows = write_base(tmp_path / "base", hidden=128, heads=2, layers=2).path
    types = ["sliding_attention", "full_attention"]
    edit_config(windows, model_type="llama", sliding_window=100_000, layer_types=types)
    assert "--kv-bits" not in advice(windows)


def test_a_cache_is_quantized_from_a_token_on(tier: Path) -> None:
    needs = needs_of(tier, on_cpu=False)
    whole, quantized = needs.cache(4000), needs.cache(4000, 4)
    assert quantized < whole / 3
    assert needs.cache(4000, 4, start=5000) == whole
    assert needs.cache(4000, 4, start=500) == quantized
    assert needs.cache(4000, 4, start=3000) == needs.cache(3000)
    assert "--kv-bits 4 --quantized-kv-start 0," in advice(tier, 4000, start=5000)
    assert "--kv-bits 4," in advice(tier, 40_000, start=5000)


def test_only_commands_with_the_option_advise_it(
    tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    available = room_for(tier, 4096, 4)
    monkeypatch.setattr(memory, "budget", lambda: available)
    (tmp_path / "text").write_text("the cat sat " * 200)
    text = ("--text", tmp_path / "text", "--window", 4096)
    for command in ("perplexity", "routing"):
        refused = run(command, tier, *text, code=1)
        assert_refused(refused, "of it for the KV cache", "a smaller recipe")
        assert "--kv-bits" not in refused.err
    steps = ("--prefill-step-size", STEP)
    refused = run("generate", tier, "-p", "x", "-m", 4096, *steps, code=1)
    assert_refused(refused, "--kv-bits 4 --quantized-kv-start 0")
    assert (
        "--kv-bits"
        not in run("generate", tier, "-p", "x", "--max-kv-size", 4096, *steps, code=1).err
    )


def test_two_models_must_fit_together(
    tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("the cat sat " * 50)
    needs = needs_of(tier, on_cpu=False)
    work = needs.working(Use(64, logits=64)) + needs.cache(64)
    both = Budget(2 * needs.weights + work, "this Mac's GPU")
    text = ("--text", tmp_path / "text", "--window", 64, "--windows", 2)
    for available, code in ((both, 0), (Budget(both.nbytes - 1, both.whose), 1)):
        monkeypatch.setattr(memory, "budget", lambda found=available: found)
        result = run("perplexity", tier, "--against", tier, *text, code=code)
    assert_refused(result, "tier and tier need ")
    refused = run("tune", tier, "--teacher", tier, *text, "--out", tmp_path / "a", code=1)
    assert_refused(refused, "tier and tier need ")


def test_sizes_have_units_that_fit(tier: Path) -> None:
    needs = needs_of(tier, on_cpu=False)
    assert needs.cache(64) == 2 * 2 * 2 * 64 * 64 * 4  # layers, heads, keys and values, float32
    with pytest.raises(OutlierError, match=r"tier needs 3\.\d MB, 131\.1 kB of it .* gives 900 B"):
        check_fits(tier, Use(64), Budget(900, "this Mac's GPU"))


def test_a_machine_that_does_not_tell_its_memory(
    tier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> int:
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(machine, "_ROOT", Path("/nonexistent"))
    monkeypatch.setattr(os, "sysconf", unknown)
    assert budget() == Budget(UNLIMITED, "this machine")
    check_fits(tier, Use(10**9))
    monkeypatch.setattr(os, "sysconf", lambda name: -1)
    assert budget() == Budget(UNLIMITED, "this machine")
    monkeypatch.delattr(os, "sysconf")
    assert budget() == Budget(UNLIMITED, "this machine")


def test_tiers_on_a_machine_that_does_not_tell_its_memory(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_ROOT", Path("/nonexistent"))
    monkeypatch.delattr(os, "sysconf")
    overlay = library.overlay().path
    shown = run("tiers", overlay).out
    assert "it is not known how much this machine gives" in shown and "922" not in shown
    listed = run("tiers", overlay, "--json").json
    assert listed["available_bytes"] is None and all(r["fits"] for r in listed["recipes"][:4])


@pytest.mark.parametrize("text", ["the heron waits in the reeds ", "苍鹭在芦苇丛中等待", "🦢"])
def test_the_tokens_of_a_prompt_are_counted_whatever_its_script(
    tier: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outlier_mlx.engine.loading import load_tokenizer

    prompt = text * 10
    tokens = len(load_tokenizer(tier, {}).encode(prompt))
    command = ["generate", tier, "-p", prompt, "-m", 2, "--ignore-chat-template", "--quiet"]
    command += ["--prefill-step-size", STEP]
    # On a GPU for the estimate alone: the model itself takes more on the CPU.
    for there_is, code in ((tokens + 2, 0), (tokens + 1, 1)):
        available = room_for(tier, there_is)
        monkeypatch.setattr(memory, "budget", lambda found=available: found)
        run(*command, code=code)


def test_a_system_prompt_counts(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available = room_for(tier, 200)
    monkeypatch.setattr(memory, "budget", lambda: available)
    command = ["generate", tier, "-p", "the heron", "-m", 2, "--quiet", "--prefill-step-size", STEP]
    run(*command, "--system-prompt", "Be brief.")
    assert_refused(run(*command, "--system-prompt", "Be brief. " * 100, code=1), "KV cache")


def test_shorter_steps_are_advised_where_they_help(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", hidden=128, heads=2, layers=2).path
    needs = needs_of(folder, on_cpu=False)
    room = needs.weights + needs.cache(4096) + needs.working(Use(4096, step=300))
    available = Budget(room, "this Mac's GPU")
    with pytest.raises(OutlierError, match="What helps: --prefill-step-size 256, or a smaller"):
        check_fits(folder, Use(4096), available)
    check_fits(folder, Use(4096, step=256), available)
