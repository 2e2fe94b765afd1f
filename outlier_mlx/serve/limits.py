"""The body of a request, in OpenAI's API, as a checked `Request`."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.fields import CHAT, TEXT, Number, check_fields
from outlier_mlx.serve.request import Request, Sampling
from outlier_mlx.storage.texts import decode_json

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
BIAS = Number(-100, 100)


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body, without its null members.

    Raises:
        Refused: the body is not a JSON object.
    """
    try:
        body = decode_json(raw)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    return {name: value for name, value in body.items() if value is not None}


@dataclass(frozen=True)
class Limits:
    """Limits for the parameters of a request, and their defaults.

    Attributes:
        max_tokens: largest number of tokens in a response.
        vocab: width of the logits.
        context: largest number of tokens in prompt and response together; None: no limit.
        template_names: parameters of `apply_chat_template`, which a client must not set.
        sampling: how tokens are chosen if the request does not say.
    """

    max_tokens: int
    vocab: int
    context: int | None = None
    template_names: frozenset[str] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)

    def request(self, body: dict[str, Any], *, chat: bool) -> Request:
        """The request in a body of OpenAI's API.

        Raises:
            Refused: 400, with the parameter's name.
        """
        body, _ = check_fields(body, CHAT if chat else TEXT)
        options = body.get("stream_options", {})
        length = body.get("max_completion_tokens", body.get("max_tokens", 0))
        return Request(
            prompt="" if chat else _prompt(body.get("prompt")),
            messages=_messages(body.get("messages")) if chat else None,
            tools=body.get("tools", []),
            parallel_calls=body.get("parallel_tool_calls", True),
            template=self._template(body.get("chat_template_kwargs", {})),
            stop=_stop(body.get("stop", [])),
            max_tokens=min(length or self.max_tokens, self.max_tokens),
            asked_tokens=length,
            sampling=self._sampling(body),
            seed=body["seed"] % (1 << 64) if "seed" in body else None,
            alternatives=self._alternatives(body),
            stream=body.get("stream", False),
            include_usage=bool(options.get("include_usage")),
        )

    def _alternatives(self, body: dict[str, Any]) -> int | None:
        """The number of alternatives: in `/v1/completions`, `logprobs` may be that number."""
        logprobs, alternatives = body.get("logprobs", False), body.get("top_logprobs", 0)
        if not isinstance(logprobs, bool):
            return min(logprobs, self.vocab)
        return min(alternatives, self.vocab) if logprobs or alternatives else None

    def _sampling(self, body: dict[str, Any]) -> Sampling:
        names = {known.name for known in fields(Sampling)}
        given = {name: value for name, value in body.items() if name in names}
        sampling = replace(self.sampling, **given)
        # 0: all tokens. mlx-lm's sampler fails for as many as there are.
        top_k = sampling.top_k if sampling.top_k < self.vocab else 0
        return replace(sampling, top_k=top_k, logit_bias=self._bias(sampling.logit_bias))

    def _bias(self, bias: dict[Any, Any]) -> dict[int, float]:
        for token, value in bias.items():
            # MLX does not check the index: a token beyond the logits would overwrite other memory.
            digits = token.isascii() and token.isdigit() and len(token) < 10
            if not digits or int(token) >= self.vocab:
                text = f"logit_bias: {token[:20]!r} is not a token of this model"
                raise Refused(400, text, None, "logit_bias")
            if not BIAS.allow(value):
                raise Refused(400, f"logit_bias must be {BIAS}", None, "logit_bias")
        return {int(token): float(value) for token, value in bias.items()}

    def _template(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        for name, value in kwargs.items():
            if name in self.template_names or not isinstance(value, bool | int | float | str):
                text = f"chat_template_kwargs: {name[:40]!r} is not supported"
                raise Refused(400, text, "unsupported_parameter", "chat_template_kwargs")
        return kwargs


def _stop(stop: Any) -> list[str]:
    strings = [stop] if isinstance(stop, str) else stop
    fits = len(strings) <= MAX_STOP_STRINGS
    if not fits or not all(isinstance(s, str) and len(s) <= MAX_STOP_LENGTH for s in strings):
        raise Refused(
            400,
            f"stop must be up to {MAX_STOP_STRINGS} strings of up to {MAX_STOP_LENGTH} characters",
            None,
            "stop",
        )
    # Clients send an empty string for no stop word.
    return [string for string in strings if string]


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not messages:
        raise Refused(400, "messages must be a list that is not empty", None, "messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, "each message must be an object with a role", None, "messages")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(map(_is_text, content)):
            text = "a message's content must be text"
            raise Refused(400, text, "unsupported_content", "messages")
    return messages


def _is_text(part: object) -> bool:
    if not isinstance(part, dict) or part.get("type") != "text":
        return False
    return isinstance(part.get("text"), str)


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refused(400, "prompt must be one string that is not empty", None, "prompt")
    return prompt
