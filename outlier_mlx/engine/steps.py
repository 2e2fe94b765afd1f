"""Generation of one sequence, step by step: a step gives one token, or several after a draft.

A draft is a guess at the next tokens. One pass of the model over a chosen token and its draft gives
the model's own choice after each of them. As long as the draft equals these choices, its tokens are
what the model would have chosen anyway; what comes after the first other choice is dropped again.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.distributed.ranks import agreed
from outlier_mlx.engine.sampling import GlobalSampler, Sampler
from outlier_mlx.upstream import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    TokenBuffer,
    generation_stream,
    make_prompt_cache,
    maybe_quantize_kv_cache,
)

#: From all tokens so far (n,) and logits (1, vocab): logits.
Processor = Callable[[mx.array, mx.array], mx.array]
# Number of tokens between two releases of memory that MLX keeps for reuse; as in mlx-lm.
_CLEAR_EVERY = 256
# A draft is never longer; more than any drafter asks for.
_LONGEST = 1 << 10


@dataclass(frozen=True)
class Chosen:
    """A token that the model chose.

    Attributes:
        token: its id.
        logprobs: (vocab,), log probabilities of all tokens at its place.
        drafted: it was in a draft.
    """

    token: int
    logprobs: mx.array
    drafted: bool = False


@dataclass(frozen=True)
class Quantized:
    """How KV caches are quantized.

    Attributes:
        bits: of a value.
        group_size: values that share a scale.
        start: tokens that a cache has when it is quantized.
    """

    bits: int
    group_size: int = 64
    start: int = 5000

    def apply(self, cache: list[Any]) -> None:
        """Quantize a cache, in place, if it is long enough and was not quantized before."""
        maybe_quantize_kv_cache(cache, self.start, self.group_size, self.bits)


class Drafts(Protocol):
    """Guesses at the next tokens of one sequence."""

    def begin(self, tokens: Sequence[int]) -> None:
        """Begin with a prompt, or go on with a text that got more tokens without drafts."""

    def ready(self) -> bool:
        """Whether the next token is worth waiting for, since a draft after it may pay."""

    def draft(self, token: int, most: int) -> list[int]:
        """Tokens that may follow `token`, which follows all that were noted; at most `most`."""

    def note(self, tokens: Sequence[int], drafted: int) -> None:
        """Note the tokens of a step whose draft had so many tokens."""


@dataclass
class Counts:
    """What a generation took.

    Attributes:
        steps: passes of the model, each of which gave at least one token.
        drafted: tokens of drafts that the model read.
        accepted: those of them that it had chosen, too.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """What both took."""
        return Counts(
            self.steps + other.steps, self.drafted + other.drafted, self.accepted + other.accepted
        )

    def __sub__(self, earlier: "Counts") -> "Counts":
        """What it took since an earlier time."""
        return self + Counts(-earlier.steps, -earlier.drafted, -earlier.accepted)

    def __str__(self) -> str:
        """For people, if there were drafts."""
        return f"{self.steps} steps, {self.accepted} of {self.drafted} drafted tokens accepted"


