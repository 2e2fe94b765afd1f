"""What `/v1/chat/completions` and `/v1/completions` have in common."""

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from outlier_mlx import __version__
from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.api import Answer, Event, Usage
from outlier_mlx.serve.fields import STREAM_OPTIONS, check_fields
from outlier_mlx.serve.limits import Limits
from outlier_mlx.serve.pieces import Piece

FINGERPRINT = f"outlier-mlx-{__version__}"


def common_fields(body: dict[str, Any], limits: Limits, unused: list[str]) -> dict[str, Any]:
    """The fields of a `Request` that both endpoints have.

    Args:
        body: the fields that are honoured.
        limits: limits of the server.
        unused: gets the names of fields that have no effect.

    Raises:
        Refused: 400, with the parameter's name.
    """
    options = body.get("stream_options", {})
    options = check_fields(options, STREAM_OPTIONS, unused, "stream_options")
    length = body.get("max_completion_tokens", body.get("max_tokens", 0))
    return {
        "stop": limits.stop_words(body.get("stop", []), "stop"),
        "max_tokens": min(length or limits.max_tokens, limits.max_tokens),
        "asked_tokens": length,
        "sampling": limits.sampling_of(body),
        "seed": body["seed"] % (1 << 64) if "seed" in body else None,
        "stream": body.get("stream", False),
        "include_usage": options.get("include_usage", False),
    }


def usage_of(usage: Usage) -> dict[str, Any]:
    """Numbers of tokens."""
    told: dict[str, Any] = {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
    }
    if usage.predictions:
        told["completion_tokens_details"] = usage.predictions
    if usage.cached is not None:
        told["prompt_tokens_details"] = {"cached_tokens": usage.cached}
    return told


class CompletionAnswer(Answer):
    """An answer with choices: whole, or as the chunks of a stream.

    Args:
        kind: the beginning of the answer's id.
        whole_object: `object` of a whole answer.
        chunk_object: `object` of a chunk.
        model: the model's name.
        include_usage: whether a stream ends with the numbers of tokens.
    """

    def __init__(
        self, kind: str, whole_object: str, chunk_object: str, model: str, *, include_usage: bool
    ) -> None:
        self._whole_object, self._chunk_object = whole_object, chunk_object
        self._include_usage = include_usage
        self._same = {
            "id": f"{kind}-{uuid.uuid4()}",
            "system_fingerprint": FINGERPRINT,
            "model": model,
            "created": int(time.time()),
        }

    def choice(self, piece: Piece, *, stream: bool) -> dict[str, Any]:
        """What a choice has besides its number and finish reason."""
        raise NotImplementedError

    def more(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """What an answer, or a chunk, has besides its choices."""
        return {}

    def whole(self, wholes: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The whole answer, with a choice for each reply."""
        choices = [self._choice(*numbered, stream=False) for numbered in enumerate(wholes)]
        whole = self._object(self._whole_object, choices) | {"usage": usage_of(usage)}
        return whole | self.more(wholes)

    def events(self, number: int, piece: Piece) -> Iterable[Event]:
        """A chunk with one choice."""
        choice = self._choice(number, piece, stream=True)
        return (Event(self._object(self._chunk_object, [choice]) | self.more([piece])),)

    def end(self, usage: Usage) -> Iterator[Event]:
        """The numbers of tokens, if the client asked for them, and `[DONE]`."""
        if self._include_usage:
            yield Event(self._object(self._chunk_object, []) | {"usage": usage_of(usage)})
        yield Event("[DONE]")

    def failed(self, refused: Refused) -> Iterable[Event]:
        """The error."""
        return (Event(refused.as_json()),)

    def _choice(self, number: int, piece: Piece, *, stream: bool) -> dict[str, Any]:
        same = {"index": number, "finish_reason": piece.finish_reason}
        return same | self.choice(piece, stream=stream)

    def _object(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {"object": kind, **self._same, "choices": choices}
