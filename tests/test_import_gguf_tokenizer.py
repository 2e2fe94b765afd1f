"""Tokenizers rebuilt from GGUF metadata, against sentencepiece, transformers and the goldens."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from outlier_mlx.engine.loading import load_tokenizer
from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports.gguf_tokenizer import read_vocabulary, write_tokenizer
from outlier_mlx.storage.gguf import read_gguf
from tests.gguf_builder import gpt2_fields, spm_fields
from tests.goldens import require_shared

TEXT = [
    "The gate picks two experts for every token, and their outputs are added.",
    "def route(x):\n    return softmax(x @ gate.T)  # 12345 rows",
    "Ein naives Café in Zürich; 你好, 世界!  two  spaces\t\ttabs",
    "we'll see what they've done, it's 3.14159 or 2,718",
] * 4
STRINGS = [
    "",
    " ",
    "   leading and trailing   ",
    "two\n\nlines\r\n and a\ttab",
    "12345 years, it's WE'LL",
    "naïve 你 café \U0001f600",
    "(a+b)^2 = $x | <y>",
]


def as_arrays(fields: dict[str, Any]) -> dict[str, Any]:
    """Metadata as it comes out of a file: numbers in arrays."""
    numbers = ("token_type", "scores")
    return {k: np.array(v) if k.endswith(numbers) else v for k, v in fields.items()}


def made(fields: dict[str, Any], folder: Path, architecture: str = "llama") -> Tokenizer:
    vocabulary = read_vocabulary(as_arrays(fields), architecture, "x.gguf")
    write_tokenizer(vocabulary, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def trained() -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def described(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """A SentencePiece model as llama.cpp's converter describes it."""
    ids = range(model.vocab_size())
    kinds = [
        2
        if model.is_unknown(n)
        else 3
        if model.is_control(n)
        else 6
        if model.is_byte(n)
        else 4
        if model.id_to_piece(n) == "<tool>"
        else 1
        for n in ids
    ]
    return {
        **spm_fields(len(kinds) + 300),
        "tokenizer.ggml.tokens": [model.id_to_piece(n) for n in ids],
        "tokenizer.ggml.scores": [model.get_score(n) for n in ids],
        "tokenizer.ggml.token_type": kinds,
    }


@pytest.fixture(scope="module")
def rebuilt(
    trained: sentencepiece.SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return made(described(trained), tmp_path_factory.mktemp("spm"))


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.sampled_from(STRINGS + TEXT[:4]), st.text(max_size=40)))
def test_sentencepiece_ids(
    trained: sentencepiece.SentencePieceProcessor, rebuilt: Tokenizer, text: str
):
    text = text.replace("\u2581", " ").replace("\0", "")  # the library's own spaces and ends
    expected = trained.encode(text)
    assert rebuilt.encode(text, add_special_tokens=False).ids == expected
    assert rebuilt.encode(text).ids == [1, *expected]
    assert rebuilt.decode(expected) == trained.decode(expected)


def test_special_tokens_stay_whole(rebuilt: Tokenizer):
    tool = rebuilt.token_to_id("<tool>")
    ids = rebuilt.encode("<s>the<tool></s>").ids
    assert ids[:2] == [1, 1] and ids[-2:] == [tool, 2]
    assert rebuilt.decode(ids) == "the<tool>"  # control tokens are not shown, this one is


def test_no_space_before_text(trained: sentencepiece.SentencePieceProcessor, tmp_path: Path):
    fields = described(trained) | {
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }
    tokenizer = made(fields, tmp_path)
    encoded = tokenizer.encode("the gate")
    assert encoded.tokens[0][0] == "t" and encoded.ids[-1] == 2 and 1 not in encoded.ids
    assert tokenizer.decode(encoded.ids) == "the gate"


