"""Constrained decoding: only tokens that a grammar allows are chosen, by llguidance.

A constraint concerns the generated tokens alone, never those of a prompt, so it has nothing to do
with KV caches. llguidance is imported when the vocabulary is read: with the first constraint, or
before.
"""

import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np

from outlier_mlx.engine.detokenizer import byte_level_bytes, special_ids
from outlier_mlx.engine.schemas import SchemaError, checked_schema
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutlierError
from outlier_mlx.upstream import inner_tokenizer, thinking_tokens

# Between the parts of a JSON value, once: a model cannot write blanks for ever.
_BLANK = r"\x20|\n(\x20{0,20}|\t{0,10})"
# Work for one token, about 5 ms at most, and for compiling a grammar, about 50 ms (llguidance's
# own figures); a lexer's state has about 2 KB.
_LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "initial_lexer_fuel": 1_000_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Tokens that are tried of each grammar.
_TRIED = 12
# What the steps of a tokenizer's decoder may be, if its text is that of its tokens in a row.
_JOINING = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class ConstraintError(OutlierError):
    """Nothing can be generated under a constraint, or it needs too much work."""


class Grammars:
    """Makes the constraints of one model; one is enough for all threads.

    Args:
        tokenizer: the model's.
        width: width of the logits; the tokenizer may have fewer tokens.
    """

    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        self.tokenizer = tokenizer
        self.width = width
        self._lock = threading.Lock()
        self._made: Any = None

    def prepare(self) -> None:
        """Read the vocabulary now, not with the first constraint.

        llguidance reads one of 150,000 tokens in about 0.7 s, in which no other thread of Python
        runs. What is wrong with it is told to those who ask for constraints.
        """
        with suppress(Exception):
            self._vocabulary()

    def schema(self, schema: Any) -> "Constraint":
        """Answers that are JSON values of a schema.

        Raises:
            SchemaError: the schema is wrong, or its constraint cannot be had.
            ConstraintError: there are no constraints for this model's tokenizer.
        """
        return self.grammar(f"start: {json_rule(schema)}")

    def grammar(self, lark: str) -> "Constraint":
        """Answers in a grammar, in llguidance's variant of Lark.

        Raises:
            SchemaError: the grammar is wrong, too large, or allows nothing.
            ConstraintError: there are no constraints for this model's tokenizer.
        """
        import llguidance

        vocabulary = self._vocabulary()
        limits = llguidance.LLParserLimits(**_LIMITS)
        # Forced text may be written with any tokens, as the model prefers; so tokens need not be
        # those of the tokenizer, which would be called for each.
        text = '%llguidance {"no_forcing": true}\n' + lark
        matcher = llguidance.LLMatcher(vocabulary, text, log_level=0, limits=limits)
        if reason := matcher.get_error() or self._try(matcher.deep_copy()):
            raise SchemaError(_short(reason))
        return Constraint(self, matcher)

    def _try(self, matcher: Any) -> str:
        """Write a few tokens, and tell what fails: what is too hard is known before an answer."""
        random = np.random.default_rng(0)
        for _ in range(_TRIED):
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            if matcher.is_error() or matcher.is_stopped() or not len(allowed):
                break
            matcher.consume_token(int(random.choice(allowed)))
        if matcher.is_error():
            return str(matcher.get_error())
        return "" if matcher.is_accepting() or len(allowed) else "it allows nothing"

    def mark(self, text: str) -> str:
        """A mark, such as that before a call, as a symbol of a grammar."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        special = len(ids) == 1 and ids[0] in self._special()
        return f"<[{ids[0]}]>" if special else json.dumps(text)

    def _vocabulary(self) -> Any:
        """llguidance's tokenizer, made once."""
        with self._lock:
            if self._made is None:
                import llguidance

                ends = [end for end in self.tokenizer.eos_token_ids if 0 <= end < self.width]
                if not ends:
                    raise ConstraintError("constrained answers need a token that ends a text")
                words: Any = _Words(self._bytes(), sorted(self._special()), ends[0])
                slices = llguidance.LLTokenizer.json_slices()
                self._made = llguidance.LLTokenizer(words, eos_token=ends, slices=slices)
            return self._made

    def _special(self) -> frozenset[int]:
        """Tokens that are no text: special ones, and added ones such as <tool_call>."""
        own = inner_tokenizer(self.tokenizer)
        added = own.added_tokens_decoder.items()
        marks = [id for id, token in added if token.content[:1] + token.content[-1:] == "<>"]
        return special_ids(own) | frozenset(marks) | frozenset(self.tokenizer.eos_token_ids)

    def _bytes(self) -> list[bytes]:
        """The bytes of each token; none if there is no such token.

        Raises:
            ConstraintError: the text of tokens is not that of each, in a row.
        """
        bytes_of = _bytes_of_tokens(inner_tokenizer(self.tokenizer))
        special = self._special()
        return [
            b"\xff<%d>" % token if token in special else bytes_of(token)
            for token in range(self.width)
        ]


