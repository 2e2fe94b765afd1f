"""The tokenizer of a tier in a GGUF file, and tokenizers of such files in them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.checkpoints.gguf_vocabulary import vocabulary_fields
from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports.gguf_tokenizer import read_vocabulary, write_tokenizer
from tests.builders import CHAT_TEMPLATE, Built, write_overlay
from tests.engine import tier_of
from tests.gguf_builder import gpt2_fields, spm_fields
from tests.test_export_gguf import DIMS, Read, refused


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return write_overlay(tmp_path_factory.mktemp("built") / "o", **DIMS)


def test_the_tokenizer_and_its_template(built: Built, tmp_path: Path):
    made = tier_of(built.path, None, tmp_path / "t")
    fields = Read(export_tier(made, tmp_path / "e", "gguf").path).fields
    stated = json.loads((made / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"]
    for text, number in stated["model"]["vocab"].items():
        assert tokens[number] == text
    kinds = fields["tokenizer.ggml.token_type"]
    special = {token["id"] for token in stated["added_tokens"]}
    assert {n for n, kind in enumerate(kinds) if kind == 3} == special
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.merges"] == [" ".join(m) for m in stated["model"]["merges"]]
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert len(tokens) == built.dims.vocab


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": "[a-z]+"},
                            "behavior": "Isolated",
                            "invert": False,
                        },
                        {
                            "type": "ByteLevel",
                            "add_prefix_space": False,
                            "trim_offsets": True,
                            "use_regex": False,
                        },
                    ],
                }
            },
            "its own",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have(
    built: Built, change: dict[str, Any], said: str, tmp_path: Path
):
    made = tier_of(built.path, None, tmp_path / "t")
    path = made / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(made, tmp_path / "e", said)


PIECES = [
    *"\u2581thesanirl",
    "th",
    "he",
    "\u2581t",
    "the",
    "\u2581the",
    "\u2581s",
    "ea",
    "\u2581sea",
]


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_tokenizer_from_a_gguf_file_comes_back(model: str, space: bool, tmp_path: Path):
    fields = spm_fields(300, PIECES) if model == "llama" else gpt2_fields(300, "smollm")
    fields |= {"tokenizer.ggml.add_space_prefix": space, "tokenizer.ggml.add_bos_token": space}
    if model == "gpt2":
        fields["tokenizer.ggml.bos_token_id"] = 258
    made = [rebuilt(fields, tmp_path / "once")]
    back, notes = vocabulary_fields(tmp_path / "once", 300, [])
    assert not notes
    for name in ("model", "tokens", "add_bos_token", "eos_token_id"):
        assert back[f"tokenizer.ggml.{name}"] == fields.get(f"tokenizer.ggml.{name}"), name
    made.append(rebuilt(back, tmp_path / "twice"))
    for text in ("the sea", " the  sealer's 42 hens", "<s>the</s>he", "é\n\tnaïve <|tool|>he", ""):
        assert made[0].encode(text).ids == made[1].encode(text).ids, text


def rebuilt(fields: dict[str, Any], folder: Path) -> Tokenizer:
    arrays = ("token_type", "scores")
    fields = {k: np.array(v) if k.endswith(arrays) else v for k, v in fields.items()}
    folder.mkdir()
    write_tokenizer(read_vocabulary(fields, "llama", "x.gguf"), folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lstrip": True}, "has lstrip"),
        ({"rstrip": True}, "has rstrip"),
        ({"single_word": True}, "has single_word"),
    ],
)
def test_tokens_that_take_blanks_with_them(change: dict[str, Any], said: str, tmp_path: Path):
    rebuilt(gpt2_fields(300), tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"][0] |= change
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=said):
        vocabulary_fields(tmp_path / "t", 300, [])


def test_a_space_before_the_first_word_only(tmp_path: Path):
    """As newer tokenizers of Mistral have it; llama.cpp has one after special tokens, too."""
    rebuilt(spm_fields(300, PIECES), tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = None
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "split": False}
    tokenizer["pre_tokenizer"] = metaspace | {"prepend_scheme": "first"}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="before every piece"):
        vocabulary_fields(tmp_path / "t", 300, [])
    tokenizer["pre_tokenizer"] = metaspace | {"prepend_scheme": "always"}
    path.write_text(json.dumps(tokenizer))
    fields, _ = vocabulary_fields(tmp_path / "t", 300, [])
    assert fields["tokenizer.ggml.add_space_prefix"] is True


def test_no_two_tokens_have_one_text(tmp_path: Path):
    """Rows without a token get a name that no token has: llama.cpp ends its process otherwise."""
    rebuilt(gpt2_fields(300), tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"][0]["content"] = "[PAD305]"
    path.write_text(json.dumps(tokenizer))
    fields, _ = vocabulary_fields(tmp_path / "t", 310, [])
    tokens = fields["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and len(set(tokens)) == len(tokens) == 310


def test_more_ends_than_a_file_names(tmp_path: Path):
    rebuilt(gpt2_fields(300), tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": [5, 6, 7]}')
    fields, notes = vocabulary_fields(tmp_path / "t", 300, [8])
    assert fields["tokenizer.ggml.eot_token_id"] == 5 and fields["tokenizer.ggml.eom_token_id"] == 6
    assert any("[7, 8]" in note for note in notes)


def test_a_tier_without_a_tokenizer(tmp_path: Path):
    built = write_overlay(tmp_path / "o", **DIMS, tokenizer=False)
    exported = export_tier(tier_of(built.path, None, tmp_path / "t"), tmp_path / "e", "gguf")
    assert Read(exported.path).fields["tokenizer.ggml.model"] == "none"
    assert any("no tokenizer" in note for note in exported.notes)
