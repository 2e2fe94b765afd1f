"""How the tokens of one request are chosen."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from outlier_mlx.engine.sampling import bounded
from outlier_mlx.engine.steps import Processor
from outlier_mlx.serve.request import Request, Sampling
from outlier_mlx.upstream import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    greedy_sampler,
    make_logits_processors,
)

Sampler = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Choice:
    """How the tokens of one request are chosen. Both parts may have a state: one is for one reply.

    Attributes:
        sampler: from log probabilities (1, vocab) to a token (1,); called once for each token, in
            order. `greedy_sampler` has no state, and may be called for many rows at once.
        processors: each is called with all tokens so far (of prompt and reply), and the logits
            (1, vocab) for the next one, and returns the logits; called once for each token, in
            order.
    """

    sampler: Sampler
    processors: tuple[Processor, ...] = ()


def choice_for(request: Request, unaffected: Sequence[int]) -> Choice:
    """How to choose the tokens of a request.

    Args:
        request: a checked request.
        unaffected: tokens that XTC leaves alone; all are in the vocabulary.
    """
    sampling = request.sampling
    processors = make_logits_processors(
        sampling.logit_bias,
        sampling.repetition_penalty,
        sampling.repetition_context_size,
        sampling.presence_penalty,
        sampling.presence_context_size,
        sampling.frequency_penalty,
        sampling.frequency_context_size,
    )
    if processors:
        processors.insert(0, _in_float32)
    if request.constraint is not None:
        processors.append(request.constraint.start())
    return Choice(_sampler(sampling, request.seed, list(unaffected)), tuple(processors))


def _in_float32(_: mx.array, logits: mx.array) -> mx.array:
    """The logits in a type that has room for what a client can add to them: float16 has not."""
    return logits.astype(mx.float32)


def _sampler(sampling: Sampling, seed: int | None, unaffected: list[int]) -> Sampler:
    temperature, top_p = bounded(sampling.temperature, sampling.top_p)
    if temperature == 0:
        sampler: Sampler = greedy_sampler
        return sampler
    sampling = replace(sampling, temperature=temperature, top_p=top_p)
    return RandomSampler(sampling, random.getrandbits(64) if seed is None else seed, unaffected)


class RandomSampler:
    """A sampler with random numbers of its own, so that no other request changes its text.

    Its steps and their order are those of mlx-lm's `make_sampler`.

    Args:
        sampling: with a temperature above 0.
        seed: of the random numbers, 64 bits.
        unaffected: tokens that XTC leaves alone.

    Attributes:
        state: where its random numbers are, (2,) uint32.
    """

    def __init__(self, sampling: Sampling, seed: int, unaffected: list[int]) -> None:
        self.state = mx.random.key(seed)
        self._sampling = sampling
        self._unaffected = unaffected

    def __call__(self, logprobs: mx.array) -> mx.array:
        """A token (1,) from log probabilities (1, vocab)."""
        sampling = self._sampling
        self.state, for_xtc, for_token = mx.random.split(self.state, 3)
        if 0 < sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p:
            logprobs = apply_min_p(logprobs, sampling.min_p)
        if sampling.xtc_probability > 0:
            # With the probability 1, it is sure to be applied, and needs no random number.
            applied = apply_xtc(logprobs, 1.0, sampling.xtc_threshold, self._unaffected)
            applies = mx.random.uniform(key=for_xtc) < sampling.xtc_probability
            logprobs = mx.where(applies, applied, logprobs)
        if sampling.top_k > 0:
            logprobs = apply_top_k(logprobs, sampling.top_k)
        return mx.random.categorical(logprobs * (1 / sampling.temperature), key=for_token)