class _Words:
    """A tokenizer as llguidance takes it; see `llguidance.TokenizerWrapper`."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("grammars force no text")


class Constraint:
    """A checked grammar; `start` gives what holds one answer to it."""

    def __init__(self, grammars: Grammars, matcher: Any) -> None:
        self._grammars = grammars
        self._matcher = matcher

    def start(self, prompt: Sequence[int] | None = None) -> "ConstraintProcessor":
        """A logits processor for one answer.

        If the prompt ends within the marks of thinking, as some chat templates open them, the
        constraint begins after the thinking. Otherwise the model may open them with its first
        token, or answer at once.

        Args:
            prompt: tokens of the whole prompt; None: those of the processor's first call.
        """
        return ConstraintProcessor(self._grammars, self._matcher.deep_copy(), prompt)


class ConstraintProcessor:
    """Masks the logits of one answer; a logits processor as mlx-lm calls it.

    Each call is for the next token. The tokens after those of the first call are generated ones.

    Args:
        grammars: of the model.
        matcher: llguidance's, of this answer alone.
        prompt: see `Constraint.start`.
    """

    def __init__(self, grammars: Grammars, matcher: Any, prompt: Sequence[int] | None) -> None:
        self._matcher = matcher
        self._width = grammars.width
        self._tokenizer = grammars.tokenizer
        self._ends = frozenset(grammars.tokenizer.eos_token_ids)
        # The token that begins thinking, while it may be next, and those that end thinking.
        self._opens: int | None = None
        self._closes: tuple[int, ...] = ()
        self._thinking = False
        self._thought: list[int] = []
        self._ended = False
        self._seen: int | None = None
        self._prompt = prompt
        self._words = np.zeros(-(-self._width // 32), np.uint32)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """The logits (1, width), with those of tokens that are not allowed at minus infinity.

        Raises:
            ConstraintError: no token is allowed, or the grammar needs too much work.
        """
        if self._seen is None:
            self._seen = len(tokens)
            prompt = np.array(tokens) if self._prompt is None else self._prompt
            self._begin([int(token) for token in prompt])
        if len(tokens) > self._seen:
            for token in np.array(tokens[self._seen :]):
                self._accept(int(token))
            self._seen = len(tokens)
        if self._ended:
            return logits
        if logits.shape[-1] != self._width:
            raise ConstraintError(f"there are {logits.shape[-1]} logits, expected {self._width}")
        # The model computes while the mask is made.
        mx.async_eval(logits)
        return mx.where(self._allowed(), logits, -mx.inf)

    def _begin(self, prompt: list[int]) -> None:
        tokenizer = self._tokenizer
        if not tokenizer.has_thinking:
            return
        begins, self._closes = thinking_tokens(tokenizer)
        self._thinking = tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
        if not self._thinking and len(begins) == 1 and begins[0] < self._width:
            self._opens = begins[0]

    def _accept(self, token: int) -> None:
        if self._thinking:
            self._thought = [*self._thought, token][-len(self._closes) :]
            self._thinking = tuple(self._thought) != self._closes
        elif token == self._opens:
            self._thinking = True
        elif token in self._ends:
            self._ended = True
        elif not self._matcher.consume_token(token):
            self._fail(f"the token {token} is not allowed")
        self._opens = None

    def _allowed(self) -> mx.array:
        """Which tokens may be next: (width,), bool."""
        if self._thinking:
            self._words.fill(0xFFFFFFFF)
            for end in self._ends:
                if end < self._width:
                    self._words[end // 32] &= ~np.uint32(1 << end % 32)
        else:
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            if self._opens is not None:
                self._words[self._opens // 32] |= np.uint32(1 << self._opens % 32)
            if self._matcher.is_error() or not self._words.any():
                self._fail("no token is allowed")
        bits = np.unpackbits(self._words.view(np.uint8), count=self._width, bitorder="little")
        return mx.array(bits.view(np.bool_))

    def _fail(self, what: str) -> None:
        reason = _short(self._matcher.get_error()) or what
        raise ConstraintError(f"the answer cannot be continued under its constraint: {reason}")


def json_rule(schema: Any) -> str:
    """The JSON values of a schema, as a symbol of a grammar.

    Raises:
        SchemaError: the schema is wrong or not supported.
    """
    clean = checked_schema(schema)
    rule = {} if isinstance(clean, bool) else clean
    return "%json " + json.dumps({"x-guidance": {"whitespace_pattern": _BLANK}} | rule)


def _short(reason: str) -> str:
    """What llguidance says, without the place in a grammar that nobody wrote."""
    lines = reason.strip().split("\n")
    # Of a wrong pattern, the reason stands last.
    errors = [line for line in lines if line.startswith("error: ")]
    return (
        (errors or lines)[0]
        .removeprefix("error: ")
        .rpartition("failed to compile JSON schema: ")[2][:300]
    )


def _bytes_of_tokens(own: Any) -> Any:
    """A function that gives the bytes of a token within a text.

    Raises:
        ConstraintError: the text of tokens is not that of each, in a row.
    """
    backend = getattr(own, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    steps = [] if decoder is None else [json.loads(decoder.__getstate__())]
    while any(step["type"] == "Sequence" for step in steps):
        steps = [part for step in steps for part in step.get("decoders", [step])]
    kinds = {step["type"] for step in steps}
    if backend is not None and "ByteLevel" in kinds:
        return byte_level_bytes(backend)
    if backend is None or not kinds or not kinds <= _JOINING:
        raise ConstraintError(
            "answers of this model cannot be constrained: the text of its tokens depends on their"
            " neighbours"
        )
    falls_back = "ByteFallback" in kinds
    replaced = [
        (step["pattern"].get("String", ""), step["content"])
        for step in steps
        if step["type"] == "Replace"
    ]
    replaced += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]

    def bytes_of(token: int) -> bytes:
        name = backend.id_to_token(token)
        if name is None:
            return b""
        if falls_back and len(name) == 6 and name.startswith("<0x"):
            return bytes([int(name[3:5], 16)])
        for old, new in replaced:
            name = name.replace(old, new) if old else name
        return name.encode()

    return bytes_of
