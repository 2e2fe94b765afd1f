"""A server that finds conversations again: the same text, in memory and after a restart."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

import openai
import pytest

from outlier_mlx.errors import OutlierError
from outlier_mlx.serve.cache_dir import CacheDir, cache_dir
from tests.library import Library
from tests.plain_models import SIZES, write_model
from tests.program import start_program
from tests.serving import Running, running

KEY = "a-key"
SYSTEM = "You watch the river. " * 4
LONG: list[Any] = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "The heron stands in the water, and waits for the fish. " * 3},
]


@pytest.fixture
def where(tmp_path: Path, small_tier: Path) -> CacheDir:
    return cache_dir(tmp_path / "kept", 100_000_000, small_tier, None, None)


def ask(server: Running, messages: list[Any], **more: Any) -> tuple[str, int]:
    """Text and number of cached tokens."""
    client: Any = server.new_client(api_key=KEY)
    options = {"model": "tiny", "temperature": 0, "max_tokens": 12} | more
    got = client.chat.completions.create(messages=messages, **options)
    return got.choices[0].message.content, got.usage.prompt_tokens_details.cached_tokens


def turn(server: Running, messages: list[Any], text: str) -> list[Any]:
    return [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": text}]


@pytest.fixture(scope="module")
def fresh(small_tier: Path) -> dict[str, str]:
    """What a server without caches answers."""
    with running(small_tier, api_key=KEY, prompt_cache_bytes=0) as server:
        found = texts_of(server, 0)
        assert ask(server, LONG)[1] == 0
        return found


def conversation(first: str) -> dict[str, list[Any]]:
    """Prompts that share beginnings, by name."""
    second = [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    return {
        "first": LONG,
        "second": [*LONG, *second],
        "edited": [LONG[0], {"role": "user", "content": str(LONG[1]["content"])[:80] + "!"}],
        "other": [LONG[0], {"role": "user", "content": "What is a heron?"}],
    }


def texts_of(server: Running, least: int) -> dict[str, str]:
    """What a server answers that has the first one cached, by name of the prompt."""
    first, _ = ask(server, LONG)
    texts = {}
    for name, messages in conversation(first).items():
        texts[name], cached = ask(server, messages)
        assert cached >= least
    return texts


def test_cached_prefixes_give_the_same_text(small_tier: Path, fresh: dict[str, str]) -> None:
    with running(small_tier, api_key=KEY) as server:
        assert ask(server, LONG) == (fresh["first"], 0)
        assert texts_of(server, 40) == fresh


def test_quantized_caches_give_the_same_text(library: Library) -> None:
    tier = library.tier(library.overlay(layers=2, moe_layers=(1,), heads=2, kv_heads=1))
    kv: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    with running(tier, api_key=KEY, prompt_cache_bytes=0, **kv) as server:
        fresh = texts_of(server, 0)
    with running(tier, api_key=KEY, **kv) as server:
        assert texts_of(server, 40) == fresh


def test_a_restart_finds_conversations_again(
    small_tier: Path, where: CacheDir, fresh: dict[str, str]
) -> None:
    with running(small_tier, api_key=KEY, cache_dir=where) as server:
        ask(server, LONG)
    with running(small_tier, api_key=KEY, cache_dir=where) as server:
        assert ask(server, LONG)[1] > 40
        assert texts_of(server, 40) == fresh
        assert any(
            re.search(r"kept: 0\.0 GB of KV caches, of 0\.1 GB at most", s) for s in server.log
        )


def test_short_requests_do_not_push_out_the_long_conversation(small_tier: Path) -> None:
    with running(small_tier, api_key=KEY) as server:
        text, _ = ask(server, LONG)
        whole = ask(server, turn(server, LONG, text))[1]
        for number in range(12):
            ask(server, [{"role": "user", "content": f"{number} is a title for this, or not"}])
        assert ask(server, turn(server, LONG, text))[1] >= whole


def test_four_conversations_are_kept(small_tier: Path) -> None:
    with running(small_tier, api_key=KEY) as server:
        prompts = [[{"role": "user", "content": f"{n} {LONG[1]['content']}"}] for n in range(4)]
        texts = [ask(server, prompt)[0] for prompt in prompts]
        for prompt, text in zip(prompts, texts, strict=True):
            assert ask(server, turn(server, prompt, text))[1] > 40


@pytest.mark.slow
def test_a_second_message_takes_a_tenth_of_the_first(tmp_path: Path) -> None:
    """Of 2,000 tokens, and 20 more; `scripts/bench_prefix.py` has a larger model."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "max_position_embeddings": 4096}
    model = write_model(tmp_path / "model", SIZES | sizes | {"model_type": "qwen2"})
    ratios = []
    with running(model) as server:
        for seed in range(3):
            prompt = [5 + (7 * place + 31 * seed + place // 9) % 90 for place in range(2000)]
            times = []
            for tokens in (prompt, [*prompt, *range(5, 25)]):
                begun = time.perf_counter()
                body = {"prompt": tokens, "max_tokens": 1, "temperature": 0}
                assert server.post(body, "/v1/completions")[0] == 200
                times.append(time.perf_counter() - begun)
            ratios.append(times[1] / times[0])
    assert median(ratios) <= 0.1


def test_without_a_key_nobody_learns_what_was_cached(small_tier: Path, where: CacheDir) -> None:
    with running(small_tier, cache_dir=where) as server:
        server.chat(messages=LONG)
        assert server.chat(messages=LONG).usage.prompt_tokens_details is None


def test_a_cache_dir_that_cannot_be_made_is_refused(small_tier: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    where = cache_dir(tmp_path / "file", 1000, small_tier, None, None)
    refused = pytest.raises(OutlierError, match="file: exists and is not a folder")
    with refused, running(small_tier, cache_dir=where):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_leaves_whole_files(
    small_tier: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    found: list[int] = []
    for start in range(2):
        program = start_program(
            *("serve", "--model", small_tier, "--port", 0, "--cache-dir", tmp_path / "kept"),
            *("--cache-dir-size", 0.1),
            env=os.environ | {"OUTLIER_MLX_API_KEY": KEY},
        )
        try:
            assert program.stderr is not None
            address = None
            for line in program.stderr:
                if address := re.search(r"at (http://\S+)", line):
                    break
            assert address is not None
            client = openai.OpenAI(base_url=address[1], api_key=KEY, max_retries=0)
            got: Any = client.chat.completions.create(model="any", messages=LONG, max_tokens=4)
            found.append(got.usage.prompt_tokens_details.cached_tokens)
            if ending == signal.SIGKILL and not start:
                deadline = time.monotonic() + 20
                while not list(tmp_path.glob("kept/*/[0-9a-f]*")) and time.monotonic() < deadline:
                    time.sleep(0.05)
        finally:
            program.send_signal(ending)
            program.communicate(timeout=30)
        assert list(tmp_path.glob("kept/*/.*")) == []
    assert found[0] == 0
    assert found[1] > 40
