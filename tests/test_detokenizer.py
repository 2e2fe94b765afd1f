"""Text that is streamed is what the tokenizer's own `decode` gives for all tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from outlier_mlx.engine.detokenizer import Detokenizer
from outlier_mlx.engine.loading import load_tokenizer
from outlier_mlx.engine.tokenizer import Tokenizer as Wrapped

BLANK = "\u2581"  # SentencePiece's
SPECIAL = ("<s>", "</s>", "<|im_end|>")
# Some have characters that stand for other bytes in a byte-level vocabulary, or look like bytes.
ADDED = ("x é", "é", "Ā", "<0xE2>x", "<0xtra>", " lead", BLANK, "\ufffd", "\n", "a b")


@cache
def alphabet() -> dict[int, str]:
    """The characters of bytes in a byte-level vocabulary, from the tokenizers library."""
    from tokenizers.pre_tokenizers import ByteLevel

    split = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    ascii = {byte: split(chr(byte))[0][0] for byte in range(128)}
    # Of two-byte characters, the first byte is 0xC2 or 0xC3; others never begin one.
    rest: dict[int, str] = {}
    for code in (*range(0x80, 0x800, 0x20), *range(0x80, 0xC0)):
        rest |= dict(zip(chr(code).encode(), split(chr(code))[0][0], strict=True))
    for code in (*range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000)):
        rest |= dict(zip(chr(code).encode(), split(chr(code))[0][0], strict=True))
    return ascii | rest


def named(data: str | bytes) -> str:
    """The name of a token of a byte-level vocabulary."""
    return "".join(alphabet()[b] for b in (data.encode() if isinstance(data, str) else data))


def byte_level() -> Tokenizer:
    pieces: list[str | bytes] = [" jumps", " over", "€", "  ", "\ufffd", "\0\0", "line\n"]
    pieces += [b"\x82\xac\xe2", b"\xf0\x9f", b"\x98\x80", b" \xe2\x82"]
    names = [*alphabet().values(), *map(named, pieces)]
    made = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[]))
    made.decoder = decoders.ByteLevel()
    return made


def sentencepiece(unigram: bool, *more: Any) -> Tokenizer:
    names = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), BLANK * 2, "€", ".", "x"]
    names += [BLANK + word for word in ("jumps", "over", "x", "'", "'s")]
    bpe: dict[str, Any] = {"merges": [], "unk_token": "<unk>", "byte_fallback": True}
    made = Tokenizer(
        models.Unigram([(name, -1.0) for name in names], 0, True)
        if unigram
        else models.BPE(vocab={name: n for n, name in enumerate(names)}, **bpe)
    )
    replaced = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*replaced, *more])
    return made


def words(model: Any, decoder: Any) -> Tokenizer:
    names = ["[UNK]", "hello", "##ing", "##s", "world", *".,!?'", "##'", "s", "t", "n't", "'s"]
    names += ["n", "don", "m", "re", "ve", "b</w>", "b", "a"]
    made = Tokenizer(model({name: n for n, name in enumerate(names)}))
    if decoder is not None:
        made.decoder = decoder
    return made


def in_sequence(made: Tokenizer) -> Tokenizer:
    made.decoder = decoders.Sequence([made.decoder])
    return made


def with_metaspace(made: Tokenizer) -> Tokenizer:
    made.decoder = decoders.Metaspace()
    return made


STRIP = decoders.Strip(" ", 1, 0)
KINDS: dict[str, Any] = {
    "byte-level": byte_level,
    "byte-level in a sequence": lambda: in_sequence(byte_level()),
    "sentencepiece": lambda: sentencepiece(False, STRIP),
    "sentencepiece that keeps the first blank": lambda: sentencepiece(False),
    "unigram": lambda: sentencepiece(True, STRIP),
    "metaspace": lambda: with_metaspace(sentencepiece(True)),
    "wordpiece": lambda: words(models.WordPiece, decoders.WordPiece("##", True)),
    "wordpiece as it is": lambda: words(models.WordPiece, decoders.WordPiece("##", False)),
    "words": lambda: words(models.WordLevel, None),
    "suffixes": lambda: words(models.WordLevel, decoders.BPEDecoder("</w>")),
}


@cache
def tokenizer(kind: str, cleans: bool = False) -> PreTrainedTokenizerFast:
    made = KINDS[kind]()
    made.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    made.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=cleans)


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text after each token, and what comes at the end."""
    detokenizer = Detokenizer(tokenizer)
    found = []
    for token in tokens:
        detokenizer.add_token(token)
        found.append(detokenizer.last_segment)
    detokenizer.finalize()
    found.append(detokenizer.last_segment)
    assert detokenizer.text == "".join(found)
    assert detokenizer.tokens == tokens
    return found


def ids(tokenizer: Any, *names: str) -> list[int]:
    found = tokenizer.convert_tokens_to_ids(list(names))
    assert None not in found
    return found


