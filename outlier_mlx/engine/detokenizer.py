"""Text of tokens, piece by piece: all pieces together are what `tokenizer.decode` gives.

mlx-lm's own detokenizers lose blanks at the beginning, print a NUL as a letter, and fail on some
added tokens. Here the text of a byte-level tokenizer comes from the bytes of its tokens. Any other
tokenizer decodes the latest tokens together with some before them, since the text of a token can
depend on its neighbours: a sequence that begins with it may lose a blank, and the bytes <0xE2>,
<0x82> and <0xAC> in a row are one character.
"""

import re
from codecs import getincrementaldecoder
from collections.abc import Callable
from copy import copy
from functools import cache, partial
from typing import Any, Protocol

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from outlier_mlx.upstream import StreamingDetokenizer, decodes_plainly

# A character has up to four bytes. So if text still ends with U+FFFD after more tokens than this,
# that is usually the text: then it is decoded less and less often, to need linear time.
_PATIENCE = 8
# So many tokens of a prompt are enough to know how the text after them begins.
_CONTEXT = 8
# What tokenizers' ByteFallback takes as a byte.
_BYTE = re.compile("<0x[+0-9A-Fa-f][0-9A-Fa-f]>")
# The characters of all patterns in `PreTrainedTokenizerBase.clean_up_tokenization`.
_CLEANED = " .?!,'ntmsvre"


class _Pieces(Protocol):
    """Turns the tokens of one text into pieces of it."""

    def follow(self, tokens: list[int]) -> None:
        """Continue a text that ends with these tokens, and that is not given out again."""

    def add(self, token: int) -> str:
        """The text that is certain now, whatever comes next."""

    def finish(self) -> str:
        """The rest of the text, when no token follows."""


class Detokenizer(StreamingDetokenizer):
    """A detokenizer as mlx-lm uses it; see there for its methods.

    Args:
        tokenizer: a tokenizer of transformers, fast or not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._new_pieces = _chosen(tokenizer)
        self._special = special_ids(tokenizer)
        self._before: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Begin a new text."""
        self.tokens: list[int] = []
        self.offset = 0
        self._pieces = self._new_pieces()
        if self._before:
            self._pieces.follow(self._before)
        self._written: list[str] = []

    def after(self, tokens: list[int]) -> "Detokenizer":
        """A detokenizer for texts that continue a prompt: a blank before their first word stays.

        Args:
            tokens: the prompt's tokens; their text is not given out again.
        """
        other = copy(self)
        other._before = [token for token in tokens[-_CONTEXT:] if token not in self._special]
        other.reset()
        return other

    def piece(self, token: int, finish_reason: str | None) -> str:
        """The text that a token of mlx-lm's responses adds.

        Args:
            token: the next token.
            finish_reason: None if further tokens follow. "stop": the token ends the text, and is
                not a part of it.
        """
        if finish_reason != "stop":
            self.add_token(token)
        if finish_reason is not None:
            self.finalize()
        return self.last_segment

    def add_token(self, token: int) -> None:
        """Add a token; `last_segment` is then what it makes certain of the text."""
        self.tokens.append(token)
        self._written.append(self._pieces.add(token))

    def finalize(self) -> None:
        """Add what was held back for further tokens."""
        self._written.append(self._pieces.finish())

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._written)

    @property
    def last_segment(self) -> str:
        """The text since this was last asked for."""
        new = self._written[self.offset :]
        self.offset = len(self._written)
        return "".join(new)


