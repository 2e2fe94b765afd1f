"""Build `tokenizer.json` and its config from the metadata of a GGUF file.

Two tokenizers are supported. `llama` is SentencePiece BPE with a score for every piece: the merges
are all ways to split a piece into two others, best score first. `gpt2` is byte-level BPE with a
list of merges; `tokenizer.ggml.pre` names the rule that splits text into words. Defaults are those
of llama.cpp (`src/llama-vocab.cpp`); the rules are those of the models' own tokenizer.json.

transformers can convert these tokenizers, too, but it drops a space at the beginning of a text, and
uses GPT-2's rule if it does not know the rule's name.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.imports.gguf_ends import find_ends
from outlier_mlx.models.token_rules import (
    CONTROL,
    NORMAL,
    QWEN2,
    QWEN35,
    RULES,
    UNKNOWN,
    USER_DEFINED,
)
from outlier_mlx.storage.output import write_json, write_whole

_SPACE = "\u2581"  # SentencePiece's symbol for a space
# Limit for the sum of squared lengths of all pieces; a vocabulary of 32,000 has some millions.
_MAX_WORK = 10**9

# Architectures whose tokenizer is Qwen2's, but for marks in words of the last.
QWEN = ("qwen2", "qwen3", "qwen35")
# Rules that differ from Qwen2's only in where a few words are split: the same bytes and merges.
_SPLIT_OTHERWISE = ("gpt-2", "qwen2", "qwen35")


@dataclass(frozen=True)
class Vocabulary:
    """The checked metadata of a tokenizer.

    Attributes:
        where: the file, for messages.
        model: "llama" or "gpt2".
        tokens: text of each token, by id.
        types: type of each token, by id: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused,
            6 byte; corrected by `find_ends`.
        scores: score of each token, by id, float32; for "llama" only.
        merges: pairs of pieces, in order; for "gpt2" only.
        rule: name of the rule that splits text into words; for "gpt2" only.
        special: ids of "bos", "eos", "unk" and "pad", if they exist.
        stops: other ids that end a reply.
        add: which of "bos" and "eos" are added to every text.
        space: whether a space is added before a text; for "llama" only.
        templates: chat templates by name; "" is the default.
        notes: assumptions that were made.
    """

    where: str
    model: str
    tokens: list[str]
    types: np.ndarray
    scores: np.ndarray
    merges: list[tuple[str, str]]
    rule: str
    special: dict[str, int]
    stops: list[int]
    add: frozenset[str]
    space: bool
    templates: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_vocabulary(fields: dict[str, Any], architecture: str, where: str) -> Vocabulary:
    """Read the tokenizer from the metadata of a file; `where` is the file, for messages.

    `architecture` decides if the file does not name its rule, as in early 2024.

    Raises:
        CheckpointError: there is no tokenizer, or it is not supported or not consistent.
    """
    read = _Reader(fields, where)
    model = read.get("model", str, None)
    if model not in ("llama", "gpt2"):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model is {model!r}, expected 'llama' or 'gpt2'"
        )
    tokens = read.strings("tokens")
    (most, times), *_ = Counter(tokens).most_common(1)
    if times > 1:
        raise CheckpointError(f"{where}: duplicate token {most[:40]!r} ({times} times)")
    spm = model == "llama"
    rule, notes = ("", []) if spm else _rule(read, architecture)
    notes += _split_otherwise(architecture, rule or model, where)
    special = _special(read, len(tokens), {"bos": 1, "eos": 2, "unk": 0} if spm else {})
    types = read.numbers("token_type", len(tokens), NORMAL)
    merges = [] if spm else read.merges()
    templates = _templates(fields, where)
    stops = [read.token(f"{name}_token_id", len(tokens)) for name in ("eot", "eom")]
    given = [n for n in stops if n is not None]
    ends = find_ends(tokens, types, merges, special, given, templates)
    if ends.changed:
        changed = listed(ends.changed, 8)
        notes.append(f"tokens that are special, whatever their type says: {changed}")
    bos = read.get("add_bos_token", bool, spm or RULES[rule].bos)
    return Vocabulary(
        where=where,
        model=model,
        tokens=tokens,
        types=ends.types,
        scores=read.numbers("scores", len(tokens), None if spm else 0.0),
        merges=merges,
        rule=rule,
        special=special,
        stops=given + ends.stops,
        add=frozenset(
            name
            for name, wanted in (("bos", bos), ("eos", read.get("add_eos_token", bool, False)))
            if wanted and name in special
        ),
        space=read.get("add_space_prefix", bool, True),
        templates=templates,
        notes=tuple(notes),
    )


def write_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        CheckpointError: a merge has a token that is not in the vocabulary.
    """
    try:
        text = _build(vocabulary).to_str(pretty=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise CheckpointError(f"{vocabulary.where}: invalid tokenizer: {error}") from None
    write_whole(folder / "tokenizer.json", text)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": "bos" in vocabulary.add,
        "add_eos_token": "eos" in vocabulary.add,
    }
    for name, number in vocabulary.special.items():
        config[f"{name}_token"] = vocabulary.tokens[number]
    templates = vocabulary.templates
    if set(templates) == {""}:
        config["chat_template"] = templates[""]
    elif templates:
        config["chat_template"] = [
            {"name": name or "default", "template": text} for name, text in templates.items()
        ]
    write_json(folder / "tokenizer_config.json", config)


