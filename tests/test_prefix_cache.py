"""Kept KV caches: what of them a new prompt gets, that it is right, and what goes first."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from outlier_mlx.serve import prefix_cache
from outlier_mlx.serve.prefix_cache import LONGEST, PrefixCache
from tests.plain_models import SIZES, make_model
from tests.ternary_sources import QWEN35_TEXT

DENSE = {**SIZES, "model_type": "qwen2"}
HYBRID = {"model_type": "qwen3_5", "text_config": {**QWEN35_TEXT, "vocab_size": 300}}
#: Bytes of one token's rows in `DENSE`: 2 layers of keys and values, 2 heads of 16 float32 each.
ROW = 2 * 2 * 2 * 16 * 4


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return make_model(DENSE)


@pytest.fixture(scope="module")
def hybrid() -> nn.Module:
    return make_model(HYBRID)


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


def read(model: Any, tokens: list[int], cache: list[Any] | None = None) -> tuple[list[Any], Any]:
    """The cache after some more tokens, and the logits of the last."""
    cache = make_prompt_cache(model) if cache is None else cache
    logits = model(mx.array(tokens)[None], cache=cache)[0, -1]
    mx.eval(logits, [layer.state for layer in cache])
    return cache, np.array(logits)


def keep(kept: PrefixCache, model: Any, tokens: list[int], kind: Any = "assistant") -> None:
    kept.keep(tokens, read(model, tokens)[0], kind)


def check(kept: PrefixCache, model: Any, tokens: list[int], count: int) -> None:
    """A prompt finds so many tokens, and continues from them as from the beginning."""
    cache, cached = kept.fetch(tokens)
    assert cached == count
    logits = read(model, tokens[cached:], cache)[1]
    np.testing.assert_allclose(logits, read(model, tokens)[1], rtol=1e-4, atol=1e-4)


def keep_made_up(kept: PrefixCache, tokens: list[int]) -> None:
    """Keep a cache that no model computed, of the size that it would have."""
    cache = [KVCache(), KVCache()]
    for layer in cache:
        layer.update_and_fetch(*mx.zeros((2, 1, 2, len(tokens), 16)))
    kept.keep(tokens, cache, "assistant")


def found(kept: PrefixCache, tokens: list[int]) -> int:
    return kept.fetch([*tokens, 7])[1]


class Clock:
    seconds = 1e9

    def __call__(self) -> float:
        return self.seconds


def test_nothing_is_found_at_first(dense: nn.Module) -> None:
    kept = PrefixCache(None, None)
    assert kept.fetch([1, 2, 3]) == (None, 0)
    assert kept.nbytes == 0


def test_a_conversation_goes_on_where_it_ended(dense: nn.Module) -> None:
    kept = PrefixCache(None, None)
    first, second = text(300), text(50, seed=1)
    keep(kept, dense, first)
    check(kept, dense, first + second, 300)
    keep(kept, dense, first + second)
    check(kept, dense, first + second + [7], 350)
    assert kept.nbytes == 350 * ROW


def test_a_prompt_is_never_found_whole(dense: nn.Module) -> None:
    kept = PrefixCache(None, None)
    keep(kept, dense, text(40))
    check(kept, dense, text(40), 39)
    check(kept, dense, text(40)[:20], 19)
    assert kept.fetch(text(1)) == (None, 0)


def test_an_edited_conversation_keeps_what_is_before_the_edit(dense: nn.Module) -> None:
    kept = PrefixCache(None, None)
    keep(kept, dense, text(700))
    edited = text(400) + text(100, seed=1)
    check(kept, dense, edited, 400)
    keep(kept, dense, edited)
    check(kept, dense, edited + [7], 500)
    check(kept, dense, text(700) + [7], 700)


def test_what_conversations_begin_with_is_kept_once(dense: nn.Module) -> None:
    kept = PrefixCache(None, None)
    system = text(600)
    for seed in range(1, 6):
        keep(kept, dense, system + text(20, seed))
    assert kept.nbytes == (600 + 5 * 20) * ROW
    check(kept, dense, system + text(20, 9), 600)


def test_a_longer_conversation_replaces_its_beginning(dense: nn.Module) -> None:
    kept = PrefixCache(1, None)
    for count in (100, 150, 600, 620, 900):
        keep(kept, dense, text(count))
        assert kept.nbytes == count * ROW
    check(kept, dense, text(900) + [7], 900)


def test_what_is_fetched_is_a_copy(dense: nn.Module) -> None:
    kept = PrefixCache(None, None)
    keep(kept, dense, text(300))
    cache, count = kept.fetch(text(300) + [9, 8])
    read(dense, [9, 8, 5, 4], cache)
    check(kept, dense, text(300) + [11, 12], count)


def test_what_is_kept_does_not_change_with_what_it_was_cut_from(dense: nn.Module) -> None:
    kept = PrefixCache(None, None)
    cache, _ = read(dense, text(300))
    kept.keep(text(300), cache, "user")
    read(dense, text(30, seed=3), cache)
    check(kept, dense, text(300) + [11, 12], 300)


def test_short_requests_do_not_push_out_a_long_conversation() -> None:
    clock = Clock()
    kept = PrefixCache(None, 2600 * ROW, now=clock)
    keep_made_up(kept, text(2000))
    for seed in range(1, 20):
        clock.seconds += 5
        keep_made_up(kept, text(150, seed))
    assert found(kept, text(2000)) == 2000
    assert found(kept, text(150, 19)) == 150
    assert found(kept, text(150, 1)) == 0
    assert kept.nbytes <= 2600 * ROW


def test_a_long_conversation_that_is_long_over_goes() -> None:
    clock = Clock()
    kept = PrefixCache(None, 2100 * ROW, now=clock)
    keep_made_up(kept, text(2000))
    clock.seconds += 3600 * 3
    for seed in range(1, 4):
        keep_made_up(kept, text(150, seed))
    assert found(kept, text(2000)) == 0
    assert found(kept, text(150, 1)) == 150


def test_of_equal_conversations_the_one_used_last_stays() -> None:
    clock = Clock()
    kept = PrefixCache(None, 4 * 600 * ROW, now=clock)
    for seed in range(4):
        clock.seconds += 1
        keep_made_up(kept, text(600, seed))
    clock.seconds += 1
    assert found(kept, text(600, 0)) == 600
    clock.seconds += 1
    keep_made_up(kept, text(600, 5))
    assert [found(kept, text(600, n)) for n in (0, 1, 2, 3, 5)] == [600, 0, 600, 600, 600]


def test_a_conversation_goes_from_its_end() -> None:
    kept = PrefixCache(None, None)
    keep_made_up(kept, text(2 * LONGEST + 500))
    kept.make_room(2 * LONGEST * ROW)
    assert found(kept, text(2 * LONGEST + 500)) == 2 * LONGEST
    kept.make_room(0)
    assert kept.nbytes == 0
    assert kept.fetch(text(100)) == (None, 0)


def test_a_conversation_of_thousands_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn can be a node: recursion would end at about 1000."""
    monkeypatch.setattr(prefix_cache, "LONGEST", 4)
    kept, long = PrefixCache(None, None), text(6_000)
    keep_made_up(kept, long)
    assert found(kept, long) == 6_000
    keep_made_up(kept, [*long, 5])
    assert found(kept, [*long, 5]) == 6_001
    kept.make_room(ROW * 2000)
    assert 1900 < found(kept, long) <= 2000
    kept.clear()
    assert kept.nbytes == 0


