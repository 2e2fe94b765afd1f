"""A sequence that is generated alone: its steps can give several tokens, after a draft."""

from collections.abc import Collection, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.drafting import Drafting
from outlier_mlx.engine.sampling import GlobalSampler
from outlier_mlx.engine.steps import Chosen, Counts, Processor, Quantized, Steps
from outlier_mlx.serve.jobs import Token
from outlier_mlx.serve.sequences import Sequence
from outlier_mlx.upstream import greedy_sampler

#: A sequence, the token (1,) that comes next and is not in its cache, and log probabilities
#: (vocab,) at that place: from these, another loop goes on.
Pending = tuple[Sequence, mx.array, mx.array]


class _ProcessorError(Exception):
    """A logits processor failed."""


class Single:
    """One sequence, in the place of a `Batch`.

    Args:
        model: any model of mlx-lm.
        sequence: whose prompt is read but for its last token, or as `pending` says.
        ends: tokens that end a text.
        quantized: how its cache is quantized; None: not at all.
        drafting: gives it guesses at next tokens, if it has none yet; None: there are none.
        pending: what a batch chose next for it.

    Attributes:
        sequences: the one, or none if it has ended.
        begins: False; its first step gives its first token.
        latest: what the latest step took.
    """

    begins = False

    def __init__(
        self,
        model: nn.Module,
        sequence: Sequence,
        ends: Collection[int],
        quantized: Quantized | None,
        drafting: Drafting | None,
        pending: tuple[mx.array, mx.array] | None = None,
    ) -> None:
        self.sequences = [sequence]
        self.latest = self._counted = Counts()
        sampler: Any = sequence.choice.sampler
        if sequence.drafts is None and drafting is not None:
            sequence.drafts = drafting.new(sequence.cache)
        self._steps = Steps(
            model,
            [] if pending else sequence.job.prompt.tokens[-1:],
            cache=sequence.cache,
            before=sequence.tokens,
            sampler=GlobalSampler() if sampler is greedy_sampler else sampler,
            processors=[_guarded(process) for process in sequence.choice.processors],
            ends=ends,
            max_tokens=sequence.job.max_tokens - sequence.generated,
            quantized=quantized,
            drafts=sequence.drafts,
            pending=pending,
            stream=mx.default_stream(mx.default_device()),
        )

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def nbytes(self) -> int:
        """Size of its KV cache, in bytes."""
        return sum(layer.nbytes for layer in self._steps.cache)

    def step(self) -> list[tuple[Sequence, Token | Exception]]:
        """Its next tokens, or the exception of a logits processor; see `Batch.step`."""
        (sequence,) = self.sequences
        try:
            chosen = self._steps.step()
        except _ProcessorError as error:
            self.sequences = []
            reason = error.__cause__
            return [(sequence, reason if isinstance(reason, Exception) else error)]
        last = len(chosen) - 1
        reasons = [self._steps.finish_reason if n == last else None for n in range(last + 1)]
        tokens = [self._told(sequence, *pair) for pair in zip(chosen, reasons, strict=True)]
        sequence.generated += len(tokens)
        self.latest = self._steps.counts - self._counted
        self._counted += self.latest
        sequence.job.counts += self.latest
        if self._steps.finish_reason is not None:
            self.sequences = []
            self._give_back(sequence)
        return [(sequence, token) for token in tokens]

    def _told(self, sequence: Sequence, chosen: Chosen, reason: str | None) -> Token:
        logprobs = chosen.logprobs
        top: tuple[tuple[int, float], ...] = ()
        if count := sequence.job.request.alternatives:
            likeliest = mx.argpartition(-logprobs, kth=count - 1)[:count]
            top = tuple(zip(*_lists(likeliest, logprobs[likeliest]), strict=True))
        (logprob,) = _lists(logprobs[chosen.token : chosen.token + 1])
        return Token(chosen.token, logprob[0], reason, top)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Remove it, if it is among these."""
        gone = set(sequences)
        self.sequences = [sequence for sequence in self.sequences if sequence not in gone]

    def pending(self) -> Pending:
        """Give the sequence back, for a batch to go on with it."""
        (sequence,) = self.sequences
        token, logprobs = self._steps.pending()
        self._give_back(sequence)
        self.sequences = []
        return sequence, token, logprobs

    def _give_back(self, sequence: Sequence) -> None:
        sequence.tokens, sequence.cache = self._steps.tokens, self._steps.cache


def _guarded(process: Processor) -> Processor:
    """A logits processor whose errors are told from those of the model."""

    def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
        try:
            return process(tokens, logits)
        except Exception as error:
            raise _ProcessorError from error

    return guarded


def _lists(*arrays: mx.array) -> list[list]:
    return [array.tolist() for array in arrays]  # type: ignore[misc]
