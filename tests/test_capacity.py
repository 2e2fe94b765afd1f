"""A server divides the memory that its model leaves free among conversations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlier_mlx.engine import memory
from outlier_mlx.engine.machine import Budget
from outlier_mlx.engine.needs import Use, needs_of
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import parse_config
from outlier_mlx.models.sizes import kv_bytes
from outlier_mlx.serve import server
from outlier_mlx.serve.capacity import (
    MAX_CONVERSATIONS,
    Capacity,
    capacity_for,
    find_capacity,
    usual_tokens,
)
from tests.library import Library
from tests.program import run

# Short steps: the test's models take little memory, their activations would take more.
TOKENS, STEP = 8192, 1
USE = Use(TOKENS, step=STEP)


@pytest.fixture(scope="module")
def tier(small_tier: Path) -> Path:
    return small_tier


def mac(tier: Path, conversations: float, tokens: int = TOKENS, prompts: int = 1) -> Budget:
    """Memory for the weights, so many conversations, and reading so many prompts together."""
    weights = json.loads((tier / "model.safetensors.index.json").read_text())["metadata"]
    config = parse_config(json.loads((tier / "config.json").read_text()))
    needs = needs_of(tier, on_cpu=False)
    assert config.dtype == "float32" and needs.cache(tokens) == 2 * kv_bytes(config, tokens)
    cache = int(conversations * needs.cache(tokens))
    work = needs.working(Use(tokens, prompts=prompts, step=STEP))
    return Budget(weights["total_size"] + cache + work, "this Mac's GPU")


@given(conversations=st.integers(1, MAX_CONVERSATIONS), prompts=st.none() | st.integers(1, 8))
def test_the_capacity_never_exceeds_the_memory(conversations: int, prompts: int | None):
    capacity = capacity_for(conversations, prompts)
    assert 1 <= capacity.decode_concurrency <= 32 and 1 <= capacity.prompt_concurrency <= 8
    if prompts is None:
        assert capacity.conversations == conversations
    else:
        # At least one response; mlx-lm then allows as many responses as prompts.
        assert capacity.conversations <= max(conversations, 2 * prompts - 1)


@pytest.mark.parametrize(
    ("there_is", "expected"), [(1.5, (1, 1, 1)), (8.1, (7, 2, 8)), (10_000, (32, 8, 39))]
)
def test_as_many_as_fit(tier: Path, there_is: float, expected: tuple[int, int, int]) -> None:
    prompts = expected[1]
    available = mac(tier, there_is, prompts=prompts)
    capacity, conversations, planned = find_capacity(tier, USE, available=available)
    assert (capacity.decode_concurrency, capacity.prompt_concurrency, conversations) == expected
    assert planned.fits and planned.needed == available.nbytes
    # mlx-lm counts the caches in use among these bytes.
    assert capacity.prompt_cache_bytes == available.nbytes - mac(tier, 0, prompts=prompts).nbytes
    capacity, *_ = find_capacity(tier, USE, cache_bytes=1000, available=available)
    assert capacity.prompt_cache_bytes == 1000


def test_a_conversation_is_no_longer_than_the_context(tmp_path: Path) -> None:
    for positions, expected in [(512, 512), (32768, 8192), (None, 8192)]:
        config = {"model_type": "qwen2", "max_position_embeddings": positions}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert usual_tokens(tmp_path, 4096) == expected


def test_more_than_there_is_is_refused_with_what_fits(tier: Path) -> None:
    available = mac(tier, 8.1, prompts=2)
    assert find_capacity(tier, USE, 8, 1, available=available)[1] == 8
    with pytest.raises(OutlierError) as refused:
        find_capacity(tier, USE, 32, available=available)
    for words in (
        "the KV cache of 39 conversations of 8192 tokens",
        "--decode-concurrency 7",
        "--max-context",
        "--ignore-memory",
    ):
        assert words in str(refused.value)
    found, *_ = find_capacity(tier, USE, 7, available=available)
    assert found.decode_concurrency == 7
    with pytest.raises(OutlierError, match="What helps: a smaller --max-context, or a smaller re"):
        find_capacity(tier, USE, available=mac(tier, 0.9))


def test_a_quantized_cache_is_advised(library: Library) -> None:
    tier = library.tier(library.overlay(layers=2, moe_layers=(1,), hidden=128, heads=2))
    with pytest.raises(OutlierError, match="What helps: a smaller --max-context, or --kv-bits 4,"):
        find_capacity(tier, USE, available=mac(tier, 0.9))


def test_connections_and_quantized_caches_bound_it(tier: Path) -> None:
    available = mac(tier, 2.2, prompts=8)
    assert find_capacity(tier, USE, 32, clients=2, available=available)[1] == 2
    # mlx-lm has no batches of quantized caches.
    assert find_capacity(tier, replace(USE, kv_bits=8), 32, available=available)[1] == 1


def test_the_command_asks_for_it(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(
        "outlier_mlx.serve.serve",
        lambda name, load, options, say, note, **_: served.append((options, note)),
    )
    command = ["serve", "--model", str(tier), "--max-context", "1000", "--prefill-step-size", STEP]
    for there_is, options, expected in [
        (4.5, [], Capacity(4, 1)),
        (4.5, ["--decode-concurrency", "2"], Capacity(2, 1)),
        (0.5, ["--ignore-memory"], Capacity(32, 8)),
    ]:
        available = mac(tier, there_is, 1000)
        monkeypatch.setattr(memory, "budget", lambda ram_gb=None, found=available: found)
        monkeypatch.setattr("outlier_mlx.serve.capacity.budget", memory.budget)
        run(*command, *options)
        found, note = served.pop()
        assert isinstance(found, server.ServeOptions)
        assert found.decode_concurrency == expected.decode_concurrency
        assert found.prompt_concurrency == expected.prompt_concurrency
        free = available.nbytes - mac(tier, 0, 1000).nbytes
        assert found.cache_memory == (None if "--ignore-memory" in options else free)
        told = f"memory for {expected.conversations} conversations of 1000 tokens at a time"
        assert note == ("" if options == ["--ignore-memory"] else told)
