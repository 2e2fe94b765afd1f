"""Limits for what requests say, whatever API they come through."""

from dataclasses import dataclass, fields, replace
from typing import Any

from outlier_mlx.engine.constraint import Grammars
from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.fields import Number
from outlier_mlx.serve.messages import MessageReader
from outlier_mlx.serve.request import Sampling
from outlier_mlx.storage.texts import decode_json

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_VARIABLES = 64
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
        grammars: makes the constraints of answers.
        has_experts: whether the model has routed experts, so that a request can ask for them.
    """

    max_tokens: int
    vocab: int
    context: int | None
    template_names: frozenset[str]
    sampling: Sampling
    reader: MessageReader
    grammars: Grammars
    has_experts: bool = False

    def template_variables(self, given: dict[str, Any], unused: list[str]) -> dict[str, Any]:
        """Variables of the chat template that a client may set; `unused` gets those of no effect.

        Raises:
            Refused: 400.
        """
        if len(given) > MAX_VARIABLES:
            text = f"chat_template_kwargs must be at most {MAX_VARIABLES} variables"
            raise Refused(400, text, "invalid_value", "chat_template_kwargs")
        for name, value in given.items():
            if name in self.template_names or not isinstance(value, bool | int | float | str):
                text = f"chat_template_kwargs: {name[:40]!r} is not supported"
                raise Refused(400, text, "unsupported_parameter", "chat_template_kwargs")
            if not self.reader.probes.mentions(name):
                unused.append(f"chat_template_kwargs.{name}")
        return given

    def effort(self, effort: str | None, name: str, unused: list[str]) -> dict[str, Any]:
        """Variables by which the chat template sets how long the model reasons.

        Args:
            effort: the effort; None: as the template has it.
            name: the field that says it.
            unused: gets the field's name if the template has no such variables.
        """
        if effort is None:
            return {}
        variables: dict[str, Any] = {}
        if self.reader.probes.mentions("reasoning_effort"):
            variables["reasoning_effort"] = effort
        if self.reader.probes.mentions("enable_thinking"):
            variables["enable_thinking"] = effort != "none"
        if not variables:
            unused.append(name)
        return variables

    def sampling_of(self, body: dict[str, Any]) -> Sampling:
        """How tokens are chosen, from the fields of a body that are named as in `Sampling`.

        Raises:
            Refused: 400, for a wrong `logit_bias`.
        """
        names = {known.name for known in fields(Sampling)}
        given = {name: value for name, value in body.items() if name in names}
        sampling = replace(self.sampling, **given)
        # 0: all tokens. mlx-lm's sampler fails for as many as there are.
        top_k = sampling.top_k if sampling.top_k < self.vocab else 0
        return replace(sampling, top_k=top_k, logit_bias=self._bias(sampling.logit_bias))

    def stop_words(self, given: Any, name: str) -> list[str]:
        """Texts that end a reply, from a text or a list of them in the field `name`.

        Raises:
            Refused: 400, there are too many, or too long ones.
        """
        strings = [given] if isinstance(given, str) else given
        fits = len(strings) <= MAX_STOP_STRINGS
        if not fits or not all(isinstance(s, str) and len(s) <= MAX_STOP_LENGTH for s in strings):
            raise Refused(
                400,
                f"{name} must be up to {MAX_STOP_STRINGS} strings"
                f" of up to {MAX_STOP_LENGTH} characters",
                None,
                name,
            )
        # Clients send an empty string for no stop word.
        return [string for string in strings if string]

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
