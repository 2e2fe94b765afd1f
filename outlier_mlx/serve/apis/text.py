"""`/v1/completions` of OpenAI's API: plain text, without chat template."""

from dataclasses import replace
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.api import Api
from outlier_mlx.serve.apis.completions import CompletionAnswer, common_fields
from outlier_mlx.serve.fields import FIELDS, TEXT, check_fields
from outlier_mlx.serve.limits import Limits
from outlier_mlx.serve.pieces import Piece
from outlier_mlx.serve.request import Request
from outlier_mlx.serve.structured import Form, given_schema

MAX_PROMPTS = 128


class Text(Api):
    """Translates text completions."""

    def requests(self, body: dict[str, Any], limits: Limits) -> list[Request]:
        """A request for each prompt.

        Raises:
            Refused: 400, with the parameter's name.
        """
        unused: list[str] = []
        body = check_fields(body, FIELDS, unused, endpoint=TEXT)
        common = common_fields(body, limits, unused)
        form = Form(*given_schema(body))
        request = Request(
            constraint=form.constraint(limits.grammars),
            alternatives=_alternatives(body, limits),
            unused=tuple(dict.fromkeys(unused)),
            **common,
        )
        return [replace(request, prompt=prompt) for prompt in _prompts(body.get("prompt"))]

    def answer(self, body: dict[str, Any], requests: list[Request], model: str) -> "TextAnswer":
        """A text completion."""
        return TextAnswer(model, include_usage=requests[0].include_usage)


class TextAnswer(CompletionAnswer):
    """A text completion: whole, or as the chunks of a stream."""

    def __init__(self, model: str, *, include_usage: bool) -> None:
        kinds = "cmpl", "text_completion", "text_completion"
        super().__init__(*kinds, model, include_usage=include_usage)

    def choice(self, piece: Piece, *, stream: bool) -> dict[str, Any]:
        """A text, or what is new in it."""
        logprobs = {"logprobs": _logprobs(piece.logprobs)} if piece.logprobs else {}
        return logprobs | {"text": piece.text}


def _logprobs(logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": [token["token"] for token in logprobs],
        "token_logprobs": [token["logprob"] for token in logprobs],
        "top_logprobs": [
            {other["token"]: other["logprob"] for other in token["top_logprobs"]}
            for token in logprobs
        ],
    }


def _alternatives(body: dict[str, Any], limits: Limits) -> int | None:
    """The number of alternatives, which `logprobs` may be as well."""
    logprobs, alternatives = body.get("logprobs", False), body.get("top_logprobs", 0)
    if not isinstance(logprobs, bool):
        return min(logprobs, limits.vocab)
    return min(alternatives, limits.vocab) if logprobs or alternatives else None


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
