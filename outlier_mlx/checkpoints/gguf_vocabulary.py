"""A model's tokenizer and chat templates as the metadata of a GGUF file.

llama.cpp has its own code for each rule that splits text into words, and names them
(`tokenizer.ggml.pre`). The tokenizer that transformers loads is held against these rules, part by
part; one that llama.cpp would not compute is refused.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.fields import short
from outlier_mlx.models.token_ids import end_ids
from outlier_mlx.models.token_rules import (
    BYTE,
    CONTROL,
    GPT2,
    NORMAL,
    RULES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_json
from outlier_mlx.terminal import quiet_transformers
from outlier_mlx.writing.assets import GENERATION, has_tokenizer
from outlier_mlx.writing.gguf_file import Field

_KEY = "tokenizer.ggml"
_SPACE = "\u2581"  # SentencePiece's symbol for a space
# Fields for ids that end a reply besides `eos_token_id`.
_MORE_ENDS = ("eot_token_id", "eom_token_id")
_BYTES = {f"<0x{n:02X}>" for n in range(256)}


def vocabulary_fields(
    folder: Path, rows: int, config_ends: Iterable[int]
) -> tuple[dict[str, Field], list[str]]:
    """The fields `tokenizer.*` for the tokenizer in a folder, and notes on where results differ.

    Args:
        folder: the model's; no code in it is run.
        rows: rows of the embedding; those without a token become unused tokens.
        config_ends: the tokens that end a text, as config.json says.

    Raises:
        CheckpointError: llama.cpp has no such tokenizer; names the part that it does not have.
    """
    if not has_tokenizer(folder):
        return {f"{_KEY}.model": "none"}, [
            f"{folder.name} has no tokenizer: the file has none, and llama.cpp's programs end when"
            " they get text"
        ]
    try:
        with quiet_transformers():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
        found = json.loads(backend.to_str())
    except Exception as error:  # whatever transformers raises for wrong files
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {error}") from None
    where = f"{folder.name}: tokenizer"
    fields, notes = _of_model(found, rows, where)
    fields |= _special(tokenizer, backend, fields[f"{_KEY}.tokens"], where)
    notes += _ends(fields, folder, config_ends)
    return fields | _templates(tokenizer), notes


def _of_model(found: dict, rows: int, where: str) -> tuple[dict[str, Field], list[str]]:
    """The tokens, and how text becomes tokens, from the tokenizer as its library writes it."""
    model = found["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"{where}: {model.get('type')}: only BPE is exported to GGUF")
    tokens, types = _tokens(model["vocab"], found["added_tokens"], rows, where)
    shared: dict[str, Field] = {f"{_KEY}.tokens": tokens, f"{_KEY}.token_type": types}
    if model.get("byte_fallback"):
        _check_sentencepiece(found, where)
        unknown = model.get("unk_token")
        if unknown in model["vocab"]:
            types[model["vocab"][unknown]] = UNKNOWN
        types[[n for n, text in enumerate(tokens) if text in _BYTES]] = BYTE
        scores = _scores(tokens, model["merges"])
        return {f"{_KEY}.model": "llama", f"{_KEY}.pre": "default"} | shared | {
            f"{_KEY}.scores": scores,
            f"{_KEY}.add_space_prefix": _prepends(found),
        }, []
    rule, notes = _rule(found, where)
    merges = [" ".join(pair) for pair in model["merges"]]
    return {f"{_KEY}.model": "gpt2", f"{_KEY}.pre": rule} | shared | {
        f"{_KEY}.merges": merges
    }, notes


def _tokens(
    vocab: Mapping[str, int], added: list[dict], rows: int, where: str
) -> tuple[list[str], np.ndarray]:
    """The text and the type of every token; rows without a token are unused tokens.

    llama.cpp ends its process where two tokens have one text.
    """
    taken = {*vocab, *(token["content"] for token in added)}
    free = (text for n in count() if (text := f"[PAD{n}]") not in taken)
    tokens = [next(free) for _ in range(rows)]
    types = np.full(rows, UNUSED, np.dtype("<i4"))
    for text, number in vocab.items():
        tokens[number], types[number] = text, NORMAL
    for token in added:
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name):
                said = short(token["content"])
                raise CheckpointError(f"{where}: the token {said} has {name}; llama.cpp has not")
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    return tokens, types


def _rule(found: dict, where: str) -> tuple[str, list[str]]:
    """The name of the rule of a byte-level BPE, and a note if results can differ."""
    model = found["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise CheckpointError(f"{where}: {name} {short(model[name])}; llama.cpp has none")
    splits = _splits(found.get("pre_tokenizer"), where)
    whole = bool(model.get("ignore_merges"))
    fitting = (n for n, rule in RULES.items() if (rule.splits, rule.whole) == (splits, whole))
    rule = next(fitting, None)
    if rule is None:
        raise CheckpointError(
            f"{where}: llama.cpp's rules to split text into words that are known here"
            f" ({', '.join(RULES)}) do not include its own: {short(list(splits))}"
        )
    normalizer = found.get("normalizer")
    if normalizer is None:
        return rule, []
    if normalizer.get("type") != "NFC":
        raise CheckpointError(f"{where}: normalizer {short(normalizer)}; llama.cpp has none")
    return rule, [
        "llama.cpp does not normalise text to Unicode NFC as this tokenizer does: text that is not"
        " in NFC becomes other tokens"
    ]


def _splits(found: Any, where: str) -> tuple[str, ...]:
    """The patterns by which a pre-tokenizer splits text, one after the other."""
    inner = found.get("pretokenizers", [found]) if isinstance(found, dict) else []
    splits: list[str] = []
    for part in inner:
        kind = part.get("type")
        if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            splits.append(part["pattern"].get("Regex"))
        elif kind == "Digits" and part.get("individual_digits"):
            splits.append(r"\p{N}")
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            splits += [GPT2] if part.get("use_regex", True) else []
        else:
            raise CheckpointError(f"{where}: pre-tokenizer {short(part)}; llama.cpp has none")
    return tuple(splits)


def _check_sentencepiece(found: dict, where: str) -> None:
    """Refuse a SentencePiece BPE with other steps than llama.cpp's.

    llama.cpp puts a space before every piece of text between special tokens, or before none.
    """
    before = found.get("pre_tokenizer")
    if before is not None and (
        before.get("type") != "Metaspace"
        or before.get("prepend_scheme") == "first"
        or before.get("split", True)
    ):
        raise CheckpointError(
            f"{where}: pre-tokenizer {short(before)}; llama.cpp puts a space before every piece of"
            " text between special tokens, or before none"
        )
    steps = [
        (step.get("type"), step.get("prepend"), step.get("pattern"), step.get("content"))
        for step in _steps(found)
    ]
    allowed = [("Prepend", _SPACE, None, None), ("Replace", None, {"String": " "}, _SPACE)]
    if any(step not in allowed for step in steps) or (before is None and not steps):
        raise CheckpointError(f"{where}: normalizer {short(found.get('normalizer'))}")


def _steps(found: dict) -> list[dict]:
    normalizer = found.get("normalizer")
    if normalizer is None:
        return []
    return list(normalizer.get("normalizers", [normalizer]))


def _prepends(found: dict) -> bool:
    """Whether a space is put before text."""
    before = found.get("pre_tokenizer")
    if before is not None:
        return bool(before.get("prepend_scheme", "always") == "always")
    return any(step.get("type") == "Prepend" for step in _steps(found))


def _scores(tokens: list[str], merges: list[list[str]]) -> np.ndarray:
    """Scores by which llama.cpp merges in the order of the list; 0 for what nothing merges to."""
    scores = np.zeros(len(tokens), np.dtype("<f4"))
    ids = {text: n for n, text in enumerate(tokens)}
    for rank in range(len(merges) - 1, -1, -1):  # the first way to make a token decides
        number = ids.get("".join(merges[rank]))
        if number is not None:
            scores[number] = -float(rank + 1)
    return scores


def _special(tokenizer: Any, backend: Any, tokens: Any, where: str) -> dict[str, Field]:
    """The ids of special tokens, and which of them are put around every text."""
    fields: dict[str, Field] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            fields[f"{_KEY}.{key}_token_id"] = number
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    bos, eos = (fields.get(f"{_KEY}.{name}_token_id") for name in ("bos", "eos"))
    around = [(before, after) for before in (False, True) for after in (False, True)]
    fitting = (n for n in around if whole == [bos] * n[0] + plain + [eos] * n[1])
    before, after = next(fitting, (None, None))
    if before is None or after is None:
        names = [tokens[n] for n in whole]
        raise CheckpointError(f"{where}: makes {short(names)} of 'a'; llama.cpp adds BOS and EOS")
    return fields | {f"{_KEY}.add_bos_token": before, f"{_KEY}.add_eos_token": after}


def _ends(fields: dict[str, Field], folder: Path, config_ends: Iterable[int]) -> list[str]:
    """Add the ids that end a reply; returns a note if there are more than a file can name."""
    stated: list[int] = []
    if (folder / GENERATION).exists():
        stated = end_ids(read_json(inside(folder, GENERATION)).get("eos_token_id"), GENERATION)
    ends = dict.fromkeys([*stated, *config_ends])
    if f"{_KEY}.eos_token_id" not in fields and ends:
        fields[f"{_KEY}.eos_token_id"] = next(iter(ends))
    rest = [number for number in ends if number != fields.get(f"{_KEY}.eos_token_id")]
    fields |= {f"{_KEY}.{name}": number for name, number in zip(_MORE_ENDS, rest, strict=False)}
    if len(rest) <= len(_MORE_ENDS):
        return []
    return [f"GGUF names three tokens that end a reply; not named: {rest[len(_MORE_ENDS) :]}"]


def _templates(tokenizer: Any) -> dict[str, Field]:
    template = tokenizer.chat_template
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    if not isinstance(template, dict):
        return {}
    named = {name: text for name, text in template.items() if name != "default"}
    fields: dict[str, Field] = {f"tokenizer.chat_template.{n}": t for n, t in named.items()}
    if named:
        fields["tokenizer.chat_templates"] = list(named)
    if "default" in template:
        fields["tokenizer.chat_template"] = template["default"]
    return fields
