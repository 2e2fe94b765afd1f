"""Which tokens of a GGUF file end a reply, and which are special whatever their type says.

A file names up to three tokens that end a reply, often not the one that the model was taught to end
turns with, and files of some converters give special tokens the type of ordinary text.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from outlier_mlx.engine.bounded import text_after_reply
from outlier_mlx.models.token_rules import CONTROL, NORMAL, UNDEFINED, UNUSED, USER_DEFINED

# Tokens that end a reply wherever they are in a vocabulary: llama.cpp's list of "tokens that cause
# end-of-generation" (`src/llama-vocab.cpp`, 2026).
_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)
# From there, too: with all of the first in a vocabulary, the second is an ordinary special token.
_NO_END_BESIDE = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|calls|>", "<|flush|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)
# What llama.cpp's converter takes for a special token (`does_token_look_special`).
_SPECIAL = re.compile(r"<\|.+\|>|<｜.+｜>", re.DOTALL)
# What may be a token in what a template writes, and in its text (where `[0]` is an index).
_MARKER = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_IN_TEMPLATE = re.compile(r"<[^<>\s]{1,100}>|\[/?[A-Z_]{2,100}\]")
_LONGEST_MARKER = 100


@dataclass(frozen=True)
class Ends:
    """The tokens that end a reply, and the types of all tokens.

    Attributes:
        stops: ids, in rising order, without those that were given.
        types: type of each token, by id; see `Vocabulary`.
        changed: texts of the tokens whose type was changed.
    """

    stops: list[int]
    types: np.ndarray
    changed: list[str]


def find_ends(
    tokens: list[str],
    types: np.ndarray,
    merges: Collection[tuple[str, str]],
    named: Mapping[str, int],
    stops: Iterable[int],
    templates: Mapping[str, str],
) -> Ends:
    """Find the tokens that end a reply: by their text, and by what the chat template writes.

    A token that merges make is ordinary text, whatever it looks like.

    Args:
        tokens: text of each token, by id.
        types: type of each token, by id.
        merges: pairs of pieces that make tokens.
        named: ids of "bos", "eos", "unk" and "pad", as far as there are any.
        stops: ids that the file names, besides that of "eos".
        templates: chat templates by name; "" is the default.
    """
    merged = {a + b for a, b in merges}
    ids = {text: n for n, text in enumerate(tokens) if text not in merged}
    known = {text for text in _ENDS if text in ids}
    for beside, text in _NO_END_BESIDE:
        if beside <= known:
            known.discard(text)
    given = {*stops} | ({named["eos"]} if "eos" in named else set())
    found = {ids[text] for text in known} | given
    last = _end_of_turn(templates.get(""), tokens, types, named, ids)
    ends = found if last is None else found | {last}
    special = ends | {n for name, n in named.items() if name != "unk"}
    written = {text for template in templates.values() for text in _IN_TEMPLATE.findall(template)}
    types, changed = types.copy(), []
    for text, number in ids.items():
        doubtful = (UNDEFINED, NORMAL, *((USER_DEFINED, UNUSED) if number in ends else ()))
        kind = _kind(text, number in special, text in written)
        if kind is not None and types[number] in doubtful:
            types[number] = kind
            changed.append(text)
    return Ends(sorted(ends - given), types, changed)


def _kind(text: str, special: bool, written: bool) -> int | None:
    """The type of a token that the file may call ordinary text; None if it is that.

    Args:
        text: the token's text.
        special: whether it ends a reply, or the file names its use.
        written: whether a template has it in its text.
    """
    if text in _ENDS or _SPECIAL.fullmatch(text):
        return CONTROL
    if special and _MARKER.fullmatch(text):
        return CONTROL
    return USER_DEFINED if written else None


def _end_of_turn(
    template: str | None,
    tokens: list[str],
    types: np.ndarray,
    named: Mapping[str, int],
    ids: Mapping[str, int],
) -> int | None:
    """The token with which a chat template ends a reply, if it is one token."""
    if template is None:
        return None
    rest = text_after_reply(template, {f"{name}_token": tokens[n] for name, n in named.items()})
    for length in range(min(len(rest), _LONGEST_MARKER), 0, -1):
        number = ids.get(rest[:length])
        if number is not None and (
            types[number] in (CONTROL, USER_DEFINED) or _MARKER.fullmatch(rest[:length])
        ):
            return number
    return None
