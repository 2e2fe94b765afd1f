"""From a request's text to tokens, without work on texts that cannot fit the context."""

import json
import threading
from contextlib import nullcontext
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from outlier_mlx.serve.access import Refused
from outlier_mlx.upstream import TokenizerWrapper

# A longer text takes a noticeable share of a core, and about 150 bytes a token, while it is read.
LONG_TEXT = 100_000
LONG_TEXTS_AT_A_TIME = 2
# Characters that Unicode's composition joins to one, at most: the longest canonical decomposition
# (Unicode Standard Annex 15).
COMPOSED = 4
KEEPING_NORMALIZERS = {"NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel"}
KEEPING_SPLITS = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"}


def characters_per_token(tokenizer: TokenizerWrapper) -> int | None:
    """The largest number of a text's characters that one token can stand for.

    That is the length of the longest token, as long as no step of the tokenizer drops characters or
    joins unknown ones. A byte-level token has a character for each of its bytes, so its length
    is at least that of its text.

    Returns:
        The number; None if there may be no limit, or the kind of tokenizer is not known.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer) or not isinstance(backend.model, BPE):
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # such a token takes in all the blanks beside it
    vocab = backend.get_vocab()
    normalizers = _steps(backend.normalizer, "normalizers")
    splits = _steps(backend.pre_tokenizer, "pretokenizers")
    if not all(map(_keeps_characters, normalizers)) or not all(map(_keeps_all, splits)):
        return None
    if not _knows_everything(backend.model, vocab, normalizers + splits):
        return None
    compositions = sum(step["type"] in ("NFC", "NFKC") for step in normalizers)
    return max(map(len, vocab)) * COMPOSED**compositions


def _steps(component: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in the format of `tokenizer.json`."""
    if component is None:
        return []
    step = json.loads(component.__getstate__())
    steps = [step]
    while any(step["type"] == "Sequence" for step in steps):
        steps = [part for step in steps for part in step.get(name, [step])]
    return steps


def _keeps_characters(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String", "")
        return 0 < len(pattern) <= len(normalizer["content"])
    return normalizer["type"] in KEEPING_NORMALIZERS | {"NFC", "NFKC"}


def _keeps_all(split: dict[str, Any]) -> bool:
    if split["type"] in ("Split", "Punctuation"):
        return bool(split["behavior"] != "Removed")
    return split["type"] in KEEPING_SPLITS


def _knows_everything(model: BPE, vocab: dict[str, int], steps: list[dict[str, Any]]) -> bool:
    """Whether each character of any text becomes at least a part of a token."""
    if any(step["type"] == "ByteLevel" for step in steps):
        return all(letter in vocab for letter in ByteLevel.alphabet())
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        return True
    return model.unk_token is not None and not model.fuse_unk


class BoundedTokenizer:
    """A tokenizer that refuses texts too long for the context before it reads them.

    It is used by many threads; long texts wait for one another, short ones for nobody.

    Args:
        tokenizer: the model's; everything that is not here is looked up there.
        context: largest number of tokens in a prompt; None: no limit.
    """

    def __init__(self, tokenizer: TokenizerWrapper, context: int | None) -> None:
        self._tokenizer = tokenizer
        self._context = context
        characters = characters_per_token(tokenizer)
        self._limit = context * characters if context and characters else None
        self._turns = threading.BoundedSemaphore(LONG_TEXTS_AT_A_TIME)
        # The first call may change settings of the tokenizer, which no other thread may use then.
        tokenizer.encode("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text.

        Raises:
            Refused: 400, because its tokens cannot fit the context.
        """
        if self._limit is not None and len(text) > self._limit:
            raise Refused(
                400,
                f"the prompt has {len(text)} characters, which cannot be {self._context} tokens"
                " or fewer (the context length)",
                "context_length_exceeded",
            )
        with self._turns if len(text) > LONG_TEXT else nullcontext():
            # Without the masks, which would be made while other threads wait.
            plain = {"return_attention_mask": False, "return_token_type_ids": False}
            tokens: list[int] = self._tokenizer.encode(text, **plain, **options)
            return tokens

    def apply_chat_template(self, *args: Any, tokenize: bool = True, **options: Any) -> Any:
        """The text, or its token ids, as the chat template writes messages."""
        text = self._tokenizer.apply_chat_template(*args, tokenize=False, **options)
        return self.encode(text, add_special_tokens=False) if tokenize else text
