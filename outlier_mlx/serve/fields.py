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


def _honoured(values: Values, endpoint: str | None = None) -> Field:
    return Field("honoured", values, endpoint=endpoint)


def _refused(*harmless: Any) -> Field:
    return Field("refused", harmless=harmless)


_ACCEPTED = Field("accepted")

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
    "xtc_threshold": _honoured(Number(0, 0.5)),  # mlx-lm's sampler fails for more
    "repetition_penalty": _honoured(Number(0.01, also=(0,))),  # less overflows in float16
    "repetition_context_size": _honoured(WINDOW),
    "presence_penalty": _honoured(PENALTY),
    "presence_context_size": _honoured(WINDOW),
    "frequency_penalty": _honoured(PENALTY),
    "frequency_context_size": _honoured(WINDOW),
    "logit_bias": _honoured(OBJECT),
    "seed": _honoured(Number(-math.inf, math.inf, whole=True)),
    "logprobs": _honoured(Either((FLAG, ALTERNATIVES))),
    "top_logprobs": _honoured(ALTERNATIVES),
    "tools": _honoured(LIST, CHAT),
    "tool_choice": _honoured(OneOf(("auto", "none")), CHAT),
    "parallel_tool_calls": _honoured(FLAG, CHAT),
    "chat_template_kwargs": _honoured(OBJECT, CHAT),
    # Of OpenAI's API.
    "audio": _refused(),
    "best_of": _refused(1),
    "echo": _refused(False),
    "function_call": _refused("none", "auto"),
    "functions": _refused([]),
    "modalities": _refused(["text"]),
    "moderation": _refused(),
    "n": _refused(1),
    "reasoning_effort": _refused(),
    "response_format": _refused({"type": "text"}),
    "suffix": _refused(""),
    "verbosity": _refused("medium"),
    "web_search_options": _refused(),
    # Of other servers.
    "adapters": _refused(),
    "add_generation_prompt": _refused(True),
    "add_special_tokens": _refused(True),
    "allowed_token_ids": _refused(),
    "bad_words": _refused([]),
    "chat_template": _refused(),
    "continue_final_message": _refused(False),
    "documents": _refused([]),
    "draft_model": _refused(),
    "grammar": _refused(""),
    "guided_choice": _refused(),
    "guided_grammar": _refused(),
    "guided_json": _refused(),
    "guided_regex": _refused(),
    "ignore_eos": _refused(False),
    "include_stop_str_in_output": _refused(False),
    "json_schema": _refused(),
    "length_penalty": _refused(1),
    "min_tokens": _refused(0),
    "mirostat": _refused(0),
    "repeat_penalty": _refused(1),
    "role_mapping": _refused(),
    "skip_special_tokens": _refused(True),
    "stop_token_ids": _refused([]),
    "structured_outputs": _refused(),
    "typical_p": _refused(1),
    "use_beam_search": _refused(False),
    "metadata": _ACCEPTED,
    "model": _ACCEPTED,
    "num_draft_tokens": _ACCEPTED,
    "prediction": _ACCEPTED,
    "prompt_cache_key": _ACCEPTED,
    "prompt_cache_options": _ACCEPTED,
    "prompt_cache_retention": _ACCEPTED,
    "safety_identifier": _ACCEPTED,
    "service_tier": _ACCEPTED,
    "store": _ACCEPTED,
    "user": _ACCEPTED,
}

STREAM_OPTIONS: dict[str, Field] = {
    "include_usage": _honoured(FLAG),
    "include_obfuscation": _ACCEPTED,
}
# Of each message. Those that are honoured are given to the chat template.
MESSAGE_FIELDS: dict[str, Field] = {
    "role": _honoured(STRING),
    "content": _honoured(Either((STRING, LIST))),
    "name": _honoured(STRING),
    "tool_calls": _honoured(LIST),
    "tool_call_id": _honoured(STRING),
    "reasoning": _honoured(STRING),
    "reasoning_content": _honoured(STRING),
    "thinking": _honoured(STRING),
    "audio": _refused(),
    "function_call": _refused(),
    "refusal": _refused(""),
    "annotations": _ACCEPTED,
}


def check_fields(
    given: dict[str, Any], table: dict[str, Field], place: str = "", endpoint: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Check fields by a table. A field that is null is as if left out.

    Args:
        given: the fields.
        table: the fields that there can be.
        place: where the fields are, such as "messages[0]"; empty for those of a body.
        endpoint: the endpoint of the request, if that matters.

    Returns:
        The fields that are honoured, and the names that are not in the table, such as
        "messages.color".

    Raises:
        Refused: 400, with the field's name.
    """
    honoured, unknown = {}, []
    for name, value in given.items():
        named = f"{place}.{name}" if place else name
        param = re.split(r"[.\[]", named)[0]
        field = table.get(name)
        if value is None:
            continue
        if field is None:
            unknown.append(re.sub(r"\[\d+\]", "", place) + "." * bool(place) + name)
        elif field.endpoint not in (None, endpoint):
            text = f"{named} is a parameter of {field.endpoint}, not of {endpoint}"
            raise Refused(400, text, "unsupported_parameter", param)
        elif field.use == "refused" and not _is_one_of(value, field.harmless):
            raise Refused(400, f"{named} is not supported", "unsupported_parameter", param)
        elif field.use == "honoured":
            if field.values is not None and not field.values.allow(value):
                raise Refused(400, f"{named} must be {field.values}", "invalid_value", param)
            honoured[name] = value
    return honoured, unknown


def _is_one_of(value: Any, values: Iterable[Any]) -> bool:
    """Whether a value equals one of the values. In Python, True equals 1; here, it does not."""
    return any(isinstance(v, bool) is isinstance(value, bool) and v == value for v in values)