# How each rule cuts "it's 12345", "Aa" and "B\n\n $x" before merging; spaces and ends of lines
# are written as byte-level BPE does.
WORDS = {
    "qwen2": ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Aa", "B", "ĊĊ", "Ġ$", "x"],
    "llama-bpe": ["it", "'s", "Ġ", "123", "45", "Aa", "B", "ĊĊ", "Ġ$", "x"],
    "gpt-2": ["it", "'s", "Ġ12345", "Aa", "B", "ĊĊ", "Ġ$", "x"],
    "smollm": ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Aa", "B", "ĊĊ", "Ġ$", "x"],
    "default": ["it", "'", "s", "Ġ", "123", "45", "Aa", "B", "ĊĊĠ", "$", "x"],
    "tekken": ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Aa", "B", "ĊĊ", "Ġ$", "x"],
}


@pytest.mark.parametrize("rule", WORDS)
def test_rules_cut_words(rule: str, tmp_path: Path):
    tokenizer = made(gpt2_fields(300, rule), tmp_path)
    words = [
        word
        for text in ("it's 12345", "Aa", "B\n\n $x")
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)
    ]
    assert words == WORDS[rule]


@pytest.mark.parametrize("rule, reference", [("qwen2", Qwen2Tokenizer), ("gpt-2", GPT2Tokenizer)])
def test_byte_level_ids(rule: str, reference: Any, tmp_path: Path):
    fields = gpt2_fields(300, rule)
    tokenizer = made(fields, tmp_path)
    tokens = fields["tokenizer.ggml.tokens"]
    other = reference(
        vocab={text: n for n, text in enumerate(tokens)},
        merges=[tuple(text.split()) for text in fields["tokenizer.ggml.merges"]],
    )
    for text in [*STRINGS, *TEXT[:4], "he the he"]:
        expected = other.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected) == text
    ids = tokenizer.encode("he<|tool|><|end|>").ids
    assert ids == [tokens.index(text) for text in ("he", "<|tool|>", "<|end|>")]


