"""One conversation in the thread that generates, and reading its prompt."""

import copy
from collections.abc import Sequence as Several
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.steps import Drafts
from outlier_mlx.serve.jobs import Job
from outlier_mlx.serve.sampling import Choice
from outlier_mlx.upstream import TokenBuffer

Cache = list[Any]


class Sequence:
    """A conversation: the tokens in its KV cache, and what is left to read.

    Args:
        job: what to generate.
        cache: mlx-lm's cache of each layer.
        count: number of the prompt's tokens that are in the cache.
        choice: how tokens are chosen.

    Attributes:
        tokens: the tokens in the cache.
        generated: number of tokens generated so far.
        drafts: guesses at its next tokens, from when it was generated alone.
    """

    def __init__(self, job: Job, cache: Cache, count: int, choice: Choice) -> None:
        self.job = job
        self.cache = cache
        self.choice = choice
        self.tokens = job.prompt.tokens[:count]
        self.generated = 0
        self.drafts: Drafts | None = None
        self._context: TokenBuffer | None = None

    @property
    def left(self) -> int:
        """Number of tokens to read before generation starts from the last one."""
        return max(0, len(self.job.prompt.tokens) - 1 - len(self.tokens))

    def slice(self, most: int) -> list[int]:
        """The next tokens to read, at most so many, and not beyond what is worth keeping."""
        start = len(self.tokens)
        ends = [end for end, _ in self.job.prompt.ends if end > start]
        stop = min(start + most, start + self.left, *ends)
        return self.job.prompt.tokens[start:stop]

    def copied_cache(self) -> Cache:
        """A copy of its cache. MLX copies no memory before one of the two is changed."""
        return copy.deepcopy(self.cache)

    def context(self, token: mx.array) -> mx.array:
        """All tokens so far, with the one (1,) that the model gets next."""
        if self._context is None:
            self._context = TokenBuffer(self.tokens)
        context: mx.array = self._context.update_and_fetch(token)
        return context

    def forget_context(self) -> None:
        """Make `context` anew from `tokens`, after steps that did not call it."""
        self._context = None


def read(model: nn.Module, sequences: Several[Sequence], slices: Several[list[int]]) -> None:
    """Read some tokens of each of several prompts together; one prompt needs no batch.

    Args:
        model: any model of mlx-lm.
        sequences: whose caches and tokens are extended.
        slices: their next tokens, at least one for each.
    """
    if len(sequences) == 1:
        cache = sequences[0].cache
        model(mx.array([slices[0]]), cache=cache)
    else:
        cache = merged([sequence.cache for sequence in sequences])
        lengths = [len(tokens) for tokens in slices]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        if max(padding):
            for layer in cache:
                layer.prepare(lengths=lengths, right_padding=padding)
        padded = [[*tokens, *[0] * more] for tokens, more in zip(slices, padding, strict=True)]
        model(mx.array(padded), cache=cache)
        if max(padding):
            for layer in cache:
                layer.finalize()
        for row, sequence in enumerate(sequences):
            sequence.cache = extracted(cache, row)
    mx.eval([layer.state for sequence in sequences for layer in sequence.cache])
    mx.clear_cache()
    for sequence, tokens in zip(sequences, slices, strict=True):
        sequence.tokens = sequence.tokens + tokens


def merged(caches: Several[Cache]) -> Cache:
    """A batch's cache, from those of its sequences."""
    return [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]


def extracted(cache: Cache, row: int) -> Cache:
    """The cache of one row of a batch."""
    return [layer.extract(row) for layer in cache]
