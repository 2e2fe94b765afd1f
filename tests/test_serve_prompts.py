"""Prompts are tokenized beside generation, and not at all if they cannot fit the context."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

from outlier_mlx.serve.prompts import BoundedTokenizer, characters_per_token
from tests.serving import Running, running

BYTES = {
    letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
}
FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)}


def byte_level(*words: str, normalizer: Any = None, split: Any = None, **added: Any) -> Tokenizer:
    """BPE over bytes, as Qwen and Llama 3 have it."""
    vocab, merges = dict(BYTES), []
    for word in words:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocab[word[:end]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizer
    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, own]) if split else own
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False, **added)])
    return tokenizer


def sentences(vocab: dict[str, int], normalizer: Any = None, **options: Any) -> Tokenizer:
    """BPE over characters, as SentencePiece makes it."""
    tokenizer = Tokenizer(models.BPE(vocab, [], **options))
    blanks = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.normalizer = normalizer or blanks
    return tokenizer


LETTERS = {letter: number for number, letter in enumerate("\u2581abc")}
UNKNOWN = LETTERS | {"<unk>": 4}
SOUND: dict[str, tuple[Tokenizer, int]] = {
    "byte level": (byte_level("heron"), 7),  # "<|end|>"
    "composed": (byte_level("heron", normalizer=normalizers.NFC()), 28),
    "compatibly composed": (byte_level(normalizer=normalizers.NFKC()), 28),
    "split": (byte_level(split=pre_tokenizers.Split(Regex(r"\\d"), "isolated")), 7),
    "fallback": (
        sentences(LETTERS | {k: v + 4 for k, v in FALLBACK.items()}, byte_fallback=True),
        6,
    ),
    "unknown characters": (sentences(UNKNOWN, unk_token="<unk>"), 5),
}
UNBOUNDED: dict[str, Tokenizer] = {
    "unknown words": sentences(UNKNOWN, unk_token="<unk>", fuse_unk=True),
    "characters that are dropped": sentences(LETTERS),
    "a fallback with gaps": sentences(LETTERS | {"<0x41>": 4}, byte_fallback=True),
    "blanks beside a token": byte_level(rstrip=True),
    "blanks that are dropped": byte_level(split=pre_tokenizers.WhitespaceSplit()),
    "what is split off": byte_level(split=pre_tokenizers.Split(" ", "removed")),
    "what is stripped": byte_level(normalizer=normalizers.Strip()),
    "what is replaced": byte_level(normalizer=normalizers.Replace("aaa", "b")),
    "patterns": byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
    "word pieces": Tokenizer(models.WordPiece(UNKNOWN, unk_token="<unk>")),
    "words": Tokenizer(models.WordLevel(UNKNOWN, unk_token="<unk>")),
}


def wrapped(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("case", SOUND.values(), ids=list(SOUND))
def test_the_longest_token_bounds_a_text(case: tuple[Tokenizer, int]):
    tokenizer, expected = case
    longest = characters_per_token(wrapped(tokenizer))
    assert longest == expected

    @given(st.text() | st.text(alphabet="ab \u03b1\u0313\u0300\u0345\u1100\u1161\u11a8her<|end|>n"))
    @settings(max_examples=40, deadline=None)
    def check(text: str) -> None:
        assert len(text) <= longest * len(tokenizer.encode(text))

    check()


def test_composition_joins_four_characters():
    """So the factor of four is needed."""
    text = "\u03b1\u0313\u0300\u0345" * 9
    tokenizer = byte_level(*["\u00e1\u00be\u0124"], normalizer=normalizers.NFC())
    assert len(normalizers.NFC().normalize_str(text)) * 4 == len(text)
    most = characters_per_token(wrapped(tokenizer))
    assert most is not None and most * len(tokenizer.encode(text)) >= len(text)


@pytest.mark.parametrize("tokenizer", UNBOUNDED.values(), ids=list(UNBOUNDED))
def test_where_one_token_can_stand_for_any_text(tokenizer: Tokenizer):
    assert characters_per_token(wrapped(tokenizer)) is None


def test_other_tokenizers_have_no_bound():
    assert characters_per_token(object()) is None


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_beyond_the_context_is_refused_unread(
    served: Running, monkeypatch: pytest.MonkeyPatch, chat: bool
):
    """512 tokens cannot be more than 512 times as many characters as the longest token."""
    prompts = served.server.generator.provider.prompts
    limit = prompts._limit
    assert limit and limit < 8000

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(prompts._tokenizer._tokenizer, "_encode_plus", never)
    text = "x" * (limit + 1)
    body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    status, _, answer = served.post(body, path)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "characters" in answer["error"]["message"]


def test_nobody_waits_for_a_prompt_that_is_being_tokenized(
    small_tier: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also not in the middle of replies, which one thread generates together."""
    entered, go_on = threading.Event(), threading.Event()
    encode = BoundedTokenizer.encode

    def slow(self: Any, text: str, **options: Any) -> list[int]:
        if "slow" in text:
            entered.set()
            assert go_on.wait(30)
        return encode(self, text, **options)

    monkeypatch.setattr(BoundedTokenizer, "encode", slow)
    with running(small_tier) as server, ThreadPoolExecutor(2) as pool:
        chunks = server.chat(stream=True, max_tokens=60, logit_bias={"0": -100, "2": -100})
        next(chunks)
        waiting = pool.submit(server.chat, messages=[{"role": "user", "content": "slow"}])
        assert entered.wait(30)
        assert server.chat().usage.completion_tokens
        assert len(list(chunks)) > 30
        assert not waiting.done()
        go_on.set()
        assert waiting.result(30).usage.completion_tokens


def test_long_texts_wait_for_one_another(served: Running, monkeypatch: pytest.MonkeyPatch):
    """Each takes much memory while it is tokenized; short texts overtake them."""
    import outlier_mlx.serve.prompts as module

    tokenizer, arrived, go_on = served.server.generator.provider.tokenizer, [], threading.Event()
    prompts = BoundedTokenizer(tokenizer, None)

    def slow(text: str, **_: Any) -> list[int]:
        arrived.append(text)
        assert len(text) < 10 or go_on.wait(30)
        return [1]

    monkeypatch.setattr(module, "LONG_TEXT", 10)
    monkeypatch.setattr(prompts, "_tokenizer", type("Slow", (), {"encode": staticmethod(slow)}))
    with ThreadPoolExecutor(4) as pool:
        long = [pool.submit(prompts.encode, str(number) * 20) for number in range(4)]
        assert served.wait(lambda: len(arrived) == 2)
        assert prompts.encode("short") == [1]
        assert len(arrived) == 3
        go_on.set()
        assert [one.result(30) for one in long] == [[1]] * 4
