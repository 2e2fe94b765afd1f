"""`/v1/messages` and `/v1/messages/count_tokens` of Anthropic's API."""

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.anthropic_request import request_of
from outlier_mlx.serve.apis.api import Answer, Api, Event, Usage
from outlier_mlx.serve.calls import Call
from outlier_mlx.serve.limits import Limits
from outlier_mlx.serve.pieces import Piece
from outlier_mlx.serve.request import Request

#: The header that only clients of this API send.
VERSION = "anthropic-version"
# Clients send it back with the thinking, which the server takes as it is.
SIGNATURE = "outlier-mlx"
#: The kinds of errors that do not follow from the hundreds of the status.
_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_TEXTS = {"thinking": "thinking", "text": "text", "tool_use": "partial_json"}
_DELTAS = {"thinking": "thinking_delta", "text": "text_delta", "tool_use": "input_json_delta"}


class Messages(Api):
    """Translates messages."""

    statuses: ClassVar[dict[int, int]] = {503: 529}

    def requests(self, body: dict[str, Any], limits: Limits) -> list[Request]:
        """The request of a conversation.

        Raises:
            Refused: 400, with the place of what is wrong.
        """
        return [request_of(body, limits, counts=False)]

    def answer(self, body: dict[str, Any], requests: list[Request], model: str) -> "MessageAnswer":
        """A message."""
        thinking = body.get("thinking") or {}
        return MessageAnswer(model, shows_thinking=thinking.get("display") != "omitted")

    def error(self, refused: Refused) -> dict[str, Any]:
        """Anthropic's error."""
        return error_of(refused)


class CountTokens(Messages):
    """Counts the tokens of the prompt that a message would have."""

    generates = False

    def requests(self, body: dict[str, Any], limits: Limits) -> list[Request]:
        """The request of a conversation.

        Raises:
            Refused: 400, with the place of what is wrong.
        """
        return [request_of(body, limits, counts=True)]

    def answer(self, body: dict[str, Any], requests: list[Request], model: str) -> "Count":
        """The number of tokens."""
        return Count(model, shows_thinking=False)


def error_of(refused: Refused) -> dict[str, Any]:
    """The body of an error response, and the data of the event that ends a stream."""
    default = "api_error" if refused.status >= 500 else "invalid_request_error"
    error: dict[str, Any] = {"type": _ERRORS.get(refused.status, default), "message": str(refused)}
    if refused.param == "thread":
        # Then Anthropic's client sends the whole conversation.
        code = "thread_unsupported_request"
        error["details"] = {"error_code": code, "unsupported": ["thread"]}
    return {"type": "error", "error": error}


def model_info(name: str, limits: Limits) -> dict[str, Any]:
    """The model, as `/v1/models` describes it to a client of this API."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",  # what this API says if it is not known
        "lifecycle": "active",
        "max_input_tokens": limits.context,
        "max_tokens": limits.max_tokens,
    }


def usage_of(usage: Usage) -> dict[str, Any]:
    """Numbers of tokens. Those of the prompt are divided, if the client is told what was cached."""
    cached = usage.cached
    told: dict[str, Any] = {
        "input_tokens": usage.prompt - (cached or 0),
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning} | usage.predictions,
    }
    if cached is not None:
        told |= {"cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}
    return told


class MessageAnswer(Answer):
    """A message: whole, or as the events of a stream.

    Args:
        model: the model's name.
        shows_thinking: whether the text of thinking is sent; if not, its blocks are empty.
    """

    ping = Event({"type": "ping"}, "ping").encode()

    def __init__(self, model: str, *, shows_thinking: bool) -> None:
        self._shows_thinking = shows_thinking
        self._same = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._index = -1
        self._open = ""  # the type of the block that has begun
        self._blanks = ""  # held back: a block of text that is only blanks is left out
        self._last = Piece()

    def whole(self, wholes: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The whole message."""
        piece = wholes[0]
        content: list[dict[str, Any]] = []
        if piece.reasoning:
            thinking = piece.reasoning if self._shows_thinking else ""
            content.append(_block("thinking") | {"thinking": thinking, "signature": SIGNATURE})
        if piece.text.strip():
            content.append(_block("text") | {"text": piece.text})
        for call in piece.calls:
            content.append(_block("tool_use", call) | {"input": json.loads(call.arguments)})
        return self._same | {"content": content, **_ended(piece), "usage": usage_of(usage)}

    def begin(self, usage: Usage) -> Iterator[Event]:
        """The message without content."""
        message = self._same | {"content": [], **_ended(None), "usage": usage_of(usage)}
        yield _event("message_start", message=message)

    def events(self, number: int, piece: Piece) -> Iterator[Event]:
        """What is new in the content blocks, in the order in which models write them."""
        self._last = piece
        if piece.arguments:
            yield self._delta("tool_use", piece.arguments)
        if piece.reasoning:
            yield from self._continue("thinking", piece.reasoning if self._shows_thinking else "")
        if self._open != "text" and not (self._blanks + piece.text).strip():
            self._blanks += piece.text
        elif piece.text:
            yield from self._continue("text", self._blanks + piece.text)
            self._blanks = ""
        for call in piece.calls:
            yield from self._start("tool_use", call)
            yield self._delta("tool_use", call.arguments)

    def end(self, usage: Usage) -> Iterator[Event]:
        """The end of the last block, why the message ended, and the numbers of tokens."""
        yield from self._stop()
        yield _event("message_delta", delta=_ended(self._last), usage=usage_of(usage))
        yield _event("message_stop")

    def failed(self, refused: Refused) -> Iterable[Event]:
        """The error."""
        return (Event(error_of(refused), "error"),)

    def _continue(self, kind: str, text: str) -> Iterator[Event]:
        if self._open != kind:
            yield from self._start(kind)
        if text:
            yield self._delta(kind, text)

    def _start(self, kind: str, call: Call | None = None) -> Iterator[Event]:
        yield from self._stop()
        self._index += 1
        self._open, self._blanks = kind, ""
        block = _block(kind, call)
        yield _event("content_block_start", index=self._index, content_block=block)

    def _stop(self) -> Iterator[Event]:
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            yield _event("content_block_delta", index=self._index, delta=delta)
        if self._open:
            yield _event("content_block_stop", index=self._index)
        self._open = ""

    def _delta(self, kind: str, text: str) -> Event:
        delta = {"type": _DELTAS[kind], _TEXTS[kind]: text}
        return _event("content_block_delta", index=self._index, delta=delta)


class Count(MessageAnswer):
    """A number of tokens."""

    def whole(self, wholes: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The number of tokens in the prompt."""
        return {"input_tokens": usage.prompt}


def _event(name: str, **fields: Any) -> Event:
    return Event({"type": name} | fields, name)


def _block(kind: str, call: Call | None = None) -> dict[str, Any]:
    """A content block without its content."""
    if call is not None:
        return {"type": kind, "id": call.id, "name": call.name, "input": {}}
    signature = {"signature": ""} if kind == "thinking" else {}
    return {"type": kind, _TEXTS[kind]: ""} | signature


def _ended(piece: Piece | None) -> dict[str, Any]:
    """Why a message ended; None: it has not ended."""
    if piece is None:
        return {"stop_reason": None, "stop_sequence": None}
    reason = _REASONS.get(piece.finish_reason or "")
    if reason is not None:
        return {"stop_reason": reason, "stop_sequence": None}
    reason = "end_turn" if piece.stop_word is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": piece.stop_word}
