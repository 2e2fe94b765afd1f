"""The one table of a request's fields: what becomes of each, and which values it can have."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from outlier_mlx.serve.access import Refused

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
# MLX converts numbers to 32 bits.
MAX_NUMBER = (1 << 31) - 1


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


@dataclass(frozen=True)
class OneOf:
    """A few texts."""

    texts: tuple[str, ...]

    def allow(self, value: object) -> bool:
        """Whether this is one of them."""
        return isinstance(value, str) and value in self.texts

    def __str__(self) -> str:
        return " or ".join(f'"{text}"' for text in self.texts)


FLAG = Kind((bool,), "true or false")
STRING = Kind((str,), "a string")
LIST = Kind((list,), "a list")
OBJECT = Kind((dict,), "an object")
# Clients send their own default for the number of tokens, so a large one is no error.
LENGTH = Number(1, math.inf, whole=True)
PENALTY = Number()
WINDOW = Number(0, whole=True)
ALTERNATIVES = Number(0, 20, whole=True)
TOOL_CHOICE = Either((OneOf(("auto", "none", "required")), OBJECT))
EFFORT = OneOf(("none", "minimal", "low", "medium", "high", "xhigh", "max"))


@dataclass(frozen=True)
class Field:
    """What becomes of a field.

    Attributes:
        use: "honoured": it changes the response as it says; "refused": it would change the
            response, and this server cannot do that; "accepted": it changes no response.
        values: values of an honoured field; other fields can have any.
        harmless: values of a refused field that mean the same as leaving it out.
        endpoint: the only endpoint that has the field; None: both have it.
    """

    use: Literal["honoured", "refused", "accepted"]
    values: Values | None = None
    harmless: tuple[Any, ...] = ()
    endpoint: str | None = None


def honoured(values: Values, endpoint: str | None = None) -> Field:
    """A field that changes the response as it says."""
    return Field("honoured", values, endpoint=endpoint)


def refused(*harmless: Any) -> Field:
    """A field that would change the response, unless it has one of some values."""
    return Field("refused", harmless=harmless)


#: A field that changes no response.
ACCEPTED = Field("accepted")

FIELDS: dict[str, Field] = {
    "messages": honoured(LIST, CHAT),
    "prompt": honoured(Either((STRING, LIST)), TEXT),
    "max_tokens": honoured(LENGTH),
    "max_completion_tokens": honoured(LENGTH),
    "stop": honoured(Either((STRING, LIST))),
    "stream": honoured(FLAG),
    "stream_options": honoured(OBJECT),
    "temperature": honoured(Number(0)),
    "top_p": honoured(Number(0, 1)),
    "top_k": honoured(Number(0, whole=True)),
    "min_p": honoured(Number(0, 1)),
    "xtc_probability": honoured(Number(0, 1)),
    "xtc_threshold": honoured(Number(0, 0.5)),  # mlx-lm's sampler fails for more
    "repetition_penalty": honoured(Number(0.01, also=(0,))),  # less overflows in float16
    "repetition_context_size": honoured(WINDOW),
    "presence_penalty": honoured(PENALTY),
    "presence_context_size": honoured(WINDOW),
    "frequency_penalty": honoured(PENALTY),
    "frequency_context_size": honoured(WINDOW),
    "logit_bias": honoured(OBJECT),
    "seed": honoured(Number(-math.inf, math.inf, whole=True)),
    "logprobs": honoured(Either((FLAG, ALTERNATIVES))),
    "top_logprobs": honoured(ALTERNATIVES),
    "tools": honoured(LIST, CHAT),
    "tool_choice": honoured(TOOL_CHOICE, CHAT),
    "response_format": honoured(OBJECT),
    "guided_json": honoured(OBJECT),
    "json_schema": honoured(OBJECT),
    "parallel_tool_calls": honoured(FLAG, CHAT),
    "reasoning_effort": honoured(EFFORT, CHAT),
    "chat_template_kwargs": honoured(OBJECT, CHAT),
    "outlier": honoured(OBJECT, CHAT),
    # Of OpenAI's API.
    "audio": refused(),
    "best_of": refused(1),
    "echo": refused(False),
    "function_call": refused("none", "auto"),
    "functions": refused([]),
    "modalities": refused(["text"]),
    "moderation": refused(),
    "n": refused(1),
    "suffix": refused(""),
    "verbosity": refused("medium"),
    "web_search_options": refused(),
    # Of other servers.
    "adapters": refused(),
    "add_generation_prompt": refused(True),
    "add_special_tokens": refused(True),
    "allowed_token_ids": refused(),
    "bad_words": refused([]),
    "chat_template": refused(),
    "continue_final_message": refused(False),
    "documents": refused([]),
    "draft_model": refused(),
    "grammar": refused(""),
    "guided_choice": refused(),
    "guided_grammar": refused(),
    "guided_regex": refused(),
    "ignore_eos": refused(False),
    "include_stop_str_in_output": refused(False),
    "length_penalty": refused(1),
    "min_tokens": refused(0),
    "mirostat": refused(0),
    "repeat_penalty": refused(1),
    "role_mapping": refused(),
    "skip_special_tokens": refused(True),
    "stop_token_ids": refused([]),
    "structured_outputs": refused(),
    "typical_p": refused(1),
    "use_beam_search": refused(False),
    "metadata": ACCEPTED,
    "model": ACCEPTED,
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

STREAM_OPTIONS: dict[str, Field] = {
    "include_usage": honoured(FLAG),
    "include_obfuscation": ACCEPTED,
}
# Of this server alone.
OUTLIER_FIELDS: dict[str, Field] = {"experts": honoured(FLAG)}
# Of each message. Those that are honoured are given to the chat template.
MESSAGE_FIELDS: dict[str, Field] = {
    "role": honoured(STRING),
    "content": honoured(Either((STRING, LIST))),
    "name": honoured(STRING),
    "tool_calls": honoured(LIST),
    "tool_call_id": honoured(STRING),
    "reasoning": honoured(STRING),
    "reasoning_content": honoured(STRING),
    "thinking": honoured(STRING),
    "audio": refused(),
    "function_call": refused(),
    "refusal": refused(""),
    "annotations": ACCEPTED,
}


def check_fields(
    given: dict[str, Any],
    table: dict[str, Field],
    unused: list[str],
    place: str = "",
    endpoint: str | None = None,
) -> dict[str, Any]:
    """The fields that are honoured, checked by a table. One that is null is as if left out.

    Args:
        given: the fields.
        table: the fields that there can be.
        unused: gets the names that are not in the table, such as "messages.color".
        place: where the fields are, such as "messages[0]"; empty for those of a body.
        endpoint: the endpoint of the request, if that matters.

    Raises:
        Refused: 400, with the field's name.
    """
    honoured = {}
    for name, value in given.items():
        named = f"{place}.{name}" if place else name
        field = table.get(name)
        if value is None:
            continue
        if field is None:
            unused.append(re.sub(r"\[\d+\]", "", place) + "." * bool(place) + name)
        elif field.endpoint not in (None, endpoint):
            text = f"is a parameter of {field.endpoint}, not of {endpoint}"
            raise wrong(named, text, "unsupported_parameter")
        elif field.use == "refused" and not _is_one_of(value, field.harmless):
            raise wrong(named, "is not supported", "unsupported_parameter")
        elif field.use == "honoured":
            if field.values is not None and not field.values.allow(value):
                raise wrong(named, f"must be {field.values}", "invalid_value")
            honoured[name] = value
    return honoured


def wrong(where: str, text: str, code: str = "unsupported_value") -> Refused:
    """The refusal of what is at a place in a body; the text goes on after the place."""
    return Refused(400, f"{where} {text}", code, re.split(r"[.\[]", where, maxsplit=1)[0])


def typed(kind: object) -> str:
    """What is said of the type that an object in a body has, or has not."""
    return f"of the type {str(kind)[:40]!r}" if kind is not None else "without a type"


def _is_one_of(value: Any, values: Iterable[Any]) -> bool:
    """Whether a value equals one of the values. In Python, True equals 1; here, it does not."""
    return any(isinstance(v, bool) is isinstance(value, bool) and v == value for v in values)
