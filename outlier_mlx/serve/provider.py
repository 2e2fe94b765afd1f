"""The one model that is served."""

import inspect
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
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
from outlier_mlx.engine.needs import Needs, cache_needs
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
from outlier_mlx.upstream import TextStateMachine, make_prompt_cache, make_text_state_machine

Load = Callable[[], tuple[nn.Module, Tokenizer]]
LoadDraft = Callable[[], nn.Module]

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
        load_draft: returns a draft model, with the same tokens; None: there is none.

    Attributes:
        loaded: set when loading has ended for the first time.
        failure: the exception that ended loading for the first time, or None.
        state: "loaded", "unloaded" or "loading", later.
        model: the model; None if it is unloaded.
        tokenizer: its tokenizer.
        batches: whether several of its KV caches can be merged.
        quantized: how KV caches are quantized; None: not at all.
        drafting: guesses at next tokens of a text that is generated alone; None if the model is
            unloaded.
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
    drafting: Drafting | None
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

    def __init__(self, service: Service, load: Load, load_draft: LoadDraft | None = None) -> None:
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
        self._load_model, self._load_draft = load, load_draft
        self._draft_model: Any = None

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
            self.memory = CacheMemory(options.cache_memory, self._cache_size())
        except BaseException as error:
            self.failure = error
        finally:
            self.loaded.set()

    def _cache_size(self) -> Callable[[int], int]:
        """A function that gives the bytes of a conversation's KV caches, with the draft model's."""
        kv = self._kv
        needs = _cache_needs(self.model)
        own = partial(
            needs.cache, bits=kv.kv_bits, group_size=kv.kv_group_size, start=kv.quantized_kv_start
        )
        if self._draft_model is None:
            return own
        draft = _cache_needs(self._draft_model)
        return lambda tokens: own(tokens) + draft.cache(tokens)

    def reload(self) -> None:
        """Load model and tokenizer, also again."""
        self.state = "loading"
        options = self.service.options
        try:
            # First, because MLX keeps to the plan of the last one, which counts both.
            self._draft_model = self._load_draft() if self._load_draft else None
            self.model, self.tokenizer = self._load_model()
            self.drafting = Drafting(
                self.model,
                lookup=options.prompt_lookup,
                draft_model=self._draft_model,
                num_draft_tokens=options.num_draft_tokens,
            )
        except BaseException:
            self.unload()
            raise
        self.recorder = ExpertRecorder(self.model)
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
        self.model = self.recorder = self.drafting = self._draft_model = None
        self.state = "unloaded"


def _cache_needs(model: nn.Module) -> Needs:
    return cache_needs(described(model), wide=activation_dtype(model) == mx.float32)
