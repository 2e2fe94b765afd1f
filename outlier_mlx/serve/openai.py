"""Replies in the format of OpenAI's API: whole, or as the chunks of a stream."""

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from outlier_mlx import __version__
from outlier_mlx.serve.pieces import Piece

FINGERPRINT = f"outlier-mlx-{__version__}"


@dataclass
class Format:
    """The format of one reply.

    Attributes:
        model: the model's name.
        chat: the format of `/v1/chat/completions`, not of `/v1/completions`.
        stream: the format of chunks.
    """

    model: str
    chat: bool
    stream: bool
    created: int = field(default_factory=lambda: int(time.time()))
    _id: str = field(default_factory=lambda: str(uuid.uuid4()))
    _calls: int = 0

    def reply(
        self, pieces: Iterable[tuple[int, Piece]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A chunk, or a whole reply with its usage; a choice for each piece with its number."""
        return self._object([self._choice(number, piece) for number, piece in pieces], usage)

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, "finish_reason": piece.finish_reason}
        if piece.logprobs:
            choice["logprobs"] = (
                {"content": piece.logprobs} if self.chat else _text_logprobs(piece.logprobs)
            )
        if self.chat:
            choice["delta" if self.stream else "message"] = self._message(piece)
        else:
            choice["text"] = piece.text
        return choice

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk without choices that ends a stream if the client asked for it."""
        return self._object([], usage)

    def _object(self, choices: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        chunk = "chat.completion.chunk" if self.stream else "chat.completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self._id}",
            "system_fingerprint": FINGERPRINT,
            "object": chunk if self.chat else "text_completion",
            "model": self.model,
            "created": self.created,
            "choices": choices,
        } | ({} if usage is None else {"usage": usage})

    def _message(self, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant"}
        if piece.text or not self.stream:
            message["content"] = piece.text or None
        if piece.reasoning:
            message["reasoning"] = piece.reasoning
        if piece.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in piece.calls
            ]
        if self.stream:
            for call in message.get("tool_calls", ()):
                call["index"] = self._calls
                self._calls += 1
        return message


def usage_of(prompt: int, completion: int, cached: int | None) -> dict[str, Any]:
    """Numbers of tokens; `cached`: those of the prompt that were in the cache, if it is told."""
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return usage


def _text_logprobs(logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Log probabilities in the format of `/v1/completions`."""
    return {
        "tokens": [token["token"] for token in logprobs],
        "token_logprobs": [token["logprob"] for token in logprobs],
        "top_logprobs": [
            {other["token"]: other["logprob"] for other in token["top_logprobs"]}
            for token in logprobs
        ],
    }
