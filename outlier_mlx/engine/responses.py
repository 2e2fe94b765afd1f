"""Steps of a generation as responses: pieces of text, with what they took so far."""

import time
from collections.abc import Generator
from dataclasses import dataclass, field

import mlx.core as mx

from outlier_mlx.engine.steps import Counts, Steps
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutlierError
from outlier_mlx.terminal import Progress
from outlier_mlx.upstream import GenerationResponse

# Number of tokens between two checks that the output is finite.
CHECK_EVERY = 16


@dataclass
class Response(GenerationResponse):
    """mlx-lm's response, and what the generation took so far."""

    counts: Counts = field(default_factory=Counts)


def responses(
    steps: Steps, tokenizer: Tokenizer, most: int, progress: Progress
) -> Generator[Response]:
    """Read the prompt of `steps`, and generate.

    Args:
        steps: a sequence whose prompt may still be unread.
        tokenizer: makes the text.
        most: prompt tokens to read at a time, at most.
        progress: progress callback (prompt tokens processed, prompt tokens in total).

    Yields:
        A response for each token. When the iterator is closed, the KV cache holds the tokens that
        were yielded, and no others.

    Raises:
        OutlierError: the model's output is not a number.
    """
    begun, total = time.perf_counter(), steps.unread
    progress(0, total)
    while steps.read(most):
        progress(total - steps.unread, total)
    detokenizer, prompt_tps, given = tokenizer.detokenizer, 0.0, 0
    while steps.finish_reason is None:
        found = steps.step()
        if not given:
            prompt_tps = total / (time.perf_counter() - begun)
            begun = time.perf_counter()
            progress(total, total)
        for number, chosen in enumerate(found):
            left = len(found) - number - 1
            if given % CHECK_EVERY == 0:
                _check_finite(chosen.logprobs)
            given += 1
            reason = None if left else steps.finish_reason
            try:
                yield Response(
                    text=detokenizer.piece(chosen.token, reason),
                    token=chosen.token,
                    logprobs=chosen.logprobs,
                    from_draft=chosen.drafted,
                    prompt_tokens=total,
                    prompt_tps=prompt_tps,
                    generation_tokens=given,
                    generation_tps=given / (time.perf_counter() - begun),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=reason,
                    counts=steps.counts,
                )
            except GeneratorExit:
                # Nobody wants the rest of these tokens.
                steps.take_back(left)
                raise


def _check_finite(logprobs: mx.array) -> None:
    """Fail if activations overflowed: a NaN in the KV cache spoils every later token."""
    if bool(mx.isnan(logprobs).any()):
        raise OutlierError(
            "the model's output is not a number: its activations overflowed in float16 (--dtype"
            " bfloat16 or --dtype float32 prevents it), or its weights are damaged (see"
            " `outlier-mlx verify`)"
        )
