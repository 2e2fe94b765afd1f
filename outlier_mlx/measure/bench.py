"""Speed of reading prompts and of generation: mlx-lm's own loop, timed over repeated runs."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import batch_generate, stream_generate

from outlier_mlx.engine.chips import Chip, this_chip
from outlier_mlx.engine.distributed.ranks import gathered
from outlier_mlx.engine.generate import activation_dtype, described, vocabulary
from outlier_mlx.engine.paging.paged import PagedSwitchLinear, planned_step, statistics_of, store_of
from outlier_mlx.engine.paging.statistics import PagingStatistics
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.measure.environment import dtype_name, environment
from outlier_mlx.measure.perplexity import warn_if_longer
from outlier_mlx.measure.speeds import NO_EXPECTATION, Expectation, expectation
from outlier_mlx.models.sizes import bytes_read
from outlier_mlx.runtime.switch import TernarySwitchLinear
from outlier_mlx.terminal import Progress, no_progress


@dataclass(frozen=True)
class BenchOptions:
    """What to run; names and meanings are those of `mlx_lm.benchmark`.

    The defaults are the same, too, except for `generation_tokens`.
    """

    prompt_tokens: int = 512
    generation_tokens: int = 128
    batch_size: int = 1
    num_trials: int = 5
    prefill_step_size: int = 2048
    delay: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the KV caches of a run hold, all texts of the batch together."""
        return self.batch_size * (self.prompt_tokens + self.generation_tokens)


@dataclass(frozen=True)
class Runs:
    """The values of one quantity in repeated runs."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the values."""
        return median(self.values)

    @property
    def spread(self) -> float:
        """Largest minus smallest value, as a fraction of the median."""
        return (max(self.values) - min(self.values)) / self.median

    def as_json(self) -> dict[str, Any]:
        """Median, smallest, largest, and all values in the order of the runs."""
        values = list(self.values)
        return {"median": self.median, "min": min(values), "max": max(values), "runs": values}


T = TypeVar("T")


def in_turn(things: list[T], turn: int) -> list[T]:
    """The order of a round: rotated by its number, reversed in every other round."""
    start = turn % max(len(things), 1)
    order = things[start:] + things[:start]
    return order[::-1] if turn % 2 else order


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark found.

    Attributes:
        chip: the chip it ran on.
        dtype: activation dtype.
        options: what was run.
        prompt_tps: prompt tokens/s.
        generation_tps: generated tokens/s, all texts of the batch together.
        peak_memory_gb: peak of MLX's memory during the runs in GB, weights included.
        bytes_per_token: bytes that decoding one token reads, if known; see `decode_bytes`.
        expectation: what was to be expected.
        paging: what paged experts cost in all timed runs; None: they are not paged.
        missing_bytes: bytes of paged experts that a decoded token read, on average.
    """

    chip: Chip
    dtype: str
    options: BenchOptions
    prompt_tps: Runs
    generation_tps: Runs
    peak_memory_gb: float
    bytes_per_token: int | None
    expectation: Expectation = NO_EXPECTATION
    paging: PagingStatistics | None = None
    missing_bytes: float = 0.0

    @property
    def steps_per_s(self) -> float:
        """Decoded tokens/s, from the median speed."""
        # mlx-lm divides all tokens by the time after the first.
        tokens = self.options.generation_tokens
        return self.generation_tps.median * (tokens - 1) / tokens

    @property
    def decode_gb_s(self) -> float | None:
        """Bandwidth that decoding used in GB/s, from the median speed."""
        if self.bytes_per_token is None:
            return None
        return self.bytes_per_token * self.steps_per_s / 1e9

    @property
    def of_bandwidth(self) -> float | None:
        """`decode_gb_s` as a fraction of the chip's published bandwidth."""
        if self.decode_gb_s is None or self.chip.bandwidth_gb_s is None:
            return None
        return self.decode_gb_s / self.chip.bandwidth_gb_s

    @property
    def of_expected(self) -> tuple[float | None, float | None]:
        """Prompt speed and decoded tokens/s as fractions of what was to be expected at most."""
        prompt, decode = self.expectation.prompt_tps, self.expectation.decode
        return (
            None if prompt is None else self.prompt_tps.median / prompt,
            None if decode is None else self.steps_per_s / decode.tokens_per_s,
        )

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        prompt, generation = self.of_expected
        return {
            **environment(self.chip),
            "dtype": self.dtype,
            "options": asdict(self.options),
            "prompt_tokens_per_s": self.prompt_tps.as_json(),
            "generation_tokens_per_s": self.generation_tps.as_json(),
            "peak_memory_gb": self.peak_memory_gb,
            "decode": {
                "bytes_per_token": self.bytes_per_token,
                "gb_per_s": self.decode_gb_s,
                "of_bandwidth": self.of_bandwidth,
                "missing_bytes_per_token": self.missing_bytes,
            },
            "expected": {
                **self.expectation.as_json(),
                "of_prompt": prompt,
                "of_decode": generation,
            },
            "paging": self.paging and self.paging.as_json(),
        }


