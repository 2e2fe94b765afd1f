"""What to generate for a request, whatever API it came through."""

from dataclasses import dataclass, field
from typing import Any

from outlier_mlx.engine.constraint import Constraint


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the parameters of mlx-lm's sampler and logits processors.

    A penalty of 0 is off; `logit_bias` maps tokens to what is added to their logits.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: dict[int, float] = field(default_factory=dict)
    repetition_penalty: float = 0.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20


@dataclass(frozen=True)
class Request:
    """A request that was checked.

    Attributes:
        prompt: plain text to continue, or its tokens; with `messages`, empty.
        messages: a conversation for the chat template, or None.
        tools: functions that the model may call, for the chat template.
        parallel_calls: whether the model may call more than one function.
        template: further arguments of the chat template.
        stop: texts that end the reply and are not part of it.
        max_tokens: largest number of tokens in the reply.
        asked_tokens: the number that the client asked for, which may be larger; 0: it did not ask.
        sampling: how tokens are chosen.
        seed: seed of the random numbers; None: the seed is random.
        alternatives: number of likeliest tokens whose log probabilities are returned beside that
            of each chosen token; None: no log probabilities.
        constraint: what the reply's form is held to; None: it is free.
        experts: whether to tell which experts served each token.
        stream: whether the reply is sent in pieces.
        include_usage: whether a stream ends with the numbers of tokens.
        unused: names of the request's fields that have no effect, because the API does not have
            them or the chat template does not use them.
    """

    prompt: str | list[int] = ""
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    parallel_calls: bool = True
    template: dict[str, Any] = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    max_tokens: int = 256
    asked_tokens: int = 0
    sampling: Sampling = Sampling()
    seed: int | None = None
    alternatives: int | None = None
    constraint: Constraint | None = None
    experts: bool = False
    stream: bool = False
    include_usage: bool = False
    unused: tuple[str, ...] = ()