def test_whole_words_of_llama3(tmp_path: Path):
    fields = gpt2_fields(300, "llama-bpe")
    fields["tokenizer.ggml.tokens"][-1] = "xyz"  # a token that no merges make
    fields["tokenizer.ggml.token_type"][-1] = 1
    assert made(fields, tmp_path).encode("xyz").ids == [299]


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2", "qwen3", "ternary_mixtral"])
def test_mlx_lm_loads_the_same(family: str, tmp_path: Path):
    fields = gpt2_fields(300) if family in ("qwen2", "qwen3") else spm_fields(300)
    fields["tokenizer.chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = made(fields, tmp_path, family)
    config = {"model_type": family, "vocab_size": 300, "eos_token_id": [2, 5]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path, config)
    for text in STRINGS:
        assert loaded.encode(text) == tokenizer.encode(text).ids, text
    chat = [{"role": "user", "content": "he"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "he"
    assert loaded.eos_token_ids >= {2, 5}


def test_named_templates(tmp_path: Path):
    fields = spm_fields(300) | {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "b",
        "tokenizer.chat_templates": ["tool_use"],
    }
    made(fields, tmp_path)
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    expected = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert found == expected


def test_a_rule_that_is_not_named():
    fields = gpt2_fields(300)
    del fields["tokenizer.ggml.pre"]
    found = read_vocabulary(as_arrays(fields), "qwen2", "x.gguf")
    assert found.rule == "qwen2" and "tokenizer.ggml.pre" in found.notes[0]
    assert read_vocabulary(as_arrays(fields), "llama", "x.gguf").rule == "default"


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant{% endif %}"
)


def with_tokens(fields: dict[str, Any], *texts: str, kind: int = 3) -> dict[str, Any]:
    """Metadata with these tokens from 280 on, all of one type."""
    for number, text in enumerate(texts, 280):
        fields["tokenizer.ggml.tokens"][number] = text
        fields["tokenizer.ggml.token_type"][number] = kind
    return fields


def ends_of(fields: dict[str, Any], folder: Path, architecture: str = "llama") -> list[str]:
    """Texts of the tokens that end a reply, besides that of "eos"."""
    found = read_vocabulary(as_arrays(fields), architecture, "x.gguf")
    write_tokenizer(found, folder)
    return [found.tokens[number] for number in found.stops]


@pytest.mark.parametrize("kind", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("build", [spm_fields, gpt2_fields])
def test_known_ends_of_a_turn(build: Any, kind: int, tmp_path: Path):
    """They end a reply and are one token, which is not shown, whatever their type says."""
    texts = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|eom_id|>", "<EOT>")
    fields = with_tokens(build(300), *texts, kind=kind)
    assert set(ends_of(fields, tmp_path)) >= set(texts)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for number, text in enumerate(texts, 280):
        ids = tokenizer.encode(f"he{text}he").ids
        assert ids.count(number) == 1 and len(ids) <= 5
        assert "<" not in tokenizer.decode(ids)
    notes = read_vocabulary(as_arrays(fields), "llama", "x.gguf").notes
    told = "tokens that are special, whatever their type says: <|eot_id|>, <|im_end|>"
    assert any(note.startswith(told) for note in notes) == (kind != 3)


@pytest.mark.parametrize("kind", [1, 3])
def test_llama_3_of_april_2024(kind: int, tmp_path: Path):
    """Its files name <|end_of_text|> only, and its replies end in <|eot_id|>."""
    fields = with_tokens(gpt2_fields(300, "llama-bpe"), *LLAMA3, kind=kind) | {
        "tokenizer.ggml.bos_token_id": 280,
        "tokenizer.ggml.eos_token_id": 281,
        "tokenizer.chat_template": LLAMA3_CHAT,
    }
    fields["tokenizer.ggml.tokens"][258] = "<|tail|>"  # was <|end|>
    assert ends_of(fields, tmp_path) == ["<|eot_id|>"]
    config = {"model_type": "llama", "eos_token_id": [281, 283]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path, config)
    assert loaded.eos_token_ids == {281, 283}
    chat = [{"role": "user", "content": "he"}]
    ids = loaded.apply_chat_template(chat, add_generation_prompt=True)
    assert ids[:2] == [280, 282] and ids.count(283) == 1 and ids.count(282) == 2


@pytest.mark.parametrize("kind", [1, 4])
def test_what_the_template_ends_a_turn_with(kind: int, tmp_path: Path):
    """A token that nobody knows; others that it writes are whole, and shown."""
    fields = with_tokens(spm_fields(300), "<done>", "<begin>", "[INST]", "[0]", kind=kind)
    fields["tokenizer.chat_template"] = (
        "{% set first = messages[0] %}"
        "{% for m in messages %}<begin>[INST]{{ m.content }} <done>\n{% endfor %}"
    )
    assert ends_of(fields, tmp_path) == ["<done>"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("<begin>[INST]he<done>", add_special_tokens=False).ids
    assert [n for n in ids if n >= 280] == [281, 282, 280]
    assert tokenizer.decode(ids) == "<begin>[INST] he"
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    assert ("[0]" in added) == (kind == 4)  # an index in the template


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ messages[-1].content }}he", "{{ 'x' * 10**10 }}", "he"],
)
def test_templates_that_end_no_turn(template: str, tmp_path: Path):
    fields = spm_fields(300) | {"tokenizer.chat_template": template}
    assert ends_of(fields, tmp_path) == []


def test_a_token_that_merges_make_is_text(tmp_path: Path):
    """In a vocabulary of source code, </s> may be a frequent word."""
    fields = with_tokens(gpt2_fields(300), "</", "</s", "</s>", kind=1)
    fields["tokenizer.ggml.merges"] += ["< /", "</ s", "</s >"]
    assert "</s>" not in ends_of(fields, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("he</s>").ids) == "he</s>"


@pytest.mark.parametrize(
    "texts, ends",
    [
        (("<|return|>", "<|call|>", "<|end|>"), {"<|return|>", "<|call|>"}),
        (("<|calls|>", "<|flush|>", "<|end|>"), {"<|calls|>", "<|flush|>"}),
        (("<|return|>", "<|end|>"), {"<|return|>", "<|end|>"}),
    ],
)
def test_ends_that_are_none_beside_others(texts: tuple[str, ...], ends: set[str], tmp_path: Path):
    assert set(ends_of(with_tokens(spm_fields(300), *texts), tmp_path)) == ends


def test_ends_that_the_file_names_come_first(tmp_path: Path):
    fields = with_tokens(spm_fields(300), "<|im_end|>", "<a>", "<b>", kind=1) | {
        "tokenizer.ggml.eot_token_id": 282,
        "tokenizer.ggml.eom_token_id": 281,
    }
    assert ends_of(fields, tmp_path) == ["<b>", "<a>", "<|im_end|>"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("<a><b>", add_special_tokens=False).ids[-2:] == [281, 282]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model": "t5"}, "tokenizer.ggml.model is 't5', expected 'llama' or 'gpt2'"),
    "no model": ({"model": None}, "tokenizer.ggml.model is None"),
    "no tokens": ({"tokens": None}, "tokens is missing"),
    "a token twice": ({"tokens": ["<unk>", "a", "b", "a"]}, "duplicate token 'a' (2 times)"),
    "a token without end": (
        {"tokens": [f"t{n}" for n in range(299)] + ["x" * 40_000], "token_type": np.ones(300)},
        "a token has 40000 characters",
    ),
    "scores of fewer": ({"scores": np.zeros(5)}, "scores: expected a number for each of the 300"),
    "no scores": ({"scores": None}, "scores: expected a number"),
    "scores that are no numbers": ({"scores": np.full(300, np.nan)}, "scores holds NaN"),
    "types as text": ({"token_type": ["a"] * 300}, "token_type: expected a number"),
    "an end beyond": ({"eos_token_id": 300}, "eos_token_id is 300, but there are 300 tokens"),
    "a flag that is none": ({"add_bos_token": 1}, "add_bos_token is not a boolean"),
}
REFUSED_BYTES: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown rule": ({"pre": "chameleon"}, "tokenizer.ggml.pre 'chameleon' is not supported"),
    "a merge of three": ({"merges": ["a b c"]}, "'a b c' is not a pair"),
    "a merge of nothing": ({"merges": ["h zz"]}, "invalid tokenizer"),
    "no merges": ({"merges": None}, "merges is missing"),
}


