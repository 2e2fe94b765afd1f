"""The one table of a request's fields: what becomes of each, and which values it can have."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from outlier_mlx.serve.access import Refused

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
# MLX converts numbers to 32 bits.
MAX_NUMBER = (1 << 31) - 1
MAX_ALTERNATIVES = 20


class Values(Protocol):
    """Which values a field can have; as text, what error messages and the documentation say."""

    def allow(self, value: object) -> bool:
        """Whether this is one of them."""


@dataclass(frozen=True)
class Number:
    """Numbers from `low` to `high`, and those in `also`."""

    low: float = -MAX_NUMBER
    high: float = MAX_NUMBER
    whole: bool = False
    also: tuple[float, ...] = ()

    def allow(self, value: object) -> bool:
        """Whether this is one of them."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return value in self.also or self.low <= value <= self.high

    def __str__(self) -> str:
        text = "a whole number" if self.whole else "a number"
        if self.low > -MAX_NUMBER:
            text += f" from {self.low:g}"
        if self.high < MAX_NUMBER:
            text += f" to {self.high:g}"
        return text + "".join(f", or {value:g}" for value in self.also)


@dataclass(frozen=True)
class Kind:
    """JSON values of some types."""

    types: tuple[type, ...]
    text: str

    def allow(self, value: object) -> bool:
        """Whether this is one of them."""
        return type(value) in self.types

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Either:
    """Values that one or the other allows."""

    options: tuple[Values, ...]

    def allow(self, value: object) -> bool:
        """Whether this is one of them."""
        return any(option.allow(value) for option in self.options)

    def __str__(self) -> str:
        return ", or ".join(map(str, self.options))


FLAG = Kind((bool,), "true or false")
STRING = Kind((str,), "a string")
LIST = Kind((list,), "a list")
OBJECT = Kind((dict,), "an object")
# Clients send their own default for the number of tokens, so a large one is no error.
LENGTH = Number(1, math.inf, whole=True)
PENALTY = Number()
WINDOW = Number(0, whole=True)


@dataclass(frozen=True)
class Field:
    """What becomes of a field.

    Attributes:
        use: "honoured": it changes the response as it says; "refused": it would change the
            response, and this server cannot; "accepted": it changes no response.
        values: values of an honoured field; other fields can have any.
        harmless: values of a refused field that mean the same as leaving it out.
        endpoint: the only endpoint that has the field; None: both have it.
    """

    use: Literal["honoured", "refused", "accepted"]
    values: Values | None = None
    harmless: tuple[Any, ...] = ()
    endpoint: str | None = None


def _honoured(values: Values, endpoint: str | None = None) -> Field:
    return Field("honoured", values, endpoint=endpoint)


def _refused(*harmless: Any) -> Field:
    return Field("refused", harmless=harmless)


ACCEPTED = Field("accepted")

FIELDS: dict[str, Field] = {
    "messages": _honoured(LIST, CHAT),
    "prompt": _honoured(Either((STRING, LIST)), TEXT),
    "max_tokens": _honoured(LENGTH),
    "max_completion_tokens": _honoured(LENGTH),
    "stop": _honoured(Either((STRING, LIST))),
    "stream": _honoured(FLAG),
    "stream_options": _honoured(OBJECT),
    "temperature": _honoured(Number(0)),
    "top_p": _honoured(Number(0, 1)),
    "top_k": _honoured(Number(0, whole=True)),
    "min_p": _honoured(Number(0, 1)),
    "xtc_probability": _honoured(Number(0, 1)),
    # Beyond, mlx-lm's sampler fails.
    "xtc_threshold": _honoured(Number(0, 0.5)),
    # Smaller numbers make float16 overflow.
    "repetition_penalty": _honoured(Number(0.01, also=(0,))),
    "repetition_context_size": _honoured(WINDOW),
    "presence_penalty": _honoured(PENALTY),
    "presence_context_size": _honoured(WINDOW),
    "frequency_penalty": _honoured(PENALTY),
    "frequency_context_size": _honoured(WINDOW),
    "logit_bias": _honoured(OBJECT),
    "seed": _honoured(Number(-math.inf, math.inf, whole=True)),
    "logprobs": _honoured(Either((FLAG, Number(0, MAX_ALTERNATIVES, whole=True)))),
    "top_logprobs": _honoured(Number(0, MAX_ALTERNATIVES, whole=True)),
    "tools": _honoured(LIST, CHAT),
    "tool_choice": _honoured(Either((STRING, OBJECT)), CHAT),
    "parallel_tool_calls": _honoured(FLAG, CHAT),
    "chat_template_kwargs": _honoured(OBJECT, CHAT),
    "n": _refused(1),
    "best_of": _refused(1),
    "echo": _refused(False),
    "suffix": _refused(""),
    "response_format": _refused({"type": "text"}),
    "functions": _refused([]),
    "function_call": _refused("none", "auto"),
    "modalities": _refused(["text"]),
    "audio": _refused(),
    "web_search_options": _refused(),
    "moderation": _refused(),
    "reasoning_effort": _refused(),
    "verbosity": _refused("medium"),
    "adapters": _refused(),
    "draft_model": _refused(),
    "role_mapping": _refused({}),
    "stop_token_ids": _refused([]),
    "ignore_eos": _refused(False),
    "min_tokens": _refused(0),
    "model": ACCEPTED,
    "metadata": ACCEPTED,
    "num_draft_tokens": ACCEPTED,
    "prediction": ACCEPTED,
    "prompt_cache_key": ACCEPTED,
    "prompt_cache_options": ACCEPTED,
    "prompt_cache_retention": ACCEPTED,
    "safety_identifier": ACCEPTED,
    "service_tier": ACCEPTED,
    "store": ACCEPTED,
    "user": ACCEPTED,
}


def check_fields(body: dict[str, Any], endpoint: str) -> tuple[dict[str, Any], list[str]]:
    """Check a body's fields by the table.

    Returns:
        The fields that are honoured, and the names that are not in the table.

    Raises:
        Refused: 400, with the field's name.
    """
    honoured, unknown = {}, []
    for name, value in body.items():
        field = FIELDS.get(name)
        if field is None:
            unknown.append(name)
        elif field.endpoint not in (None, endpoint):
            text = f"{name} is a parameter of {field.endpoint}, not of {endpoint}"
            raise Refused(400, text, "unsupported_parameter", name)
        elif field.use == "refused" and not _is_one_of(value, field.harmless):
            text = f"{name} is not supported"
            raise Refused(400, text, "unsupported_parameter", name)
        elif field.use == "honoured":
            if field.values is not None and not field.values.allow(value):
                raise Refused(400, f"{name} must be {field.values}", "invalid_type", name)
            honoured[name] = value
    return honoured, unknown


def _is_one_of(value: Any, values: Iterable[Any]) -> bool:
    """Whether one of the values is equal to a value, and of its type: in Python, True is 1."""
    return any(type(value) is type(other) and value == other for other in values)
