"""Generate text with mlx-lm's sampler and cache, and with typed options."""

import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from outlier_mlx.engine.constraint import ConstraintProcessor, Grammars
from outlier_mlx.engine.distributed.ranks import least
from outlier_mlx.engine.drafting import Drafting
from outlier_mlx.engine.needs import cpu_step
from outlier_mlx.engine.paging.paged import planned_step, total_parameters
from outlier_mlx.engine.prompts import check_tokens, embedding_rows
from outlier_mlx.engine.responses import Response, responses
from outlier_mlx.engine.sampling import GlobalSampler, bounded
from outlier_mlx.engine.schemas import SchemaError
from outlier_mlx.engine.steps import Quantized, Steps
from outlier_mlx.engine.templates import render
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.attention import has_windows
from outlier_mlx.models.config import Description, describe_args
from outlier_mlx.models.quantization import GROUP_SIZES, largest_group
from outlier_mlx.models.sizes import context_length
from outlier_mlx.terminal import Progress, no_progress, quiet_transformers
from outlier_mlx.upstream import generation_stream, make_prompt_cache, make_sampler, wired_limit

KV_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Options:
    """Options of generation, with the names of `mlx_lm.generate` and its defaults.

    Only the default of `max_tokens` differs. `json_schema` is an option of its own: the
    text is a JSON value of it.

    Raises:
        OutlierError: options of the KV cache have values that are not allowed.
    """

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    min_tokens_to_keep: int = 1
    seed: int | None = None
    system_prompt: str | None = None
    prefill_response: str | None = None
    ignore_chat_template: bool = False
    max_kv_size: int | None = None
    prefill_step_size: int = 2048
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    json_schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check options for which MLX would fail only in the middle of the text."""
        if self.kv_bits is None:
            return
        if self.kv_bits not in KV_BITS:
            raise OutlierError(f"--kv-bits {self.kv_bits}: expected one of {KV_BITS}")
        if self.kv_group_size not in GROUP_SIZES:
            raise OutlierError(
                f"--kv-group-size {self.kv_group_size}: expected one of {GROUP_SIZES}"
            )
        if self.max_kv_size is not None:
            raise OutlierError("--kv-bits and --max-kv-size exclude each other")

    @property
    def quantized(self) -> Quantized | None:
        """How the KV cache is quantized; None: not at all."""
        if self.kv_bits is None:
            return None
        return Quantized(self.kv_bits, self.kv_group_size, self.quantized_kv_start)


def encode_prompt(tokenizer: Tokenizer, prompt: str, options: Options) -> list[int]:
    """Token ids of a prompt, after the chat template is applied if the model has one.

    Raises:
        OutlierError: there are no tokens, there is a system prompt but no chat template, or the
            template fails.
    """
    if not _templated(tokenizer, options):
        if options.system_prompt is not None:
            raise OutlierError("--system-prompt needs a chat template; this model has none")
        tokens = tokenizer.encode(prompt)
    else:
        messages = [{"role": "user", "content": prompt}]
        if options.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": options.system_prompt})
        prefill = options.prefill_response
        if prefill is not None:
            messages.append({"role": "assistant", "content": prefill})
        text = render(
            tokenizer,
            messages,
            continue_final_message=prefill is not None,
            add_generation_prompt=prefill is None,
        )
        tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        tokens = [token for token in (tokenizer.bos_token_id,) if token is not None]
    if not tokens:
        raise OutlierError("the prompt is empty")
    return tokens


def _templated(tokenizer: Tokenizer, options: Options) -> bool:
    return bool(tokenizer.has_chat_template) and not options.ignore_chat_template


def generate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    options: Options,
    progress: Progress = no_progress,
    drafting: Drafting | None = None,
) -> Generator[Response]:
    """Generate text from a prompt, piece by piece.

    Args:
        model: the model that `outlier_mlx.load` returns.
        tokenizer: the tokenizer that `outlier_mlx.load` returns.
        prompt: the user's text.
        options: options of sampling and of the KV cache.
        progress: progress callback (prompt tokens processed, prompt tokens in total).
        drafting: guesses at next tokens; None: looked up in prompt and text where that pays.

    Yields:
        mlx-lm's responses: `text`, and counts, tokens/s and peak memory so far.

    Raises:
        OutlierError: the model does not support the prompt or an option, or the prompt is as long
            as the context or longer and `max_kv_size` is not set.
    """
    if options.seed is not None:
        mx.random.seed(options.seed)
    with quiet_transformers():
        tokens = encode_prompt(tokenizer, prompt, options)
    limit = context_limit(model, options)
    room = options.max_tokens if limit is None else min(options.max_tokens, limit - len(tokens))
    if room < 1:
        raise OutlierError(
            f"the prompt has {len(tokens)} tokens; the context length is {limit};"
            " --max-kv-size N keeps only N of them in the KV cache"
        )
    if options.prefill_response is not None or not _templated(tokenizer, options):
        tokenizer = tokenizer.after(tokens)
    limited = replace(options, max_tokens=room)
    generated = generate_from_tokens(
        model, tokenizer, tokens, limited, progress=progress, drafting=drafting
    )
    for response in generated:
        yield response
        if response.finish_reason == "length" and room < options.max_tokens:
            warnings.warn(
                f"the text ends where the model's context of {limit} tokens does", stacklevel=2
            )


def context_limit(model: nn.Module, options: Options) -> int | None:
    """Tokens of prompt and text together, at most.

    Returns:
        None if the model's context length is not known, or if `max_kv_size` is set: the cache then
        drops tokens instead.
    """
    return None if options.max_kv_size is not None else context_length(described(model))


def generate_from_tokens(
    model: nn.Module,
    tokenizer: Tokenizer,
    tokens: list[int],
    options: Options,
    cache: list[Any] | None = None,
    progress: Progress = no_progress,
    before: Sequence[int] = (),
    drafting: Drafting | None = None,
) -> Generator[Response]:
    """Generate from tokens that follow those in a KV cache.

    Args:
        model: the model that `outlier_mlx.load` returns.
        tokenizer: the tokenizer that `outlier_mlx.load` returns.
        tokens: tokens that are not in the cache yet, at least one.
        options: see `generate_text`; the seed is ignored.
        cache: mlx-lm's cache of each layer, extended in place; None: a new cache.
        progress: progress callback (tokens processed, tokens in total).
        before: the tokens in the cache.
        drafting: see `generate_text`.

    Yields:
        The same responses as `generate_text`. A token is in the cache before it is yielded; once
        the iterator is closed, the cache holds no others.

    Raises:
        OutlierError: the model does not support an option, or has no row for a token; or no text
            can have the form of `json_schema`.
    """
    check_kv_cache(model, options)
    check_tokens(model, tokens)
    temperature, top_p = bounded(options.temp, options.top_p)
    sampler = make_sampler(
        temperature,
        top_p,
        options.min_p,
        options.min_tokens_to_keep,
        top_k=top_k(options.top_k, model, tokenizer),
        xtc_probability=options.xtc_probability,
        xtc_threshold=options.xtc_threshold,
        xtc_special_tokens=_unaffected(model, tokenizer),
    )
    if cache is None:
        cache = make_prompt_cache(model, options.max_kv_size)
    steps = Steps(
        model,
        tokens,
        cache=cache,
        before=before,
        sampler=GlobalSampler(sampler),
        processors=_constraint(model, tokenizer, [*before, *tokens], options),
        ends=tokenizer.eos_token_ids,
        max_tokens=options.max_tokens,
        quantized=options.quantized,
        drafts=(drafting or Drafting(model)).new(cache),
    )
    most = prefill_step(model, options.prefill_step_size)
    streams: list[Any] = [generation_stream]
    with wired_limit(model, streams):
        yield from responses(steps, tokenizer, most, progress)


def _constraint(
    model: nn.Module, tokenizer: Tokenizer, tokens: list[int], options: Options
) -> list[ConstraintProcessor]:
    """What holds the text to the schema of the options, if there is one."""
    if options.json_schema is None:
        return []
    grammars = Grammars(tokenizer, vocabulary(model, tokenizer))
    try:
        return [grammars.schema(options.json_schema).start(tokens)]
    except SchemaError as error:
        raise SchemaError(f"the JSON schema: {error}") from None


def _unaffected(model: nn.Module, tokenizer: Tokenizer) -> list[int]:
    """Tokens that XTC leaves alone: line breaks and what ends a text, as far as the model has them.

    MLX would write the log probability of any other id into foreign memory.
    """
    tokens = tokenizer.encode("\n") + list(tokenizer.eos_token_ids)
    return [token for token in tokens if 0 <= token < vocabulary(model, tokenizer)]


def prefill_step(model: nn.Module, most: int) -> int:
    """Number of prompt tokens to process at a time.

    Between two steps the progress is shown, and Ctrl-C acts. A GPU needs long steps. MLX's CPU
    backend is hardly slower with short ones, and there a step takes a fraction of a second unless a
    single token takes longer. The number depends on the model alone, so that results do; only where
    experts are paged, and long steps would take too much memory, steps are shorter. All ranks take
    the shortest.

    Args:
        model: any model; of its experts, all count.
        most: tokens of a step, at most.
    """
    most = planned_step(model, most)
    if mx.default_device() == mx.cpu:
        most = cpu_step(most, total_parameters(model))
    return least(most)


def top_k(wanted: int, model: nn.Module, tokenizer: Tokenizer) -> int:
    """The k for mlx-lm's sampler: 0, which means all tokens, if `wanted` is at least all tokens."""
    return wanted if wanted < vocabulary(model, tokenizer) else 0


