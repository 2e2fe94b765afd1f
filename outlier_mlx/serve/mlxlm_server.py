"""mlx-lm's HTTP server, changed to serve one model to clients that are not trusted.

`mlx_lm.server` has no public Python API; this is the only module that uses it.
"""

import gc
import inspect
import io
import json
import math
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import Empty
from typing import Any
from urllib.parse import unquote

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from outlier_mlx import __version__
from outlier_mlx.engine.generate import described, top_k, vocabulary
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.sizes import context_length
from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.http import CheckedHandler, Service, read_body
from outlier_mlx.serve.limits import Limits, parse_body
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

Load = Callable[[], tuple[nn.Module, TokenizerWrapper]]

NOT_A_NUMBER = (
    "the model's output is not a number, probably because activations overflowed in float16;"
    " serve it with --dtype bfloat16 or --dtype float32"
)
TEMPLATE_NAMES = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)


class OneModel(ModelProvider):
    """Provides the same model for every request, whatever model the request names.

    The thread that generates also loads: MLX evaluates a lazy array only in the thread that made
    it, and a model has lazy arrays besides its parameters.

    Attributes:
        loaded: set when loading has ended.
        failure: the exception that ended loading, or None.
        limits: limits for the parameters of requests; set once the model is loaded.
    """

    model: Any
    tokenizer: Any
    model_key: Any
    limits: Limits

    def __init__(self, service: Service, load: Load) -> None:
        super().__init__(service.options.arguments())
        self.service = service
        self.loaded = threading.Event()
        self.failure: BaseException | None = None
        self._load_model = load

    def load_default(self) -> None:
        """Load the model if it is not loaded yet."""
        if self.loaded.is_set():
            return
        try:
            self.model, self.tokenizer = self._load_model()
            self.is_batchable = all(hasattr(c, "merge") for c in make_prompt_cache(self.model))
            self.model_key = (self.service.name, None, None)
            self.cli_args.top_k = top_k(self.cli_args.top_k, self.model, self.tokenizer)
            self.limits = Limits(
                self.service.options.max_tokens,
                vocabulary(self.model, self.tokenizer),
                self.service.options.max_context or context_length(described(self.model)),
                TEMPLATE_NAMES,
            )
        except BaseException as error:
            self.failure = error
        finally:
            self.loaded.set()

    def load(self, *_: Any) -> tuple[nn.Module, TokenizerWrapper]:
        """The loaded model and its tokenizer; the arguments are ignored."""
        return self.model, self.tokenizer


class PromptCache(LRUPromptCache):
    """mlx-lm's prompt cache, which here never covers the whole prompt.

    mlx-lm's generation needs at least one token that is not cached. It fails if all are, for
    example if a client sends prompt and response back as the next prompt.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """The cache of the longest known prefix, and the tokens after that prefix."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is None or rest:
            return cache, rest
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, rest + tokens[-1:]


class Generator(ResponseGenerator):
    """Generates for all requests in one thread, which continues after an error.

    Attributes:
        replies: replies that are being generated.
    """

    def __init__(self, provider: OneModel) -> None:
        self.provider = provider
        self.replies: set[Reply] = set()
        options = provider.service.options
        limit = 1 << 63 if options.prompt_cache_bytes is None else options.prompt_cache_bytes
        self._new_cache = lambda: PromptCache(options.prompt_cache_size, limit)
        # Replies that began before the latest failure get no more tokens.
        self._failures = 0
        self._handler_thread = threading.local()
        super().__init__(provider, self._new_cache())

    def _run_generate(self) -> None:
        self.provider.load_default()
        while not self._stop and self.provider.failure is None:
            try:
                self._generate()
            except Exception as error:
                self.provider.service.warn(f"generation failed: {type(error).__name__}: {error}")
                self._start_over()

    def _start_over(self) -> None:
        self.prompt_cache = self._new_cache()
        gc.collect()
        mx.clear_cache()
        try:
            while True:
                self.requests.get_nowait()
        except Empty:
            self._failures += 1

    def generation_available(self) -> bool:
        """Whether generation runs and has not failed since the calling thread's request began."""
        failures = getattr(self._handler_thread, "failures", self._failures)
        return self._generation_thread.is_alive() and failures == self._failures

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Start a reply: mlx-lm's generation context, and an iterator over its responses."""
        self._handler_thread.failures = self._failures
        return super().generate(*args, **kwargs)

    def _tokenize(self, tokenizer: TokenizerWrapper, request: Any, args: Any) -> Any:
        try:
            tokenized = super()._tokenize(tokenizer, request, args)
        except Exception as error:  # a chat template can raise anything
            raise Refused(400, f"the chat template failed: {error}") from None
        prompt, context = tokenized[0], self.provider.limits.context
        if not isinstance(prompt, list) or not prompt:
            raise Refused(400, "the prompt is empty")
        if context is not None and len(prompt) + args.max_tokens > context:
            room = context - len(prompt)
            if room < 1:
                raise Refused(
                    400,
                    f"the prompt has {len(prompt)} tokens; the context length is {context}",
                    "context_length_exceeded",
                )
            args.max_tokens = room
        return tokenized

    def stop(self, seconds: float) -> bool:
        """End all replies and the thread; returns whether the thread ended within `seconds`."""
        self._stop = True
        for reply in list(self.replies):
            reply.close()
        self._generation_thread.join(seconds)
        return not self._generation_thread.is_alive()


class Reply:
    """The reply to one request; takes the place of the generator in mlx-lm's handler.

    It adds three things to mlx-lm. It notices that a client disconnected even while nothing is
    being sent. It finds stop words also when the model writes them with other tokens than the
    tokenizer would. And it collects the log probabilities of streamed tokens.
    """

    def __init__(self, generator: Generator, connection: socket.socket) -> None:
        self.generator = generator
        self.cli_args = generator.cli_args
        self.logprobs: list[dict[str, Any]] = []  # of the tokens that were not sent yet
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

    def __init__(self, service: Service, generator: Generator, *args: Any) -> None:
        self.service = service
        self.generator = generator
        self._reply: Reply | None = None
        # mlx-lm's default fingerprint would name this machine's operating system.
        fingerprint = f"outlier-mlx-{__version__}"
        APIHandler.__init__(self, generator, *args, system_fingerprint=fingerprint)

    def do_GET(self) -> None:
        """Answer `/health` and `/v1/models`."""
        self.answer_errors(lambda: APIHandler.do_GET(self))

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
        body = self.generator.provider.limits.check(parse_body(raw), chat=chat)
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

    def handle_models_request(self) -> None:
        """List the model, or describe it. mlx-lm would list all models in the hub's cache."""
        model = {"id": self.service.name, "object": "model", "created": self.created}
        model["owned_by"] = "outlier-mlx"
        name = unquote(self.path.removeprefix("/v1/models").strip("/"))
        if name not in ("", self.service.name):
            raise Refused(404, f"there is no model {name[:80]!r}", "model_not_found")
        self.send_json(200, model if name else {"object": "list", "data": [model]})

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
