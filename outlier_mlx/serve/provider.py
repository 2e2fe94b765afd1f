"""The one model that is served, as mlx-lm's server asks for it."""

import copy
import inspect
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from outlier_mlx.engine.experts import RoutedExperts, routed_experts
from outlier_mlx.engine.generate import activation_dtype, described, prefill_step, vocabulary
from outlier_mlx.engine.needs import cache_needs
from outlier_mlx.engine.prompts import embedding_rows
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.models.sizes import context_length
from outlier_mlx.serve.http import Service
from outlier_mlx.serve.limits import Limits
from outlier_mlx.serve.memory import CacheMemory
from outlier_mlx.serve.messages import MessageReader
from outlier_mlx.serve.mlxlm_server import ModelProvider
from outlier_mlx.serve.probes import TemplateProbes
from outlier_mlx.serve.prompts import BoundedTokenizer
from outlier_mlx.serve.request import Sampling

Load = Callable[[], tuple[nn.Module, Tokenizer]]

TEMPLATE_NAMES = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)


class OneModel(ModelProvider):
    """Provides the same model for every request, whatever model the request names.

    The thread that generates also loads: MLX evaluates a lazy array only in the thread that made
    it, and a model has lazy arrays besides its parameters.

    Attributes:
        loaded: set when loading has ended for the first time.
        failure: the exception that ended loading for the first time, or None.
        state: "loaded", "unloaded" or "loading", later.
        limits: limits for the parameters of requests; set once the model is loaded.
        prompts: the tokenizer for the prompts of requests; set once the model is loaded.
        rows: rows of the model's embedding, if they are known; set once the model is loaded.
        memory: memory for KV caches; set once the model is loaded.
        experts: the model's routed experts, or None; set once the model is loaded.
    """

    model: Any
    tokenizer: Any
    model_key: Any
    limits: Limits
    prompts: BoundedTokenizer
    rows: int | None
    memory: CacheMemory
    experts: RoutedExperts | None

    def __init__(self, service: Service, load: Load) -> None:
        super().__init__(service.options.arguments())
        self.service = service
        self.loaded = threading.Event()
        self.failure: BaseException | None = None
        self.state = "loading"
        self._load_model = load

    def load_default(self) -> None:
        """Load the model, and all that is known from it, if that was not done yet."""
        if self.loaded.is_set():
            return
        try:
            self.reload()
            self.model_key = (self.service.name, None, None)
            options = self.service.options
            # Between two steps, the other replies get their next tokens.
            self.cli_args.prefill_step_size = prefill_step(self.model, options.prefill_step_size)
            self.limits = Limits(
                options.max_tokens,
                vocabulary(self.model, self.tokenizer),
                options.max_context or context_length(described(self.model)),
                TEMPLATE_NAMES,
                Sampling(options.temp, options.top_p, options.top_k, options.min_p),
                MessageReader(TemplateProbes(self.tokenizer), self.tokenizer.has_tool_calling),
            )
            self.prompts = BoundedTokenizer(self.tokenizer, self.limits.context)
            self.experts = routed_experts(self.model)
            self.rows = embedding_rows(self.model)
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
        self._without_text = copy.copy(self.tokenizer)
        self._without_text._detokenizer = _NoText()
        self.is_batchable = all(hasattr(c, "merge") for c in make_prompt_cache(self.model))
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

    def unload(self) -> None:
        """Let go of the model; its tokenizer stays, because requests need it before they wait."""
        self.model, self.state = None, "unloaded"

    def load(self, *_: Any) -> tuple[nn.Module, TokenizerWrapper]:
        """The loaded model and its tokenizer; the arguments are ignored.

        The tokenizer gives no text, because mlx-lm would ask for it in the thread that generates,
        where an error ends all replies. Each `Reply` makes its own.
        """
        return self.model, self._without_text


class _NoText(StreamingDetokenizer):
    """A detokenizer whose text is always empty."""

    last_segment = ""

    def reset(self) -> None:
        pass

    def add_token(self, token: int) -> None:
        pass

    def finalize(self) -> None:
        pass
