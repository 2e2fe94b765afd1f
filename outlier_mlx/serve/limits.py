"""The body of a request, in OpenAI's API, as a checked `Request`."""

from dataclasses import dataclass, fields, replace
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.fields import CHAT, FIELDS, STREAM_OPTIONS, TEXT, Number, check_fields
from outlier_mlx.serve.messages import MessageReader
from outlier_mlx.serve.request import Request, Sampling
from outlier_mlx.storage.texts import decode_json

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_PROMPTS = 128
BIAS = Number(-100, 100)


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        Refused: the body is not a JSON object.
    """
    try:
        body = decode_json(raw)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    return body


@dataclass(frozen=True)
class Limits:
    """Limits for the parameters of a request, and their defaults.

    Attributes:
        max_tokens: largest number of tokens in a response.
        vocab: width of the logits.
        context: largest number of tokens in prompt and response together; None: no limit.
        template_names: parameters of `apply_chat_template`, which a client must not set.
        sampling: how tokens are chosen if the request does not say.
        reader: reads messages and tools.
    """

    max_tokens: int
    vocab: int
    context: int | None
    template_names: frozenset[str]
    sampling: Sampling
    reader: MessageReader

    def requests(self, body: dict[str, Any], *, chat: bool) -> list[Request]:
        """The requests in a body of OpenAI's API: one for each prompt.

        Raises:
            Refused: 400, with the parameter's name.
        """
        body, unused = check_fields(body, FIELDS, endpoint=CHAT if chat else TEXT)
        options = body.get("stream_options", {})
        options, unknown = check_fields(options, STREAM_OPTIONS, "stream_options")
        unused += unknown
        conversation: dict[str, Any] = {}
        if chat:
            conversation, unknown = self._conversation(body)
            unused += unknown
        length = body.get("max_completion_tokens", body.get("max_tokens", 0))
        request = Request(
            **conversation,
            stop=_stop(body.get("stop", [])),
            max_tokens=min(length or self.max_tokens, self.max_tokens),
            asked_tokens=length,
            sampling=self._sampling(body),
            seed=body["seed"] % (1 << 64) if "seed" in body else None,
            alternatives=self._alternatives(body, chat=chat),
            stream=body.get("stream", False),
            include_usage=options.get("include_usage", False),
            unused=tuple(dict.fromkeys(unused)),
        )
        prompts = [""] if chat else _prompts(body.get("prompt"))
        return [replace(request, prompt=prompt) for prompt in prompts]

    def _conversation(self, body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What only chat has, and the names of fields that have no effect."""
        tools = self.reader.tools(body.get("tools", []))
        messages, unused = self.reader.messages(body.get("messages", []))
        template = body.get("chat_template_kwargs", {})
        for name, value in template.items():
            if name in self.template_names or not isinstance(value, bool | int | float | str):
                text = f"chat_template_kwargs: {name[:40]!r} is not supported"
                raise Refused(400, text, "unsupported_parameter", "chat_template_kwargs")
            if not self.reader.probes.mentions(name):
                unused.append(f"chat_template_kwargs.{name}")
        conversation = {
            "messages": messages,
            "tools": [] if body.get("tool_choice") == "none" else tools,
            "parallel_calls": body.get("parallel_tool_calls", True),
            "template": template,
        }
        return conversation, unused

    def _alternatives(self, body: dict[str, Any], *, chat: bool) -> int | None:
        """The number of alternatives: in `/v1/completions`, `logprobs` may be that number."""
        logprobs, alternatives = body.get("logprobs", False), body.get("top_logprobs", 0)
        if not isinstance(logprobs, bool):
            if chat:
                text = "logprobs must be true or false; top_logprobs is the number of alternatives"
                raise Refused(400, text, "invalid_value", "logprobs")
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


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts in one text, the tokens of one, or a list of these.

    Whether the model has the tokens is checked with all others.
    """
    prompts = prompt if isinstance(prompt, list) and not _are_tokens(prompt) else [prompt]
    if not prompts or not all(prompts):
        raise Refused(400, "prompt must not be empty", None, "prompt")
    if len(prompts) > MAX_PROMPTS:
        raise Refused(400, f"prompt must be at most {MAX_PROMPTS} prompts", None, "prompt")
    for one in prompts:
        if not isinstance(one, str) and not (isinstance(one, list) and _are_tokens(one)):
            text = "prompt must be a text, a list of tokens, or a list of these"
            raise Refused(400, text, "invalid_type", "prompt")
    return prompts


def _are_tokens(prompt: list[Any]) -> bool:
    return bool(prompt) and all(type(token) is int for token in prompt)