def test_a_limit_on_conversations() -> None:
    clock = Clock()
    kept = PrefixCache(2, None, now=clock)
    for seed in range(3):
        clock.seconds += 1
        keep_made_up(kept, text(100, seed))
    assert [found(kept, text(100, seed)) for seed in range(3)] == [0, 100, 100]


def test_a_quantized_cache(dense: nn.Module) -> None:
    model = make_model({**DENSE, "hidden_size": 256})
    kept = PrefixCache(None, None)

    def quantized(tokens: list[int]) -> list[Any]:
        cache = [layer.to_quantized(64, 8) for layer in make_prompt_cache(model)]
        return read(model, tokens, cache)[0]

    kept.keep(text(300), quantized(text(300)), "assistant")
    kept.keep(text(700), quantized(text(700)), "assistant")
    tokens = text(650) + [5, 6, 7]
    cache, count = kept.fetch(tokens)
    assert count == 650
    got = read(model, tokens[count:], cache)[1]
    cache = quantized(tokens[:650])
    np.testing.assert_allclose(got, read(model, tokens[650:], cache)[1], rtol=1e-3, atol=1e-3)


def test_a_quantized_cache_is_not_used_where_it_would_not_be_quantized(dense: nn.Module) -> None:
    model = make_model({**DENSE, "hidden_size": 256})
    kept = PrefixCache(None, None, quantized_from=200)
    cache = [layer.to_quantized(64, 8) for layer in make_prompt_cache(model)]
    kept.keep(text(300), read(model, text(300), cache)[0], "assistant")
    assert kept.fetch(text(300) + [7])[1] == 300
    assert kept.fetch(text(100) + [7])[1] == 0


