"""Sequences that are generated together, each one token a step."""

from collections.abc import Collection, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.distributed.ranks import agreed
from outlier_mlx.engine.steps import Quantized
from outlier_mlx.serve.jobs import Token
from outlier_mlx.serve.sequences import Cache, Sequence, extracted, merged
from outlier_mlx.serve.single import Pending
from outlier_mlx.upstream import greedy_sampler


class Batch:
    """Sequences whose prompts are read, and which get one token each with every step.

    A step is prepared while the one before is computed, so a token is in the cache before it is
    known. One sequence alone keeps its own cache; only several are merged.

    Args:
        model: any model of mlx-lm.
        ends: tokens that end a text.
        quantized: how a cache is quantized, which then cannot be merged; None: not at all.

    Attributes:
        sequences: one for each row.
        begins: whether the next step gives some sequences their first token.
    """

    def __init__(
        self,
        model: nn.Module,
        ends: Collection[int],
        quantized: Quantized | None = None,
    ) -> None:
        self.sequences: list[Sequence] = []
        self.begins = False
        self._model = model
        self._ends = ends
        self._quantized = quantized
        self._cache: Cache = []
        self._merged = False
        # What the model gets next, and its log probability; all of them, of the latest step. For
        # rows that are new, that is the end of the prompt.
        self._tokens = mx.array([], mx.uint32)
        self._logprobs = mx.array([])
        self._latest: mx.array | None = None
        self._tops: dict[Sequence, tuple[mx.array, mx.array]] = {}
        self._new: set[Sequence] = set()
        self._failed: dict[Sequence, Exception] = {}

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def nbytes(self) -> int:
        """Size of its KV caches, in bytes."""
        return sum(layer.nbytes for layer in self._cache)

    def add(self, sequences: list[Sequence]) -> None:
        """Add sequences of whose prompts only the last token is left."""
        last = mx.array([sequence.job.prompt.tokens[-1] for sequence in sequences], mx.uint32)
        self._new.update(sequences)
        self._append(sequences, last, mx.zeros(len(sequences)))

    def go_on(self, pending: Pending) -> None:
        """Add a sequence whose next token was chosen elsewhere."""
        sequence, token, logprobs = pending
        sequence.forget_context()
        self._append([sequence], token, logprobs[token].astype(mx.float32))
        if count := sequence.job.request.alternatives:
            self._tops[sequence] = _likeliest(logprobs, count)

    def pending(self) -> Pending:
        """Give back the one sequence that is left, to be generated alone."""
        (sequence,) = self.sequences
        assert self._latest is not None and not self._new
        token, logprobs = self._tokens, self._latest[0]
        sequence.cache = self._cache_of(sequence)
        self.remove([sequence])
        return sequence, token, logprobs

    def _append(self, sequences: list[Sequence], tokens: mx.array, logprobs: mx.array) -> None:
        self._tokens = mx.concatenate([self._tokens, tokens.astype(mx.uint32)])
        self._logprobs = mx.concatenate([self._logprobs, logprobs])
        self._latest = None
        if not self.sequences and len(sequences) == 1:
            self._cache, self._merged = sequences[0].cache, False
        else:
            self._merge(sequences)
        self.sequences += sequences
        for sequence in sequences:
            sequence.cache = []  # it is the batch's now

    def _merge(self, sequences: list[Sequence]) -> None:
        more = merged([sequence.cache for sequence in sequences])
        if not self.sequences:
            self._cache = more
        else:
            if not self._merged:
                self._cache = merged([self._cache])
            for layer, new in zip(self._cache, more, strict=True):
                layer.extend(new)
        self._merged = True

    def step(self) -> list[tuple[Sequence, Token | Exception]]:
        """Take one step.

        Returns:
            The next token of each sequence that was added before the latest step; the exception
            if one of its logits processors failed. Those that have ended are no part of the batch
            any more; `cache` and `tokens` of those that ended with a token are theirs again.
        """
        tokens, logprobs, tops, new = self._tokens, self._logprobs, self._tops, self._new
        logits = self._model(tokens[:, None], cache=self._cache)[:, -1, :]
        self._choose(logits)
        self._new, self.begins = set(), bool(new)
        if self._quantized is not None:
            self._quantized.apply(self._cache)
        mx.async_eval(self._tokens, self._logprobs, self._tops)
        mx.eval(tokens, logprobs, tops)
        results: list[tuple[Sequence, Token | Exception]] = []
        values: Any = tokens.tolist(), logprobs.tolist()
        rows = zip(self.sequences, *values, strict=True)
        for sequence, token, logprob in rows:
            sequence.tokens.append(token)
            failure = self._failed.pop(sequence, None)
            told = None if sequence in new else self._told(sequence, token, logprob, tops)
            if failure is not None and (told is None or told.finish_reason is None):
                results.append((sequence, failure))
            elif told is not None:
                results.append((sequence, told))
        self._part_from(results)
        return results

    def _told(self, sequence: Sequence, token: int, logprob: float, tops: dict[Any, Any]) -> Token:
        sequence.generated += 1
        reason = "length" if sequence.generated >= sequence.job.max_tokens else None
        if token in self._ends:
            reason = "stop"
        top: tuple[tuple[int, float], ...] = ()
        if sequence in tops:
            ids, values = (array.tolist() for array in tops[sequence])
            top = tuple(zip(ids, values, strict=True))
        passes = sequence.job.passes
        return Token(token, logprob, reason, top, passes.popleft() if passes else None)

    def _part_from(self, results: list[tuple[Sequence, Token | Exception]]) -> None:
        ended = set()
        for sequence, result in results:
            if isinstance(result, Exception):
                ended.add(sequence)
            elif result.finish_reason is not None:
                ended.add(sequence)
                sequence.cache = self._cache_of(sequence)
        self.remove(ended)

    def _cache_of(self, sequence: Sequence) -> Cache:
        if not self._merged:
            return self._cache
        return extracted(self._cache, self.sequences.index(sequence))

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Remove sequences, if they are in it."""
        gone = set(sequences)
        keep = [row for row, sequence in enumerate(self.sequences) if sequence not in gone]
        if len(keep) == len(self.sequences):
            return
        if self._merged and len(keep) == 1:
            self._cache, self._merged = extracted(self._cache, keep[0]), False
        elif not keep:
            self._cache, self._merged = [], False
        else:
            for layer in self._cache:
                layer.filter(keep)
        rows = mx.array(keep, mx.int32)
        self.sequences = [self.sequences[row] for row in keep]
        self._tokens, self._logprobs = self._tokens[rows], self._logprobs[rows]
        self._latest = None if self._latest is None else self._latest[rows]
        self._tops = {s: top for s, top in self._tops.items() if s not in gone}
        self._new -= gone

    def _choose(self, logits: mx.array) -> None:
        """Choose the tokens that follow, from logits (B, vocab)."""
        logits = self._processed(logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        samplers = [sequence.choice.sampler for sequence in self.sequences]
        if all(sampler is greedy_sampler for sampler in samplers):
            tokens = greedy_sampler(logprobs)
        else:
            rows = [sample(logprobs[n : n + 1]) for n, sample in enumerate(samplers)]
            tokens = mx.concatenate(rows)
        tokens = agreed(tokens.astype(mx.uint32))
        self._tokens, self._latest = tokens, logprobs
        chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        self._logprobs = chosen.astype(mx.float32)
        self._tops = {}
        for row, sequence in enumerate(self.sequences):
            if count := sequence.job.request.alternatives:
                self._tops[sequence] = _likeliest(logprobs[row], count)

    def _processed(self, logits: mx.array) -> mx.array:
        """The logits after the processors of each row; what one raises ends only its sequence."""
        if not any(sequence.choice.processors for sequence in self.sequences):
            return logits
        rows = [logits[row : row + 1] for row in range(len(self.sequences))]
        for row, sequence in enumerate(self.sequences):
            if not sequence.choice.processors:
                continue
            try:
                context = sequence.context(self._tokens[row : row + 1])
                for process in sequence.choice.processors:
                    rows[row] = process(context, rows[row])
            except Exception as error:
                self._failed[sequence] = error
        return mx.concatenate(rows)


def _likeliest(logprobs: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The likeliest tokens and their values, from log probabilities (vocab,)."""
    tokens = mx.argpartition(-logprobs, kth=count - 1)[:count]
    return tokens, logprobs[tokens]
