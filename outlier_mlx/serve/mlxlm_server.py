"""mlx-lm's HTTP server, changed to serve one model to clients that are not trusted.

`mlx_lm.server` has no public Python API; this is the only module that uses it.
"""

import io
import json
import math
import select
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from outlier_mlx import __version__
from outlier_mlx.errors import OutlierError
from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.http import CheckedHandler, Service, read_body
from outlier_mlx.serve.limits import LENGTHS, MAX_ALTERNATIVES, parse_body
from outlier_mlx.terminal import Progress

try:
    from mlx_lm.server import (
        APIHandler,
        GenerationContext,
        ModelProvider,
        Response,
        ResponseGenerator,
        TextStateMachine,
    )
except ImportError as error:
    raise OutlierError(f"the server of this mlx-lm version is not supported: {error}") from None

if TYPE_CHECKING:
    from outlier_mlx.serve.generator import Generator

__all__ = ["Handler", "ModelProvider", "Reply", "ResponseGenerator"]

NOT_A_NUMBER = (
    "the model's output is not a number, probably because activations overflowed in float16;"
    " serve it with --dtype bfloat16 or --dtype float32"
)


class Reply:
    """The reply to one request; takes the place of the generator in mlx-lm's handler.

    It adds three things to mlx-lm. It notices that a client disconnected even while nothing is
    being sent. It finds stop words also when the model writes them with other tokens than the
    tokenizer would. And it collects the log probabilities of streamed tokens.
    """

    def __init__(self, generator: "Generator", connection: socket.socket) -> None:
        self.generator = generator
        self.cli_args = generator.cli_args
        self.logprobs: list[dict[str, Any]] = []  # of the tokens that were not sent yet
        self.max_tokens: int | None = None  # known once the prompt is tokenized
        self._connection = connection
        self._context: GenerationContext | None = None
        self._closed = False
        self._wants_logprobs = False

    def generate(
        self, request: Any, args: Any, progress_callback: Progress
    ) -> tuple[GenerationContext, Iterator[Response]]:
        """Like `ResponseGenerator.generate`; the stop words are handled here, not by mlx-lm."""
        words, args.stop_words = args.stop_words, []

        def progress(done: int, total: int) -> None:
            self._check_client()
            progress_callback(done, total)

        self._wants_logprobs = args.logprobs or args.top_logprobs > 0
        self.generator.replies.add(self)
        self._context, responses = self.generator.generate(request, args, progress)
        self.max_tokens = args.max_tokens
        if self._closed:
            self._context.stop()
        return self._context, self._until_stop_word(responses, words)

    def close(self) -> None:
        """End the reply, so that another request can take its place in the batch."""
        self._closed = True
        if self._context is not None:
            self._context.stop()
        self.generator.replies.discard(self)

    def _until_stop_word(
        self, responses: Iterator[Response], words: list[str]
    ) -> Iterator[Response]:
        """The responses up to the first stop word.

        mlx-lm's handler drops the text of a response whose finish reason is "stop". So the last
        response gets the reason None; the handler then sends "stop" itself.
        """
        machine = TextStateMachine({"normal": [(word, None) for word in words]} if words else {})
        state = machine.make_state("normal")
        for response in responses:
            self._check_client()
            if math.isnan(response.logprob):
                raise Refused(500, NOT_A_NUMBER)
            state, segments = TextStateMachine.split(state, response.text)
            text = segments[0][1]
            if self._wants_logprobs and response.finish_reason != "stop":
                self.logprobs.append(self._chosen_and_alternatives(response))
            if len(segments) > 1:
                yield replace(response, text=text, finish_reason=None)
                return
            if response.finish_reason is None:
                yield replace(response, text=text)
                continue
            text += TextStateMachine.flush(state)[1]
            length = response.finish_reason == "length"
            yield replace(response, text=text, finish_reason="length" if length else None)
            return

    def _check_client(self) -> None:
        readable, _, _ = select.select([self._connection], [], [], 0)
        if readable and not self._connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError("the client disconnected")

    def _chosen_and_alternatives(self, response: Response) -> dict[str, Any]:
        """The chosen token and the likeliest tokens, in the format of OpenAI's API."""
        ranked = sorted(response.top_tokens, key=lambda token: -token["logprob"])
        chosen = self._token(response.token, response.logprob)
        chosen["top_logprobs"] = [self._token(token["id"], token["logprob"]) for token in ranked]
        return chosen

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        """A token with its text, or with its vocabulary name if it is part of a character."""
        tokenizer = self.generator.provider.tokenizer
        text = tokenizer.decode([token])
        if "\ufffd" in text:
            name = tokenizer.convert_ids_to_tokens(token)
            return {"token": name, "id": token, "logprob": logprob, "bytes": None}
        return {"token": text, "id": token, "logprob": logprob, "bytes": list(text.encode())}