def test_linear_attention_goes_on_only_where_it_was_kept(hybrid: nn.Module) -> None:
    kept = PrefixCache(None, None)
    keep(kept, hybrid, text(100), "user")
    keep(kept, hybrid, text(140))
    check(kept, hybrid, text(120) + [7], 100)
    check(kept, hybrid, text(140) + [7], 140)
    keep(kept, hybrid, text(60), "system")
    check(kept, hybrid, text(80), 60)
    check(kept, hybrid, text(100) + [7, 8], 100)
    assert kept.fetch(text(50)) == (None, 0)


def test_states_within_a_conversation_go_before_its_end(hybrid: nn.Module) -> None:
    clock = Clock()
    kept = PrefixCache(None, None, now=clock)
    for count in (60, 100, 140):
        clock.seconds += 60
        keep(kept, hybrid, text(count))
    kept.make_room(kept.nbytes - 1)
    check(kept, hybrid, text(140) + [7], 140)
    check(kept, hybrid, text(100) + [7], 100)
    assert kept.fetch(text(60) + [7])[1] == 0
    kept.make_room(0)
    assert kept.nbytes == 0


@pytest.mark.parametrize("length", [40, 100])
def test_a_sliding_window_goes_on_only_where_it_was_kept(dense: nn.Module, length: int) -> None:
    def window() -> list[Any]:
        return [KVCache(), RotatingKVCache(64)]

    kept = PrefixCache(None, None)
    kept.keep(text(length), read(dense, text(length), window())[0], "assistant")
    assert kept.fetch(text(length)) == (None, 0)
    for _ in range(2):  # what the first one writes does not change what is kept
        cache, count = kept.fetch(text(length) + [7, 8, 9])
        assert count == length
        got = [read(dense, [token], cache)[1] for token in (7, 8, 9)]
        fresh, _ = read(dense, text(length), window())
        want = [read(dense, [token], fresh)[1] for token in (7, 8, 9)]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_layer_with_several_caches(dense: nn.Module) -> None:
    cache, _ = read(dense, text(100))
    kept = PrefixCache(None, None)
    kept.keep(text(100), [CacheList(*cache)], "assistant")
    layers, count = kept.fetch(text(70) + [1, 2])
    assert count == 70
    assert layers is not None
    assert type(layers[0]) is CacheList
    got = read(dense, [1, 2], list(layers[0].caches))[1]
    np.testing.assert_allclose(got, read(dense, text(70) + [1, 2])[1], rtol=1e-4, atol=1e-4)


def test_a_cache_of_an_unknown_kind_is_copied_whole(dense: nn.Module) -> None:
    class Other(KVCache):
        pass

    cache, _ = read(dense, text(100), [Other(), Other()])
    kept = PrefixCache(None, None)
    kept.keep(text(100), copy.deepcopy(cache), "assistant")
    assert kept.fetch(text(70) + [1, 2]) == (None, 0)
    layers, count = kept.fetch(text(100) + [1, 2])
    assert count == 100
    got = read(dense, [1, 2], layers)[1]
    np.testing.assert_allclose(got, read(dense, text(100) + [1, 2])[1], rtol=1e-4, atol=1e-4)


def test_random_histories(dense: nn.Module) -> None:
    rng = np.random.default_rng(5)
    clock = Clock()
    kept = PrefixCache(None, 500 * ROW, now=clock)
    texts = [text(30, 1)]
    for _ in range(30):
        clock.seconds += float(rng.integers(1, 600))
        base = texts[rng.integers(len(texts))]
        tokens = base[: rng.integers(1, len(base) + 1)] + text(int(rng.integers(2, 90)))
        cache, count = kept.fetch(tokens)
        cache, logits = read(dense, tokens[count:], cache)
        np.testing.assert_allclose(logits, read(dense, tokens)[1], rtol=1e-3, atol=1e-3)
        kept.keep(tokens, cache, "assistant")
        texts.append(tokens)
        assert kept.nbytes <= 500 * ROW