class Steps:
    """One sequence that is being generated.

    First `read` takes the prompt, as many tokens at a time as wanted, all but the last; `step`
    reads what is left of it. Each `step` then gives at least one token, and the KV cache holds
    exactly the tokens read and given out. The pass for the next token is begun before a token is
    read by the host, unless there is a draft.

    Args:
        model: called as `model(tokens, cache=cache)`.
        prompt: tokens that are not in the cache; at least one, unless there is a `pending` one.
        cache: mlx-lm's cache of each layer, extended in place; None: a new one.
        before: the tokens in the cache.
        sampler: chooses tokens.
        processors: change logits, in order, for one token after another.
        ends: tokens that end the text.
        max_tokens: tokens to give out, at most.
        quantized: how the cache is quantized; None: not at all.
        drafts: guesses at next tokens; None: each step gives one token.
        pending: what another loop chose next, as `Steps.pending` returns it.
        stream: where MLX computes.

    Attributes:
        cache: the KV cache; whoever ends the sequence may keep it.
        tokens: the tokens in the cache.
        counts: what it took so far.
        finish_reason: "stop" after a token of `ends`, "length" after `max_tokens`, else None.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: Sequence[int],
        *,
        cache: list[Any] | None = None,
        before: Sequence[int] = (),
        sampler: Sampler | None = None,
        processors: Sequence[Processor] = (),
        ends: Collection[int] = (),
        max_tokens: int = 256,
        quantized: Quantized | None = None,
        drafts: Drafts | None = None,
        pending: tuple[mx.array, mx.array] | None = None,
        stream: Any = generation_stream,
    ) -> None:
        self.model = model
        self.cache = make_prompt_cache(model) if cache is None else cache
        self.tokens = list(before)
        self.counts = Counts()
        self.finish_reason: str | None = None
        self._rest = list(prompt)
        self._sampler = sampler or GlobalSampler()
        self._processors = list(processors)
        self._ends = ends
        self._room = max_tokens
        self._quantized = quantized
        self._drafts = drafts
        self._stream = stream
        # The token after those in the cache, (1,), and its log probabilities, (1, vocab).
        self._next = pending and (pending[0], pending[1][None])
        self._begun = False
        self._context: TokenBuffer | None = None
        self._last = 0

    @property
    def unread(self) -> int:
        """Number of prompt tokens that are not in the cache."""
        return len(self._rest)

    def read(self, most: int) -> int:
        """Read at most so many tokens of the prompt, but not the last.

        Returns:
            The number of tokens read; 0 if only the last is left.
        """
        count = min(most, len(self._rest) - 1)
        if count < 1:
            return 0
        with mx.stream(self._stream):
            self.model(mx.array(self._rest[:count])[None], cache=self.cache)
            self._quantize()
            mx.eval([entry.state for entry in self.cache])
            mx.clear_cache()
        self.tokens += self._rest[:count]
        del self._rest[:count]
        return count

    def step(self) -> list[Chosen]:
        """The next token, or several.

        Only the last can be one that ends the text. After that token, or after `max_tokens`, no
        further step is possible.
        """
        with mx.stream(self._stream):
            self._begin()
            found = self._drafted() or [self._plain()]
        self._last = len(found)
        self._room -= len(found)
        if found[-1].token in self._ends:
            self.finish_reason = "stop"
        elif self._room < 1:
            self.finish_reason = "length"
        before, self.counts.steps = self.counts.steps, self.counts.steps + 1
        if before % _CLEAR_EVERY == 0:
            mx.clear_cache()
        return found

    def take_back(self, count: int) -> None:
        """Take back the last tokens of a step, but not all of it; the sequence has ended then.

        Raises:
            ValueError: the latest step did not give more tokens.
        """
        if not 0 <= count < self._last:
            raise ValueError(f"{count} tokens cannot be taken back of {self._last}")
        self._trim(count)
        del self.tokens[len(self.tokens) - count :]
        self._last -= count

    def pending(self) -> tuple[mx.array, mx.array]:
        """The next token (1,), which is not in the cache, and its log probabilities (vocab,).

        With them another loop can go on from `cache` and `tokens`.
        """
        with mx.stream(self._stream):
            self._begin()
        assert self._next is not None
        token, logprobs = self._next
        return token, logprobs.squeeze(0)

    def _begin(self) -> None:
        """Read the rest of the prompt, and choose the first token, if that was not done yet."""
        if self._begun:
            return
        self._begun = True
        while self.read(_LONGEST):
            pass
        if self._processors:
            self._context = TokenBuffer(self.tokens)
        if self._drafts is not None:
            self._drafts.begin(self.tokens + self._rest)
        if self._rest:
            self._advance(mx.array(self._rest))
            self.tokens += self._rest
            self._rest = []

    def _advance(self, token: mx.array) -> None:
        """Read one token (1,), and begin to choose the next."""
        logits = self.model(token[None], cache=self.cache)[:, -1, :]
        self._next = self._choose(logits, token)
        self._quantize()
        mx.async_eval(*self._next)

    def _plain(self) -> Chosen:
        assert self._next is not None
        token, logprobs = self._next
        self._advance(token)
        chosen = Chosen(_id(token), logprobs.squeeze(0))
        self.tokens.append(chosen.token)
        if self._drafts is not None:
            self._drafts.note([chosen.token], 0)
        return chosen

    def _drafted(self) -> list[Chosen]:
        """The next token and what the model accepts of a draft; nothing if there is no draft."""
        most = min(self._room - 1, draft_room(self.cache, self._quantized))
        if self._drafts is None or most < 1 or not self._drafts.ready():
            return []
        assert self._next is not None
        token = _id(self._next[0])
        if token in self._ends:
            return []
        draft = self._drafts.draft(token, most)
        end = next((i for i, drafted in enumerate(draft) if drafted in self._ends), len(draft))
        draft = draft[: end + 1]
        return self._verify(token, draft) if draft else []

    def _verify(self, token: int, draft: list[int]) -> list[Chosen]:
        assert self._next is not None
        given = [token, *draft]
        logits = self.model(mx.array(given)[None], cache=self.cache)[0]
        choices, states = [], []
        for place, read in enumerate(given):
            choices.append(self._choose(logits[place : place + 1], mx.array([read])))
            states.append(self._sampler.state)
            # A processor may only see tokens that are kept.
            waits = self._processors and place < len(draft)
            if waits and _id(choices[place][0]) != draft[place]:
                break
        mx.eval(choices)
        picked = [_id(choice[0]) for choice in choices]
        accepted = next((i for i, t in enumerate(draft) if t != picked[i]), len(draft))
        logprobs = [self._next[1], *(choice[1] for choice in choices)]
        self._trim(len(draft) - accepted)
        self._quantize()
        # The random numbers that plain generation would have used next.
        self._sampler.state = states[accepted]
        self._next = choices[accepted]
        found = [
            Chosen(given[i], logprobs[i].squeeze(0), drafted=i > 0) for i in range(accepted + 1)
        ]
        self.tokens += given[: accepted + 1]
        self.counts.drafted += len(draft)
        self.counts.accepted += accepted
        if self._drafts is not None:
            self._drafts.note(given[: accepted + 1], len(draft))
        return found

    def _choose(self, logits: mx.array, token: mx.array) -> tuple[mx.array, mx.array]:
        """The token (1,) after `token` (1,), and log probabilities, from logits (1, vocab)."""
        if self._context is not None:
            context = self._context.update_and_fetch(token)
            for processor in self._processors:
                logits = processor(context, logits)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return agreed(self._sampler(logprobs)), logprobs

    def _quantize(self) -> None:
        if self._quantized is not None:
            self._quantized.apply(self.cache)

    def _trim(self, count: int) -> None:
        if count:  # states of linear attention have nothing to trim with
            for entry in self.cache:
                entry.trim(count)


def _id(token: mx.array) -> int:
    """The id in an array (1,), as soon as it is computed."""
    ids: Any = token.tolist()
    return int(ids[0])


def draft_room(cache: Sequence[Any], quantized: Quantized | None = None) -> int:
    """Tokens that a draft may have, so that all that is not accepted can be taken back exactly.

    A cache that is to be quantized at a token is not quantized in the middle of a draft. A window
    that is full has overwritten what would have to come back, and states of linear attention have
    no way back: there, no draft is possible.
    """
    room = _LONGEST
    for entry in cache:
        if type(entry) is KVCache:
            if quantized is not None:
                room = min(room, quantized.start - entry.offset - 1)
        elif type(entry) is RotatingKVCache:
            room = min(room, entry.max_size - entry.offset - 2)
        elif type(entry) is not QuantizedKVCache:
            return 0
    return max(room, 0)