def _build(vocabulary: Vocabulary) -> Any:
    """Build the `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, processors

    tokenizer = _sentencepiece(vocabulary) if vocabulary.model == "llama" else _bytes(vocabulary)
    added = [
        AddedToken(text, normalized=False, special=kind != USER_DEFINED)
        for text, kind in zip(vocabulary.tokens, vocabulary.types.tolist(), strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and text
    ]
    tokenizer.add_tokens(added)
    if vocabulary.add:
        ends = {n: vocabulary.tokens[vocabulary.special[n]] for n in sorted(vocabulary.add)}

        def around(text: str, number: int) -> list[str]:
            before = [f"{ends['bos']}:{number}"] if "bos" in ends else []
            after = [f"{ends['eos']}:{number}"] if "eos" in ends else []
            return [*before, f"{text}:{number}", *after]

        tokenizer.post_processor = processors.TemplateProcessing(
            single=around("$A", 0),
            pair=around("$A", 0) + around("$B", 1),
            special_tokens=[(ends[n], vocabulary.special[n]) for n in ends],
        )
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {text: n for n, text in enumerate(vocabulary.tokens)}
    unknown = vocabulary.special.get("unk")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_scored_merges(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(_SPACE)] if vocabulary.space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _scored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All pairs of normal pieces whose concatenation is a normal piece, best score first."""
    normal = np.flatnonzero(vocabulary.types == NORMAL).tolist()
    ids = {vocabulary.tokens[n]: n for n in normal}
    if sum(len(text) ** 2 for text in ids) > _MAX_WORK:
        raise CheckpointError(f"a token has {max(map(len, ids))} characters")
    scores = vocabulary.scores.tolist()
    found = []
    for text, number in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                found.append((-scores[number], left, right))
    return [(vocabulary.tokens[a], vocabulary.tokens[b]) for _, a, b in sorted(found)]


def _bytes(vocabulary: Vocabulary) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = RULES[vocabulary.rule]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: n for n, text in enumerate(vocabulary.tokens)},
            merges=vocabulary.merges,
            ignore_merges=rule.whole,
        )
    )
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _rule(read: "_Reader", architecture: str) -> tuple[str, list[str]]:
    """The name of the rule, and a note if it is assumed."""
    name = read.get("pre", str, None)
    if name is None:
        name = "default"
        if architecture in QWEN:
            name = "qwen35" if architecture == "qwen35" else "qwen2"
        return name, [f"tokenizer.ggml.pre is missing; the rule {name} is assumed"]
    if name not in RULES:
        raise CheckpointError(
            f"{read.where}: tokenizer.ggml.pre {name!r} is not supported; supported:"
            f" {', '.join(RULES)}"
        )
    return name, []


def _split_otherwise(architecture: str, rule: str, where: str) -> list[str]:
    """A note if transformers splits some words otherwise than this rule does."""
    own = QWEN35 if architecture == "qwen35" else QWEN2
    if architecture not in QWEN or RULES.get(rule) is own:
        return []
    # transformers 5 ignores tokenizer.json and its config for models of these types.
    said = f"a {architecture} model with the tokenizer {rule!r}"
    if rule not in _SPLIT_OTHERWISE:
        raise CheckpointError(f"{where}: {said}; transformers would use Qwen2's tokenizer for it")
    return [f"{said}: transformers may split a few words as Qwen2's tokenizer does"]


def _special(read: "_Reader", count: int, defaults: dict[str, int]) -> dict[str, int]:
    """The ids of "bos", "eos", "unk" and "pad", of those that exist."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {name: read.token(f"{key}_token_id", count) for name, key in keys.items()}
    known = {name: defaults.get(name) if n is None else n for name, n in found.items()}
    return {name: n for name, n in known.items() if n is not None and n < count}


def _templates(fields: dict[str, Any], where: str) -> dict[str, str]:
    key = "tokenizer.chat_template"
    found = {name[len(key) :]: text for name, text in fields.items() if name.startswith(key)}
    # The field `tokenizer.chat_templates` is the list of the templates' names.
    result = {name.removeprefix("."): text for name, text in found.items() if name != "s"}
    if not all(isinstance(text, str) for text in result.values()):
        raise CheckpointError(f"{where}: {key} is not a string")
    return result


class _Reader:
    """Reads fields of a tokenizer and checks their types."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def get(self, name: str, kind: type, default: Any) -> Any:
        value = self.fields.get(f"tokenizer.ggml.{name}", default)
        if value is not default and type(value) is not kind:
            raise CheckpointError(
                f"{self.where}: tokenizer.ggml.{name} is not a {_KINDS.get(kind, kind.__name__)}"
            )
        return value

    def token(self, name: str, count: int) -> int | None:
        value = self.get(name, int, None)
        if value is not None and not 0 <= value < count:
            raise CheckpointError(
                f"{self.where}: tokenizer.ggml.{name} is {value}, but there are {count} tokens"
            )
        return value

    def strings(self, name: str) -> list[str]:
        value = self.get(name, list, [])
        if not value:
            raise CheckpointError(f"{self.where}: tokenizer.ggml.{name} is missing or empty")
        return value

    def numbers(self, name: str, count: int, default: float | None) -> np.ndarray:
        value = self.fields.get(f"tokenizer.ggml.{name}")
        if value is None and default is not None:
            return np.full(count, default)
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise CheckpointError(
                f"{self.where}: tokenizer.ggml.{name}: expected a number for each of the"
                f" {count} tokens"
            )
        if not np.isfinite(value).all():
            raise CheckpointError(f"{self.where}: tokenizer.ggml.{name} holds NaN or infinity")
        return value

    def merges(self) -> list[tuple[str, str]]:
        pairs = [tuple(text.split(" ")) for text in self.strings("merges")]
        for pair in pairs:
            if len(pair) != 2:
                raise CheckpointError(
                    f"{self.where}: tokenizer.ggml.merges: {' '.join(pair)!r} is not a pair"
                )
        return [(a, b) for a, b in pairs]


_KINDS: dict[type, str] = {
    str: "string",
    int: "whole number",
    bool: "boolean",
    list: "list of strings",
}