@pytest.mark.parametrize("case", [*REFUSED, *REFUSED_BYTES])
def test_refused(case: str, tmp_path: Path):
    fields = as_arrays(spm_fields(300) if case in REFUSED else gpt2_fields(300))
    changes, said = (REFUSED | REFUSED_BYTES)[case]
    for name, value in changes.items():
        if value is None:
            del fields[f"tokenizer.ggml.{name}"]
        else:
            fields[f"tokenizer.ggml.{name}"] = value
    with pytest.raises(CheckpointError) as error:
        write_tokenizer(read_vocabulary(fields, "llama", "x.gguf"), tmp_path)
    assert said in str(error.value) and str(error.value).startswith("x.gguf: ")


@pytest.mark.parametrize("case", ["gguf_merged_4x", "gguf_split_2x", "gguf_kquant_2x"])
def test_goldens(case: str, tmp_path: Path):
    folder = require_shared() / "goldens/frankenmoe" / case
    vocabulary = read_vocabulary(read_gguf(folder / "model.gguf").fields, "llama", "x.gguf")
    write_tokenizer(vocabulary, tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tokenizer = load_tokenizer(tmp_path, {"eos_token_id": 2})
    for text, expected in json.loads((folder / "meta.json").read_text())["tokenization"].items():
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected[1:]) == text
