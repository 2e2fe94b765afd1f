"""What the server needs of an API: checked requests from a body, and the format of what is sent."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.limits import Limits
from outlier_mlx.serve.pieces import Piece
from outlier_mlx.serve.request import Request


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens of all replies to a request.

    Attributes:
        prompt: tokens of the prompts.
        completion: tokens that were generated so far.
        reasoning: those of them that are reasoning.
        accepted: tokens of drafts that the model would have chosen itself.
        rejected: the other tokens of drafts; they are in no reply.
        cached: those of the prompts that were in the prompt cache; None: the client is not told.
    """

    prompt: int
    completion: int = 0
    reasoning: int = 0
    accepted: int = 0
    rejected: int = 0
    cached: int | None = None

    @property
    def predictions(self) -> dict[str, int]:
        """How many tokens of drafts were right, with OpenAI's names; empty without drafts."""
        if not self.accepted and not self.rejected:
            return {}
        return {
            "accepted_prediction_tokens": self.accepted,
            "rejected_prediction_tokens": self.rejected,
        }


@dataclass(frozen=True)
class Event:
    """A server-sent event.

    Attributes:
        data: an object, sent as JSON, or a text as it is.
        name: the event's type, or None.
    """

    data: dict[str, Any] | str
    name: str | None = None

    def encode(self) -> bytes:
        """The event as it is sent."""
        data = self.data if isinstance(self.data, str) else json.dumps(self.data)
        named = "" if self.name is None else f"event: {self.name}\n"
        return f"{named}data: {data}\n\n".encode()


class Answer(Protocol):
    """The answer to one request of an API, of which each reply has a number from 0.

    Either `whole` is called, or `begin`, `events` for each piece, and `end`; instead of anything
    that is left, `failed`. What is never streamed needs `whole` alone.

    Attributes:
        ping: what is sent while the prompt is processed, so that no proxy ends the stream.
    """

    ping: bytes = b": keepalive\n\n"  # a comment, which clients pass over

    def whole(self, wholes: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The answer that is not streamed; `wholes`: all of each reply."""

    def begin(self, usage: Usage) -> Iterable[Event]:
        """The events before anything was generated; `usage.prompt` is known."""
        return ()

    def events(self, number: int, piece: Piece) -> Iterable[Event]:
        """The events for a piece of the reply of this number; the last has a finish reason."""
        return ()

    def end(self, usage: Usage) -> Iterable[Event]:
        """The events after the last piece of all replies."""
        return ()

    def failed(self, refused: Refused) -> Iterable[Event]:
        """The events that end a stream that cannot be completed."""
        return ()


class Api(Protocol):
    """Translates the requests and answers of one endpoint; there is one for each server.

    Attributes:
        generates: whether requests are answered with replies. If not, with what `Answer.whole`
            makes of no replies and the number of tokens of the prompts.
        statuses: the API's own HTTP statuses, by those of `Refused`; others are the same.
    """

    generates: bool = True
    statuses: ClassVar[dict[int, int]] = {}

    def requests(self, body: dict[str, Any], limits: Limits) -> list[Request]:
        """What to generate for a body: one request for each reply.

        Raises:
            Refused: the body is not possible; with the field's name.
        """

    def answer(self, body: dict[str, Any], requests: list[Request], model: str) -> Answer:
        """The answer to a body.

        Args:
            body: the body.
            requests: what `requests` made of it.
            model: the served model's name.
        """

    def error(self, refused: Refused) -> dict[str, Any]:
        """OpenAI's error body, also for errors found before a body is read."""
        return refused.as_json()


@runtime_checkable
class Keeping(Protocol):
    """An API that keeps its answers, which are below its path by their ids."""

    def kept(self, name: str) -> dict[str, Any]:
        """The answer of this id.

        Raises:
            Refused: 404, it is not kept.
        """

    def drop(self, name: str) -> dict[str, Any]:
        """Drop the answer of this id; returns what the client is told.

        Raises:
            Refused: 404, it is not kept.
        """