def vocabulary(model: nn.Module, tokenizer: Tokenizer) -> int:
    """Width of the logits; if it is not known, the number of the tokenizer's tokens."""
    return embedding_rows(model) or len(tokenizer.get_vocab())


def check_kv_cache(model: nn.Module, options: Options) -> None:
    """Check whether mlx-lm can quantize the model's KV cache with these options.

    Raises:
        OutlierError: the group size does not divide the width of a head, or a layer has a sliding
            window.
    """
    if options.kv_bits is None:
        return
    config = described(model)
    if has_windows(config):
        raise OutlierError("--kv-bits: mlx-lm does not quantize the cache of sliding windows")
    width = config.head_dim
    if width is not None and width % options.kv_group_size:
        fit = largest_group(width)
        hint = f"use --kv-group-size {fit}" if fit else "leave out --kv-bits"
        raise OutlierError(
            f"--kv-group-size {options.kv_group_size} does not divide the head width {width};"
            f" {hint}"
        )


def described(model: nn.Module) -> Description:
    """The description of a loaded model, from its `args`."""
    return describe_args(getattr(model, "args", None))


def activation_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype that a model computes in: that of its first norm, or of its first weights.

    float32 for a model without any.
    """
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    floats = {name: a.dtype for name, a in arrays.items() if mx.issubdtype(a.dtype, mx.floating)}
    norms = [dtype for name, dtype in floats.items() if "norm" in name]
    return next(iter([*norms, *floats.values()]), mx.float32)
