"""The one model that is served."""

import inspect
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.models.cache import make_prompt_cache
from transformers import PreTrainedTokenizerBase

from outlier_mlx.engine.constraint import Grammars
from outlier_mlx.engine.drafting import Drafting
from outlier_mlx.engine.experts import ExpertRecorder, RoutedExperts, routed_experts
from outlier_mlx.engine.generate import (
    Options,
    activation_dtype,
    check_kv_cache,
    described,
    prefill_step,
    vocabulary,
)
from outlier_mlx.engine.needs import cache_needs
from outlier_mlx.engine.prompts import embedding_rows
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.models.sizes import context_length
from outlier_mlx.serve.calls import reads_calls
from outlier_mlx.serve.http import Service
from outlier_mlx.serve.limits import Limits
from outlier_mlx.serve.memory import CacheMemory
from outlier_mlx.serve.messages import MessageReader
from outlier_mlx.serve.probes import TemplateProbes
from outlier_mlx.serve.prompts import BoundedTokenizer
from outlier_mlx.serve.request import Sampling
from outlier_mlx.serve.sequences import Cache

Load = Callable[[], tuple[nn.Module, Tokenizer]]

TEMPLATE_NAMES = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)


class OneModel:
    """The model that every request gets, whatever model it names.

    The thread that generates also loads: MLX evaluates a lazy array only in the thread that made
    it, and a model has lazy arrays besides its parameters.

    Args:
        service: whose options say how the model is used.
        load: returns model and tokenizer.

    Attributes:
        loaded: set when loading has ended for the first time.
        failure: the exception that ended loading for the first time, or None.
        state: "loaded", "unloaded" or "loading", later.
        model: the model; None if it is unloaded.
        tokenizer: its tokenizer.
        batches: whether several of its KV caches can be merged.
        quantized: how KV caches are quantized; None: not at all.
        drafting: guesses at next tokens of a text that is generated alone.
        ends: tokens that end a text.
        machine: finds the marks of reasoning and of tool calls in a text.

        The following are set once the model is loaded for the first time.

        limits: limits for the parameters of requests.
        prompts: the tokenizer for the prompts of requests.
        rows: rows of the model's embedding, if they are known.
        memory: memory for KV caches.
        experts: the model's routed experts, or None.
        recorder: records which of them are used; None while no model is loaded.
        prefill_step: tokens of a prompt to read at a time, at most.
        unaffected: tokens that XTC leaves alone: line breaks and what ends a text.
    """

    model: Any
    tokenizer: Tokenizer
    batches: bool
    drafting: Drafting
    ends: frozenset[int]
    machine: TextStateMachine
    limits: Limits
    prompts: BoundedTokenizer
    rows: int | None
    memory: CacheMemory
    experts: RoutedExperts | None
    recorder: ExpertRecorder | None
    prefill_step: int
    unaffected: list[int]

    def __init__(self, service: Service, load: Load) -> None:
        self.service = service
        self.loaded = threading.Event()
        self.failure: BaseException | None = None
        self.state = "loading"
        options = service.options
        self._kv = Options(
            kv_bits=options.kv_bits,
            kv_group_size=options.kv_group_size,
            quantized_kv_start=options.quantized_kv_start,
        )
        self.quantized = self._kv.quantized
        self._load_model = load

    def load_default(self) -> None:
        """Load the model, and all that is known from it."""
        try:
            self.reload()
            options = self.service.options
            check_kv_cache(self.model, self._kv)
            # Between two steps, the other replies get their next tokens.
            self.prefill_step = prefill_step(self.model, options.prefill_step_size)
            width = vocabulary(self.model, self.tokenizer)
            self.experts = routed_experts(self.model)
            self.limits = Limits(
                options.max_tokens,
                width,
                options.max_context or context_length(described(self.model)),
                TEMPLATE_NAMES,
                Sampling(options.temp, options.top_p, options.top_k, options.min_p),
                MessageReader(TemplateProbes(self.tokenizer), reads_calls(self.tokenizer)),
                Grammars(self.tokenizer, width),
                has_experts=self.experts is not None,
            )
            self.limits.grammars.prepare()  # later, all that is being generated would wait for it
            self.prompts = BoundedTokenizer(self.tokenizer, self.limits.context)
            self.rows = embedding_rows(self.model)
            marks = {*self.tokenizer.encode("\n"), *self.ends}
            self.unaffected = sorted(token for token in marks if 0 <= token < self.limits.vocab)
            wide = activation_dtype(self.model) == mx.float32
            needs = cache_needs(described(self.model), wide=wide)
            bits, group_size = options.kv_bits, options.kv_group_size
            size = partial(needs.cache, bits=bits, group_size=group_size)
            self.memory = CacheMemory(options.cache_memory, size)
        except BaseException as error:
            self.failure = error
        finally:
            self.loaded.set()

    def reload(self) -> None:
        """Load model and tokenizer, also again."""
        self.state = "loading"
        try:
            self.model, self.tokenizer = self._load_model()
        except BaseException:
            self.state = "unloaded"
            raise
        self.recorder = ExpertRecorder(self.model)
        self.drafting = Drafting(self.model, lookup=self.service.options.prompt_lookup)
        self.ends = frozenset(self.tokenizer.eos_token_ids)
        self.machine = make_text_state_machine(self.tokenizer)
        mergeable = all(hasattr(layer, "merge") for layer in self.new_cache())
        self.batches = mergeable and self.quantized is None
        self.state = "loaded"

    def description(self) -> dict[str, Any]:
        """What clients can know of the model besides its name: JSON values."""
        sampling = self.limits.sampling
        return {
            "context": self.limits.context,
            "defaults": {
                "max_tokens": self.limits.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            },
            "experts": None if self.experts is None else asdict(self.experts),
        }

    def new_cache(self) -> Cache:
        """An empty KV cache for one conversation."""
        cache: Cache = make_prompt_cache(self.model)
        return cache

    def unload(self) -> None:
        """Let go of the model; its tokenizer stays, because requests need it before they wait."""
        self.model = self.recorder = None
        self.state = "unloaded"