class _ByteLevel:
    """Pieces of a byte-level tokenizer's text; bytes that are not UTF-8 become U+FFFD."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def follow(self, tokens: list[int]) -> None:
        # Tokens that a client sends can end within a character.
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> str:
        return self._decoder.decode(self._bytes_of(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Windows:
    """Pieces of any tokenizer's text.

    A window is some tokens whose text was given out, and those since then. What the latter add to
    the text of the former is given out unless the next token may change it: after a byte, and
    where the text ends with U+FFFD, which may be a part of a character.
    """

    def __init__(self, decode: Callable[[list[int]], str], name: Callable[[int], Any]) -> None:
        self._decode, self._name = decode, name
        self._known: list[int] = []
        self._text = ""  # of the known tokens
        self._last: list[int] = []  # those that became known last
        self._new: list[int] = []
        self._least = 0  # number of new tokens from which on decoding is worth it

    def follow(self, tokens: list[int]) -> None:
        self._known = self._last = tokens
        self._text = self._decode(tokens)

    def add(self, token: int) -> str:
        name = self._name(token)
        if name is None:  # there is no such token
            return ""
        self._new.append(token)
        # One invalid byte makes all bytes in the same row invalid.
        if _BYTE.fullmatch(name) or len(self._new) < self._least:
            return ""
        text = self._decode(self._known + self._new)
        if text != self._text and text.startswith(self._text) and not text.endswith("\ufffd"):
            return self._give(text)
        if len(self._new) >= _PATIENCE:
            self._least = 2 * len(self._new)
        return ""

    def finish(self) -> str:
        return self._give(self._decode(self._known + self._new)) if self._new else ""

    def _give(self, text: str) -> str:
        """What the new tokens add; then they are known."""
        added = text[len(self._text) :]
        # The first character of a window may be lost, so known tokens need some text.
        for known in (self._new, self._last + self._new, self._known + self._new):
            self._known, self._text = known, self._decode(known)
            if self._text:
                break
        self._last, self._new, self._least = self._new, [], 0
        return added


class _CleanedUp:
    """Pieces of text with blanks before punctuation removed, as old tokenizers ask for it."""

    def __init__(self, pieces: _Pieces, clean: Callable[[str], str]) -> None:
        self._pieces, self._clean = pieces, clean
        self._held = ""

    def follow(self, tokens: list[int]) -> None:
        self._pieces.follow(tokens)

    def add(self, token: int) -> str:
        self._held += self._pieces.add(token)
        # No pattern reaches over a character that is in none.
        certain = len(self._held.rstrip(_CLEANED))
        text, self._held = self._held[:certain], self._held[certain:]
        return self._clean(text)

    def finish(self) -> str:
        text, self._held = self._held + self._pieces.finish(), ""
        return self._clean(text)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that `decode` leaves out with `skip_special_tokens`."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids).union(id for id, token in added if token.special)


def _chosen(tokenizer: PreTrainedTokenizerBase) -> Callable[[], _Pieces]:
    """What makes the pieces of a new text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cleans = _cleans_up(tokenizer, backend)
    kind = type(tokenizer)
    plain = decodes_plainly(kind)  # subclasses may change the text
    if plain and not cleans and isinstance(getattr(backend, "decoder", None), decoders.ByteLevel):
        return partial(_ByteLevel, byte_level_bytes(backend))

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    windows = partial(_Windows, decode, tokenizer.convert_ids_to_tokens)
    if not cleans:
        return windows
    return lambda: _CleanedUp(windows(), tokenizer.clean_up_tokenization)


def _cleans_up(tokenizer: PreTrainedTokenizerBase, backend: Any) -> bool:
    """Whether `decode` removes blanks before punctuation; with byte-pair encoding it does not."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    anyway = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return anyway or backend is None or type(backend.model).__name__ != "BPE"


def byte_level_bytes(backend: Any) -> Callable[[int], bytes]:
    """The bytes of a token of a byte-level tokenizer; none if there is no such token."""
    # GPT-2's alphabet (tokenizers' ByteLevel): printable characters are themselves, and the other
    # bytes, in order, the characters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    values = {chr(byte): byte for byte in printable}
    values |= {chr(0x100 + number): byte for number, byte in enumerate(others)}

    @cache
    def bytes_of(token: int) -> bytes:
        name = backend.id_to_token(token) or ""
        if all(character in values for character in name):
            return bytes(values[character] for character in name)
        return name.encode()  # an added token with other characters stands for itself

    return bytes_of
