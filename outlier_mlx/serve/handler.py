"""Answers requests: has the replies generated, and sends them in the format of the API."""

import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any
from urllib.parse import unquote

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.apis.anthropic import VERSION, model_info
from outlier_mlx.serve.apis.api import Answer, Event, Keeping, Usage
from outlier_mlx.serve.generator import Generator
from outlier_mlx.serve.http import CheckedHandler, Service
from outlier_mlx.serve.limits import parse_body
from outlier_mlx.serve.pieces import Piece
from outlier_mlx.serve.replies import Reply
from outlier_mlx.serve.static import FILES, HEADERS
from outlier_mlx.serve.together import together

# The longest step is one of many long prompts: with the default options, 8 of 2048 tokens each.
STUCK_SECONDS = 300.0
# Names of parameters that are remembered, so that each is logged once.
MAX_NAMED = 1000


class Handler(CheckedHandler):
    """Answers the requests of one connection."""

    def __init__(self, service: Service, generator: Generator, *args: Any) -> None:
        self.service = service
        self.generator = generator
        # OpenAI's name of it, and Anthropic's.
        self.notes = dict.fromkeys(("X-Request-Id", "Request-Id"), f"req_{uuid.uuid4().hex}")
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answer `/health` and `/v1/models`, or send a file of the page or a kept answer."""
        answers = {"/health": self._health} | dict.fromkeys(FILES, self._file)
        other = self._models if self.path.startswith("/v1/models") else self._kept
        self.answer_errors(answers.get(self.path, other))

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        """Drop a kept answer."""
        self.answer_errors(self._kept)

    def do_POST(self) -> None:
        """Answer a request for text."""
        self.answer_errors(self._complete)

    def _file(self) -> None:
        file = FILES[self.path]
        self.send_body(200, file.read(), HEADERS | {"Content-Type": file.content_type})

    def _health(self) -> None:
        idle = self.generator.idle()
        if not self.generator.generation_available():
            reason = "generation has ended"
        elif idle > STUCK_SECONDS:
            reason = f"generation has made no step for {idle:.0f} seconds"
        else:
            self.send_json(200, {"status": "ok"} | self._state())
            return
        self.send_json(503, {"status": "unavailable", "reason": reason})

    def _state(self) -> dict[str, str]:
        """Whether the model is loaded, where it need not be."""
        idle = self.service.options.idle_unload
        return {} if idle is None else {"state": self.generator.provider.state}

    def _models(self) -> None:
        """List the model, or describe it."""
        model: dict[str, Any] = {
            "id": self.service.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "outlier-mlx",
            "outlier": self.generator.provider.description()
            | {"drafts": asdict(self.generator.loop.counts)},
        } | self._state()
        name = unquote(self.path.removeprefix("/v1/models").strip("/"))
        if name not in ("", self.service.name):
            raise Refused(404, f"there is no model {name[:80]!r}", "model_not_found")
        listed: dict[str, Any] = {"object": "list"}
        if VERSION in self.headers:
            limits = self.generator.provider.limits
            model, listed = model_info(self.service.name, limits), {"has_more": False}
            listed |= dict.fromkeys(("first_id", "last_id"), self.service.name)
        self.send_json(200, model if name else listed | {"data": [model]})

    def _kept(self) -> None:
        """Send or drop an answer that an API keeps below its path."""
        path, _, name = self.path.rpartition("/")
        api = self.service.apis.get(path)
        if not isinstance(api, Keeping):
            raise Refused(404, f"unknown endpoint {self.path[:80]}")
        self.send_json(200, api.drop(name) if self.command == "DELETE" else api.kept(name))

    def _complete(self) -> None:
        raw = self.read_body()
        api = self.service.apis[self.path]
        body = parse_body(raw)
        requests = api.requests(body, self.generator.provider.limits)
        first = requests[0]
        self._tell_unused(first.unused)
        answer = api.answer(body, requests, self.service.name)
        with ExitStack() as stack:
            made = (Reply(self.generator, request, self.connection) for request in requests)
            replies = [stack.enter_context(closing(reply)) for reply in made]
            if not api.generates:
                self.send_json(200, answer.whole([], self._usage(replies)))
                return
            pieces = self._start(replies)
            granted = min(reply.max_tokens for reply in replies)
            if granted < first.asked_tokens:
                self.notes["X-Max-Tokens"] = str(granted)
            if first.stream:
                self._stream(replies, pieces, answer)
                return
            wholes = [Piece() for _ in replies]
            for number, piece in pieces:
                wholes[number].add(piece)
            self.send_json(200, answer.whole(wholes, self._usage(replies)))

    def _start(self, replies: list[Reply]) -> Iterator[tuple[int, Piece]]:
        """Start replies; returns their pieces with their numbers."""
        if len(replies) > 1:
            return together(replies, self.generator.pool, self._keep_alive)
        replies[0].start(self._keep_alive)
        return ((0, piece) for piece in replies[0].pieces())

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

    def _stream(
        self, replies: list[Reply], pieces: Iterator[tuple[int, Piece]], answer: Answer
    ) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_cors_headers()
        self.end_headers()
        self.streaming = answer
        self._send(answer.begin(self._usage(replies)))
        for number, piece in pieces:
            self._send(answer.events(number, piece))
        self._send(answer.end(self._usage(replies)))

    def _send(self, events: Iterable[Event]) -> None:
        for event in events:
            self.wfile.write(event.encode())

    def _keep_alive(self, done: int, total: int | None) -> None:
        """Send something while the prompt is processed, so that no proxy ends the stream.

        It does not say how much is done: that would tell how much was in the prompt cache.
        """
        if self.streaming is not None:
            self.wfile.write(self.streaming.ping)

    def _usage(self, replies: list[Reply]) -> Usage:
        """Numbers of tokens.

        How many of them were cached says what was asked before. Only with an API key is it sure
        that nobody else asked that.
        """
        keyed = self.service.access.api_key is not None
        return Usage(
            sum(reply.prompt_tokens for reply in replies),
            sum(reply.completion_tokens for reply in replies),
            sum(reply.reasoning_tokens for reply in replies),
            accepted=sum(reply.drafts[0] for reply in replies),
            rejected=sum(reply.drafts[1] for reply in replies),
            cached=sum(reply.cached_tokens for reply in replies) if keyed else None,
        )
