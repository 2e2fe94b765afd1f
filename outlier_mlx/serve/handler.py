"""Answers requests: checks them, has the reply generated, and sends it in OpenAI's format."""

import json
import re
import time
from contextlib import closing
from typing import Any
from urllib.parse import unquote

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.generator import Generator
from outlier_mlx.serve.http import CheckedHandler, Service
from outlier_mlx.serve.limits import parse_body
from outlier_mlx.serve.openai import Format, usage_of
from outlier_mlx.serve.pieces import Piece
from outlier_mlx.serve.replies import Reply

# Names of parameters that are remembered, so that each is logged once.
MAX_NAMED = 1000


class Handler(CheckedHandler):
    """Answers the requests of one connection."""

    def __init__(self, service: Service, generator: Generator, *args: Any) -> None:
        self.service = service
        self.generator = generator
        self.notes = {}
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answer `/health` and `/v1/models`."""
        self.answer_errors(self._health if self.path == "/health" else self._models)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answer a request for text."""
        self.answer_errors(self._complete)

    def _health(self) -> None:
        healthy = self.generator.generation_available()
        self.send_json(200 if healthy else 503, {"status": "ok" if healthy else "unavailable"})

    def _models(self) -> None:
        """List the model, or describe it."""
        model = {
            "id": self.service.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "outlier-mlx",
        }
        name = unquote(self.path.removeprefix("/v1/models").strip("/"))
        if name not in ("", self.service.name):
            raise Refused(404, f"there is no model {name[:80]!r}", "model_not_found")
        self.send_json(200, model if name else {"object": "list", "data": [model]})

    def _complete(self) -> None:
        raw = self.read_body()
        chat = self.path.endswith("/chat/completions")
        request = self.generator.provider.limits.request(parse_body(raw), chat=chat)
        self._tell_unused(request.unused)
        reply_format = Format(self.service.name, chat, request.stream)
        with closing(Reply(self.generator, request, self.connection)) as reply:
            reply.start(self._keep_alive)
            if reply.max_tokens < request.asked_tokens:
                self.notes["X-Max-Tokens"] = str(reply.max_tokens)
            if request.stream:
                self._stream(reply, reply_format)
                return
            whole = Piece()
            for piece in reply.pieces():
                whole.add(piece)
            self.send_json(200, reply_format.reply(whole, self._usage(reply)))

    def _tell_unused(self, names: tuple[str, ...]) -> None:
        """Name the fields that have no effect in a header, and each of them once in the log.

        Raises:
            Refused: the server is strict.
        """
        if not names:
            return
        shown = [re.sub(r"[^\w.-]", "?", name[:64], flags=re.ASCII) for name in names[:20]]
        if self.service.options.strict:
            text = f"these parameters would have no effect: {', '.join(shown)}"
            raise Refused(400, text, "unknown_parameter", shown[0])
        self.notes["X-Unused-Parameters"] = ", ".join(shown)
        for name in shown:
            if name not in self.service.named and len(self.service.named) < MAX_NAMED:
                self.service.named.add(name)
                self.service.log(f"a request has the parameter {name}, which has no effect")

    def _stream(self, reply: Reply, reply_format: Format) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_cors_headers()
        self.end_headers()
        self.streaming = True
        for piece in reply.pieces():
            self._send_event(json.dumps(reply_format.reply(piece)))
        if reply.request.include_usage:
            self._send_event(json.dumps(reply_format.usage_chunk(self._usage(reply))))
        self._send_event("[DONE]")

    def _send_event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _keep_alive(self, done: int, total: int | None) -> None:
        """Send a comment while the prompt is processed, so that no proxy ends the stream.

        It does not say how much is done: that would tell how much was in the prompt cache.
        """
        if self.streaming:
            self.wfile.write(b": keepalive\n\n")

    def _usage(self, reply: Reply) -> dict[str, Any]:
        """Numbers of tokens.

        How many of them were cached says what was asked before. Only with an API key is it sure
        that nobody else asked that.
        """
        keyed = self.service.access.api_key is not None
        cached = reply.cached_tokens if keyed else None
        return usage_of(reply.prompt_tokens, reply.completion_tokens, cached)