@pytest.mark.parametrize("cleans", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_all_pieces_are_the_text(kind: str, cleans: bool, data: st.DataObject) -> None:
    """Special tokens, bytes that are not UTF-8, NUL, added tokens and ids without a token."""
    made = tokenizer(kind, cleans)
    count = len(made)
    any_token = st.integers(0, count + 2) | st.integers(max(0, count - 24), count - 1)
    tokens = data.draw(st.lists(any_token, max_size=40))
    assert "".join(pieces(made, tokens)) == made.decode(tokens)


def test_the_alphabet_is_whole() -> None:
    assert sorted(alphabet()) == sorted({*range(256)} - {0xC0, 0xC1, *range(0xF5, 0x100)})


def test_bytes_of_a_character_come_together() -> None:
    made: Any = tokenizer("byte-level")
    text = "é😀\0 €"
    tokens = [made.convert_tokens_to_ids(named(bytes([byte]))) for byte in text.encode()]
    expected = ["", "é", "", "", "", "😀", "\0", " ", "", "", "€", ""]
    assert pieces(made, tokens) == expected


def test_blanks_at_the_beginning_stay() -> None:
    made = tokenizer("byte-level")
    assert pieces(made, ids(made, "Ġ", "ĠĠ", named(" jumps"))) == [" ", "  ", " jumps", ""]
    # SentencePiece's decoder drops one: it was put before the text.
    made = tokenizer("sentencepiece")
    tokens = ids(made, BLANK * 2, BLANK + "jumps", BLANK + "over")
    assert pieces(made, tokens) == [" ", " jumps", " over", ""]
    assert pieces(made, tokens[1:]) == ["jumps", " over", ""]


def test_a_text_that_continues_a_prompt() -> None:
    """Its pieces are what comes after the prompt in the text of both."""
    made: Any = tokenizer("sentencepiece")
    x, jumps, two, byte = ids(made, BLANK + "x", BLANK + "jumps", BLANK * 2, "<0x0A>")
    start, rest = made.convert_tokens_to_ids("<s>"), ids(made, "<0xE2>", "<0x82>", "<0xAC>")
    for prompt in ([start, x], [x, start], [x] * 100, [x, byte], [two]):
        for answer in ([jumps], [two, jumps, x], [x, *rest, jumps]):
            detokenizer = Detokenizer(made).after(prompt)
            for _ in range(2):
                found = "".join(detokenizer.piece(token, None) for token in answer)
                assert made.decode(prompt) + found == made.decode(prompt + answer)
                detokenizer.reset()
    # There is nothing before it but a special token.
    assert Detokenizer(made).after([start]).piece(jumps, "length") == "jumps"
    made = tokenizer("byte-level")
    parts = [made.convert_tokens_to_ids(named(bytes([byte]))) for byte in "é".encode()]
    detokenizer = Detokenizer(made).after(parts[:1])
    assert detokenizer.piece(parts[1], None) == "é"
    assert detokenizer.piece(start, "stop") == ""


def test_a_token_within_a_text() -> None:
    for kind, name, expected in (
        ("sentencepiece", BLANK + "jumps", " jumps"),
        ("sentencepiece", BLANK, " "),
        ("sentencepiece", "<0xE2>", "\ufffd"),
        ("wordpiece", "hello", " hello"),
        ("wordpiece", "##ing", "ing"),
        ("byte-level", "Ġ", " "),
        ("byte-level", named(b"\x82\xac\xe2"), "\ufffd"),
        ("byte-level", "x é", "x é"),
    ):
        made: Any = tokenizer(kind)
        assert Wrapped(made, Detokenizer).within(made.convert_tokens_to_ids(name)) == expected


def test_words_come_one_by_one() -> None:
    made = tokenizer("wordpiece")
    tokens = ids(made, "hello", "##ing", "world", ".", "</s>")
    assert pieces(made, tokens) == ["hello", "ing", " world", ".", " </s>", ""]
    # A blank before punctuation may go, so a text's end waits for a letter that ends that.
    made = tokenizer("wordpiece as it is", cleans=True)
    assert pieces(made, tokens)[:3] == ["hello", "ing", " world"]
    tokens = ids(made, "don", "n't", "b")
    assert pieces(made, tokens) == ["do", "", "nn't b", ""]


def test_bytes_wait_for_the_end_of_their_row() -> None:
    """One that is not UTF-8 makes all of them invalid."""
    made = tokenizer("sentencepiece")
    euro = ids(made, "<0xE2>", "<0x82>", "<0xAC>")
    assert pieces(made, [*euro, *ids(made, "x")]) == ["", "", "", "€x", ""]
    assert pieces(made, [*euro, *ids(made, "<0xFF>", "x")])[4:] == ["\ufffd" * 4 + "x", ""]
    assert pieces(made, euro) == ["", "", "", "€"]
    # An id without a token is no end of a row.
    assert pieces(made, [*euro[:2], len(made), euro[2]])[-1] == "€"


@pytest.mark.parametrize("name", ["x", "\ufffd", "<0xE2>", "<0x0A>", "</s>", BLANK])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level in a sequence", "wordpiece"])
def test_time_grows_with_the_number_of_tokens(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted as tokens that are decoded."""
    made: Any = tokenizer(kind)
    token = made.convert_tokens_to_ids(name)
    if token is None or token == made.unk_token_id:
        token = len(made) - 3
    decode = type(made).decode
    decoded: list[int] = []

    def counted(tokens: list[int], **options: Any) -> Any:
        decoded.append(len(tokens))
        return decode(made, tokens, **options)

    monkeypatch.setattr(made, "decode", counted)
    found = pieces(made, [token] * 3000)
    assert sum(decoded) < 8 * 3000
    assert "".join(found) == decode(made, [token] * 3000)


def test_detokenizers_of_two_texts_share_nothing(small_tier: Path) -> None:
    made = load_tokenizer(small_tier, {})
    one, other = made.detokenizer, made.detokenizer
    assert isinstance(one, Detokenizer)
    tokens = made.encode("The heron")
    for token in tokens:
        one.add_token(token)
        other.add_token(token)
        other.add_token(tokens[0])
    assert one.text == "The heron" != other.text
    one.reset()
    assert one.text == one.last_segment == ""