class Handler(CheckedHandler, APIHandler):
    """Checks a request, then lets mlx-lm's handler answer it."""

    response_generator: Any

    def __init__(self, service: Service, generator: "Generator", *args: Any) -> None:
        self.service = service
        self.generator = generator
        self._reply: Reply | None = None
        self._requested_tokens = 0
        # mlx-lm's default fingerprint would name this machine's operating system.
        fingerprint = f"outlier-mlx-{__version__}"
        APIHandler.__init__(self, generator, *args, system_fingerprint=fingerprint)

    def do_GET(self) -> None:
        """Answer `/health` and `/v1/models`."""
        self.answer_errors(lambda: APIHandler.do_GET(self))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Check the body, then let mlx-lm answer."""
        try:
            self.answer_errors(self._answer)
        finally:
            if self._reply is not None:
                self._reply.close()

    def _answer(self) -> None:
        raw = read_body(self.headers, self.rfile, self.service.options.max_body)
        self.unread = False
        chat = self.path.endswith("/chat/completions")
        asked = parse_body(raw)
        self._requested_tokens = next((asked[name] for name in LENGTHS if name in asked), 0)
        body = self.generator.provider.limits.check(asked, chat=chat)
        # mlx-lm batches only requests that name the same model.
        body["model"] = self.service.name
        raw = json.dumps(body).encode()
        self.headers.replace_header("Content-Length", str(len(raw)))
        self._reply = self.response_generator = Reply(self.generator, self.connection)
        connected, self.rfile = self.rfile, io.BytesIO(raw)
        try:
            APIHandler.do_POST(self)
        finally:
            self.rfile = connected

    def end_headers(self) -> None:
        """Tell a client that its response may have fewer tokens than it asked for."""
        granted = self._reply.max_tokens if self._reply is not None else None
        if granted is not None and granted < self._requested_tokens:
            self.send_header("X-Max-Tokens", str(granted))
        super().end_headers()

    def handle_health_check(self) -> None:
        """Tell whether responses can be generated."""
        healthy = self.generator.generation_available()
        self.send_json(200 if healthy else 503, {"status": "ok" if healthy else "unavailable"})

    def handle_models_request(self) -> None:
        """List the model, or describe it. mlx-lm would list all models in the hub's cache."""
        model = {"id": self.service.name, "object": "model", "created": self.created}
        model["owned_by"] = "outlier-mlx"
        name = unquote(self.path.removeprefix("/v1/models").strip("/"))
        if name not in ("", self.service.name):
            raise Refused(404, f"there is no model {name[:80]!r}", "model_not_found")
        self.send_json(200, model if name else {"object": "list", "data": [model]})

    def completion_usage_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The chunk that ends a stream with the usage, of the same type as the other chunks."""
        return super().completion_usage_response(*args, **kwargs) | {"object": self.object_type}

    def generate_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """mlx-lm's response, with log probabilities in OpenAI's format, also when streamed."""
        for name in ("tokens", "token_logprobs", "top_tokens"):
            kwargs.pop(name, None)
        response = super().generate_response(*args, **kwargs)
        if self._reply is not None and self._reply.logprobs:
            logprobs, self._reply.logprobs = self._reply.logprobs, []
            chat = self.object_type.startswith("chat.completion")
            response["choices"][0]["logprobs"] = (
                {"content": logprobs} if chat else _completion_logprobs(logprobs)
            )
        return response

    def _validate(self, name: str, *args: Any, **kwargs: Any) -> None:
        if name == "top_logprobs":
            kwargs["max_val"] = MAX_ALTERNATIVES
        super()._validate(name, *args, **kwargs)

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if status_code >= 400:
            # mlx-lm sends status 404 for every error during generation.
            error = sys.exception()
            if isinstance(error, Refused):
                raise error
            if status_code == 400:
                raise Refused(400, str(error))
            raise Refused(503, "generation failed; try again")
        super()._set_completion_headers(status_code)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self.streaming = True

    def _set_cors_headers(self) -> None:
        self.send_cors_headers()


def _completion_logprobs(logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Log probabilities in the format of `/v1/completions`."""
    return {
        "tokens": [token["token"] for token in logprobs],
        "token_logprobs": [token["logprob"] for token in logprobs],
        "top_logprobs": [
            {other["token"]: other["logprob"] for other in token["top_logprobs"]}
            for token in logprobs
        ],
    }
