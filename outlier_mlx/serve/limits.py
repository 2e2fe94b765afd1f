"""What may be asked: bodies and parameters that mlx-lm's server does not check itself."""

import json
import math
from dataclasses import dataclass
from typing import Any

from outlier_mlx.serve.access import Refused

# MLX takes numbers as 32-bit ones.
LARGEST = 1 << 31
STOP_WORDS = 16
STOP_LENGTH = 256
# Parameters that would change the answer if they were heeded, with the values that change nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "adapters": (),
    "draft_model": (),
}
NUMBERS = (
    "max_tokens",
    "max_completion_tokens",
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
    """The JSON object in a body, without the members that are null.

    Raises:
        Refused: it is none.
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
    """What a request may ask of the model.

    Attributes:
        max_tokens: tokens that an answer may have.
        vocab: width of the logits.
        context: tokens that prompt and answer may have together; None: any number.
        template_names: arguments of the chat template's renderer, which are not a client's.
    """

    max_tokens: int
    vocab: int
    context: int | None = None
    template_names: frozenset[str] = frozenset()

    def check(self, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        """Bring a request's parameters to the form that mlx-lm takes.

        mlx-lm checks the types of most; here is refused what it would trip over while generating,
        or pass over in silence.

        Raises:
            Refused: 400, with the parameter's name.
        """
        body = dict(body)
        for name, harmless in UNSERVED.items():
            if name in body and body.pop(name) not in harmless:
                raise Refused(400, f"{name} is not served here", "unsupported_parameter")
        for name in NUMBERS:
            value = body.get(name)
            if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
                raise Refused(400, f"{name} must be a number")
            if isinstance(value, int | float) and name != "seed" and abs(value) > LARGEST:
                raise Refused(400, f"{name} is too large")
        for name in ("max_tokens", "max_completion_tokens"):
            asked = body.get(name, 0)
            if isinstance(asked, int) and asked > self.max_tokens:
                raise Refused(
                    400,
                    f"{name} is {asked}; this server allows {self.max_tokens} (--max-tokens)",
                    "max_tokens",
                )
        self._check_sampling(body)
        _check_stop(body)
        if chat:
            _check_messages(body.get("messages"))
            self._check_template(body)
        else:
            _check_prompt(body)
            _unify_logprobs(body)
        options = body.get("stream_options", {})
        if not isinstance(options, dict):
            raise Refused(400, "stream_options must be an object")
        body["stream_options"] = {"include_usage": bool(options.get("include_usage"))}
        return body

    def _check_sampling(self, body: dict[str, Any]) -> None:
        """Values of the right type that stop mlx-lm's sampler in the middle of a batch."""
        if isinstance(body.get("top_k"), int) and body["top_k"] >= self.vocab:
            body["top_k"] = 0  # all of them
        for name in ("xtc_probability", "xtc_threshold"):
            if name in body and isinstance(body[name], int | float):
                body[name] = float(body[name])
        if isinstance(body.get("xtc_threshold"), float) and body["xtc_threshold"] > 0.5:
            raise Refused(400, "xtc_threshold must be at most 0.5")
        penalty = body.get("repetition_penalty", 0.0)
        if isinstance(penalty, int | float) and 0 < penalty < 0.01:
            raise Refused(400, "repetition_penalty must be 0, which is none, or at least 0.01")
        if isinstance(body.get("seed"), int):
            body["seed"] %= 1 << 64
        bias = body.get("logit_bias", {})
        if not isinstance(bias, dict):
            raise Refused(400, "logit_bias must be an object")
        for token, value in bias.items():
            # A token beyond the logits would be written beyond the array.
            digits = token.isascii() and token.isdigit() and len(token) < 10
            if not digits or int(token) >= self.vocab:
                raise Refused(400, f"logit_bias: {token[:20]!r} is not a token of this model")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not -100 <= value <= 100:
                raise Refused(400, "logit_bias must be between -100 and 100")

    def _check_template(self, body: dict[str, Any]) -> None:
        kwargs = body.get("chat_template_kwargs", {})
        if not isinstance(kwargs, dict):
            raise Refused(400, "chat_template_kwargs must be an object")
        for name, value in kwargs.items():
            if name in self.template_names or not isinstance(value, bool | int | float | str):
                raise Refused(400, f"chat_template_kwargs: {name[:40]!r} is not a template's")


def _check_stop(body: dict[str, Any]) -> None:
    stop = body.get("stop", [])
    words = [stop] if isinstance(stop, str) else stop
    fits = isinstance(words, list) and len(words) <= STOP_WORDS
    if not fits or not all(isinstance(w, str) and 0 < len(w) <= STOP_LENGTH for w in words):
        raise Refused(
            400, f"stop must be up to {STOP_WORDS} strings of 1 to {STOP_LENGTH} characters"
        )
    body["stop"] = words


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list, and not empty")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, "each message must be an object with a role")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(map(_is_text, content)):
            # mlx-lm would fetch whatever an image's URL names.
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
        raise Refused(400, "prompt must be one string, and not empty")
    body["prompt"] = prompt


def _unify_logprobs(body: dict[str, Any]) -> None:
    """For completions, logprobs is how many alternatives are wanted."""
    wanted = body.get("logprobs")
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        body["logprobs"] = True
        body["top_logprobs"] = wanted