def bench_model(
    model: nn.Module,
    tokenizer: Tokenizer,
    options: BenchOptions,
    progress: Progress = no_progress,
    folder: Path | None = None,
) -> BenchResult:
    """Time a model on random prompts, after one warm-up run.

    Args:
        model: the model that `outlier_mlx.load` returns.
        tokenizer: the tokenizer that `outlier_mlx.load` returns.
        options: lengths of prompt and generated text, and number of runs.
        progress: called with runs done so far, and in all.
        folder: where the model is, to tell what is to be expected of it.
    """
    longest = options.prompt_tokens + options.generation_tokens
    warn_if_longer(model, longest, "prompt and text have")
    mx.random.seed(0)
    size = (options.batch_size, options.prompt_tokens)
    prompts: Any = mx.random.randint(0, vocabulary(model, tokenizer), size).tolist()
    ends, tokenizer.eos_token_ids = tokenizer.eos_token_ids, []  # none ends a text
    responses, store = [], store_of(model)
    try:
        for run in range(options.num_trials + 1):
            progress(run, options.num_trials + 1)
            if run > 0:
                time.sleep(options.delay)
            if run == 1:
                mx.reset_peak_memory()
                if store is not None:
                    store.statistics = PagingStatistics()
            responses.append(_generate(model, tokenizer, prompts, options))
    finally:
        tokenizer.eos_token_ids = ends
    progress(options.num_trials + 1, options.num_trials + 1)
    timed = responses[1:]
    context = options.prompt_tokens + options.generation_tokens // 2
    peak, chip, expected = mx.get_peak_memory(), this_chip(), NO_EXPECTATION
    missing = sum(run.missing_bytes for run in timed) / len(timed)
    if folder is not None:
        expected = expectation(folder, chip, context, options.batch_size, missing)
    return BenchResult(
        chip=chip,
        dtype=dtype_name(activation_dtype(model)),
        options=options,
        prompt_tps=Runs(tuple(r.prompt_tps for r in timed)),
        generation_tps=Runs(tuple(r.generation_tps for r in timed)),
        peak_memory_gb=peak / 1e9,
        bytes_per_token=decode_bytes(model, context) if options.batch_size == 1 else None,
        expectation=expected,
        paging=statistics_of(model),
        missing_bytes=missing,
    )


@dataclass(frozen=True)
class _Run:
    """A run: mlx-lm's speeds, and the bytes of paged experts that a decoded token read."""

    prompt_tps: float
    generation_tps: float
    missing_bytes: float = 0.0


def _generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    options: BenchOptions,
) -> _Run:
    limits: dict[str, Any] = {
        "max_tokens": options.generation_tokens,
        "prefill_step_size": planned_step(model, options.prefill_step_size),
    }
    if len(prompts) > 1:
        found = batch_generate(model, tokenizer, list(prompts), **limits).stats
        # In a pipeline, the last rank alone waits for all of a prompt before the first token.
        told = gathered(f"{found.prompt_tps} {found.generation_tps}")[-1]
        return _Run(*map(float, told.split()))
    store = store_of(model)
    responses = stream_generate(model, tokenizer, prompts[0], **limits)
    last = next(responses)  # the prompt is read
    before = store.statistics.bytes_read if store else 0
    for response in responses:
        last = response  # it alone: each holds an array of the vocabulary's size
    read = (store.statistics.bytes_read if store else 0) - before
    steps = max(1, options.generation_tokens - 1)
    return _Run(last.prompt_tps, last.generation_tps, read / steps)


def decode_bytes(model: nn.Module, context: int) -> int | None:
    """Bytes that decoding one token has to read; see `models.sizes.bytes_read`.

    Without kernels, these are the bytes of MLX's copy of the experts, not of the packed experts.

    Args:
        model: a tier, or any model of mlx-lm's.
        context: tokens in the KV cache.

    Returns:
        None for models that are not of a family in `models/`.
    """
    config = described(model)
    if config.family is None:
        return None
    weights = _weights(model).items()
    sizes = [(name, array.nbytes, array.shape[0]) for name, array in weights] + _paged(model)
    return bytes_read(sizes, config, context, activation_dtype(model).size)


def _weights(model: nn.Module) -> dict[str, mx.array]:
    """The arrays that decoding reads, by name."""
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, module in model.named_modules():
        if isinstance(module, TernarySwitchLinear) and module.prepared is not None:
            del weights[f"{name}.weight"], weights[f"{name}.scales"]
            for number, array in enumerate(module.prepared.arrays):
                weights[f"{name}.{number}"] = array
    return weights


def _paged(model: nn.Module) -> list[tuple[str, int, int]]:
    """Names of paged experts' arrays, and the bytes and the number of all experts of a layer."""
    return [
        (
            f"{name}.{number}",
            array.nbytes // array.shape[0] * module.num_experts,
            module.num_experts,
        )
        for name, module in model.named_modules()
        if isinstance(module, PagedSwitchLinear)
        for number, array in enumerate(module.stored)
    ]
