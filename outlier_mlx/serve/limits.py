"""Checks of request bodies and parameters that mlx-lm's server does not make."""

import json
import math
from dataclasses import dataclass
from typing import Any

from outlier_mlx.serve.access import Refused

# MLX converts numbers to 32 bits.
MAX_NUMBER = 1 << 31
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_ALTERNATIVES = 20
# Parameters that are not supported, with the values that mean the same as leaving them out.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "adapters": (),
    "draft_model": (),
}
# Two names of the largest number of tokens in a response; mlx-lm prefers the first.
LENGTHS = ("max_completion_tokens", "max_tokens")
NUMBERS = (
    *LENGTHS,
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "xtc_probability",
    "xtc_threshold",
    "repetition_penalty",
    "repetition_context_size",
    "presence_penalty",
    "presence_context_size",
    "frequency_penalty",
    "frequency_context_size",
    "top_logprobs",
    "seed",
)


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body, without its null members.

    Raises:
        Refused: the body is not a JSON object.
    """
    try:
        body = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) if not isinstance(error, RecursionError) else "nested too deeply"
        raise Refused(400, f"the body is not JSON: {reason}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    return {name: value for name, value in body.items() if value is not None}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


@dataclass(frozen=True)
class Limits:
    """Limits for the parameters of a request.

    Attributes:
        max_tokens: largest number of tokens in a response.
        vocab: width of the logits.
        context: largest number of tokens in prompt and response together; None: no limit.
        template_names: parameters of `apply_chat_template`, which a client must not set.
    """

    max_tokens: int
    vocab: int
    context: int | None = None
    template_names: frozenset[str] = frozenset()

    def check(self, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        """Convert a request's parameters to those that mlx-lm expects; cap the tokens to generate.

        mlx-lm checks most types itself. This refuses values that would make its generation fail,
        and parameters that it would ignore without an error.

        Raises:
            Refused: 400, with the parameter's name.
        """
        body = dict(body)
        for name, harmless in UNSUPPORTED.items():
            if name in body and body.pop(name) not in harmless:
                raise Refused(400, f"{name} is not supported", "unsupported_parameter")
        for name in NUMBERS:
            value = body.get(name)
            if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
                raise Refused(400, f"{name} must be a number")
            # Clients send their own default for max_tokens, so a larger number is no error.
            if name in LENGTHS and isinstance(value, int):
                body[name] = value = min(value, self.max_tokens)
            if isinstance(value, int | float) and name != "seed" and abs(value) > MAX_NUMBER:
                raise Refused(400, f"{name} is too large")
        self._check_sampling(body)
        _check_stop(body)
        if chat:
            _check_messages(body.get("messages"))
            self._check_template(body)
        else:
            _check_prompt(body)
            _unify_logprobs(body)
        self._check_alternatives(body)
        options = body.get("stream_options", {})
        if not isinstance(options, dict):
            raise Refused(400, "stream_options must be an object")
        body["stream_options"] = {"include_usage": bool(options.get("include_usage"))}
        return body

    def _check_sampling(self, body: dict[str, Any]) -> None:
        """Check values of the right type that would make mlx-lm's sampler fail during a batch."""
        if isinstance(body.get("top_k"), int) and body["top_k"] >= self.vocab:
            body["top_k"] = 0  # 0: all tokens
        for name in ("xtc_probability", "xtc_threshold"):
            if name in body and isinstance(body[name], int | float):
                body[name] = float(body[name])
        if isinstance(body.get("xtc_threshold"), float) and body["xtc_threshold"] > 0.5:
            raise Refused(400, "xtc_threshold must be at most 0.5")
        penalty = body.get("repetition_penalty", 0.0)
        if isinstance(penalty, int | float) and 0 < penalty < 0.01:
            raise Refused(400, "repetition_penalty must be 0 (off) or at least 0.01")
        if isinstance(body.get("seed"), int):
            body["seed"] %= 1 << 64
        bias = body.get("logit_bias", {})
        if not isinstance(bias, dict):
            raise Refused(400, "logit_bias must be an object")
        for token, value in bias.items():
            # MLX does not check the index: a token beyond the logits would overwrite other memory.
            digits = token.isascii() and token.isdigit() and len(token) < 10
            if not digits or int(token) >= self.vocab:
                raise Refused(400, f"logit_bias: {token[:20]!r} is not a token of this model")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not -100 <= value <= 100:
                raise Refused(400, "logit_bias must be between -100 and 100")

    def _check_alternatives(self, body: dict[str, Any]) -> None:
        """Check the number of alternatives to each token; mlx-lm allows at most 11."""
        wanted = body.get("top_logprobs", 0)
        if not isinstance(wanted, int) or not 0 <= wanted <= MAX_ALTERNATIVES:
            raise Refused(400, f"top_logprobs must be between 0 and {MAX_ALTERNATIVES}")
        body["top_logprobs"] = min(wanted, self.vocab)

    def _check_template(self, body: dict[str, Any]) -> None:
        kwargs = body.get("chat_template_kwargs", {})
        if not isinstance(kwargs, dict):
            raise Refused(400, "chat_template_kwargs must be an object")
        for name, value in kwargs.items():
            if name in self.template_names or not isinstance(value, bool | int | float | str):
                raise Refused(400, f"chat_template_kwargs: {name[:40]!r} is not supported")


def _check_stop(body: dict[str, Any]) -> None:
    stop = body.get("stop", [])
    strings = [stop] if isinstance(stop, str) else stop
    fits = isinstance(strings, list) and len(strings) <= MAX_STOP_STRINGS
    if not fits or not all(isinstance(s, str) and len(s) <= MAX_STOP_LENGTH for s in strings):
        raise Refused(
            400,
            f"stop must be up to {MAX_STOP_STRINGS} strings of up to {MAX_STOP_LENGTH} characters",
        )
    # Clients send an empty string for no stop word.
    body["stop"] = [string for string in strings if string]


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list that is not empty")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, "each message must be an object with a role")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(map(_is_text, content)):
            # mlx-lm would download an image from any URL.
            raise Refused(400, "a message's content must be text", "unsupported_content")


def _is_text(part: object) -> bool:
    if not isinstance(part, dict) or part.get("type") != "text":
        return False
    return isinstance(part.get("text"), str)


def _check_prompt(body: dict[str, Any]) -> None:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refused(400, "prompt must be one string that is not empty")
    body["prompt"] = prompt


def _unify_logprobs(body: dict[str, Any]) -> None:
    """Convert `logprobs` of `/v1/completions`, a number of alternatives, to those of chat."""
    alternatives = body.get("logprobs")
    if isinstance(alternatives, int) and not isinstance(alternatives, bool):
        body["logprobs"] = True
        body["top_logprobs"] = alternatives
