"""What tokenizers in GGUF files are made of: types of tokens, and rules that split text into words.

Byte-level BPE splits a text before it merges; the rules have llama.cpp's names.
"""

from dataclasses import dataclass

UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rule:
    """How text is split into words before merging.

    Attributes:
        splits: patterns; each one splits the pieces that the one before produced.
        whole: whether a word that is a token becomes that token without merging.
        bos: whether texts begin with BOS if the file does not say.
        nfc: whether text is normalised to Unicode NFC first.
    """

    splits: tuple[str, ...]
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_LLAMA3 = Rule((_WORDS % "{1,3}",), whole=True, bos=True)
QWEN2 = Rule((_WORDS % "",), nfc=True)
_MARKED = _WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"^\s\p{L}\p{N}", r"^\s\p{L}\p{M}\p{N}"
)
QWEN35 = Rule((_MARKED % "",), nfc=True)
#: By the name that `tokenizer.ggml.pre` has for it.
RULES = {
    "default": Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Rule((GPT2,)),
    "smollm": Rule((r"\p{N}", GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": Rule(_LLAMA3.splits),
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "qwen35": QWEN35,
    "tekken": Rule((_TEKKEN,), whole=True, bos=True),
}
