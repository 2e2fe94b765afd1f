"""mlx-lm's HTTP server, bent to one model and to guests who are not trusted.

All that is used of `mlx_lm.server`, none of it public, is used here.
"""

import argparse
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
from outlier_mlx.engine.generate import context_length, top_k, vocabulary
from outlier_mlx.errors import OutlierError
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
    raise OutlierError(f"this mlx-lm's server is not the one that is known here: {error}") from None

Load = Callable[[], tuple[nn.Module, TokenizerWrapper]]

NOT_A_NUMBER = (
    "the model's output is not a number: activations overflowed, as they may in float16;"
    " serve it with --dtype bfloat16 or --dtype float32"
)
TEMPLATE_NAMES = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)


class OneModel(ModelProvider):
    """Provides the one model, whatever a request names.

    Loaded in the thread that generates: a lazy array can only be evaluated where it was made, and
    some that a model keeps besides its parameters are lazy.

    Attributes:
        loaded: set when loading has ended.
        failure: what it ended with, if not with a model.
        limits: what requests may ask of the model, once it is loaded.
    """

    model: Any
    tokenizer: Any
    model_key: Any
    limits: Limits

    def __init__(self, arguments: argparse.Namespace, service: Service, load: Load) -> None:
        super().__init__(arguments)
        self.service = service
        self.loaded = threading.Event()
        self.failure: BaseException | None = None
        self._load_model = load

    def load_default(self) -> None:
        """Load the model, the first time."""
        if self.loaded.is_set():
            return
        try:
            self.model, self.tokenizer = self._load_model()
            self.is_batchable = all(hasattr(c, "merge") for c in make_prompt_cache(self.model))
            self.model_key = (self.service.name, None, None)
            self.cli_args.top_k = top_k(self.cli_args.top_k, self.model, self.tokenizer)
            self.limits = Limits(
                self.service.max_tokens,
                vocabulary(self.model, self.tokenizer),
                self.service.context or context_length(self.model),
                TEMPLATE_NAMES,
            )
        except BaseException as error:
            self.failure = error
        finally:
            self.loaded.set()

    def load(self, *_: Any) -> tuple[nn.Module, TokenizerWrapper]:
        """The model, and its tokenizer."""
        return self.model, self.tokenizer


class PromptCache(LRUPromptCache):
    """Never holds the whole prompt: one token at least is left to start from.

    mlx-lm fails where all of it is cached, as when an answer comes back as a prompt to go on from.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """The cache of the longest known beginning, and the tokens after it."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is None or rest:
            return cache, rest
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, rest + tokens[-1:]


class Generator(ResponseGenerator):
    """Generates for all requests, in a thread of its own, and outlives what goes wrong there.

    Attributes:
        replies: the replies under way.
    """

    def __init__(self, provider: OneModel, cache_size: int, cache_bytes: int | None) -> None:
        self.provider = provider
        self.replies: set[Reply] = set()
        limit = 1 << 63 if cache_bytes is None else cache_bytes
        self._new_cache = lambda: PromptCache(cache_size, limit)
        # How often generation failed: replies from before a failure get no more tokens.
        self._era = 0
        self._asking = threading.local()
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
            self._era += 1

    def generation_available(self) -> bool:
        """Whether the thread lives, and what the calling thread asked for is not lost."""
        asked_in = getattr(self._asking, "era", self._era)
        return self._generation_thread.is_alive() and asked_in == self._era

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As mlx-lm does: the context of a reply, and an iterator over its tokens."""
        self._asking.era = self._era
        return super().generate(*args, **kwargs)

    def _tokenize(self, tokenizer: TokenizerWrapper, request: Any, args: Any) -> Any:
        try:
            tokenized = super()._tokenize(tokenizer, request, args)
        except Exception as error:  # a template raises what it likes
            raise Refused(400, f"no prompt can be made of this: {error}") from None
        prompt, context = tokenized[0], self.provider.limits.context
        if not isinstance(prompt, list) or not prompt:
            raise Refused(400, "the prompt is empty")
        if context is not None and len(prompt) + args.max_tokens > context:
            room = context - len(prompt)
            if room < 1:
                raise Refused(
                    400,
                    f"the prompt has {len(prompt)} tokens, the context {context}",
                    "context_length_exceeded",
                )
            args.max_tokens = room
        return tokenized

    def stop(self, seconds: float) -> bool:
        """End all replies and the thread; whether it ended in time."""
        self._stop = True
        for reply in list(self.replies):
            reply.close()
        self._generation_thread.join(seconds)
        return not self._generation_thread.is_alive()


class ClientGone(ConnectionError):
    """Nobody is there to read the answer."""


class Reply:
    """One request's way to the generator; to mlx-lm's handler it is the generator.

    It minds three things that mlx-lm does not: a client that leaves while nothing is being written
    to it, stop words whose tokens come out otherwise than alone, and the probabilities of streamed
    tokens.
    """

    def __init__(self, generator: Generator, connection: socket.socket) -> None:
        self.generator = generator
        self.cli_args = generator.cli_args
        self.entries: list[dict[str, Any]] = []  # of tokens since they were last taken
        self._connection = connection
        self._context: GenerationContext | None = None
        self._closed = False
        self._wants_entries = False

    def generate(
        self, request: Any, args: Any, progress_callback: Progress
    ) -> tuple[GenerationContext, Iterator[Response]]:
        """As `ResponseGenerator.generate`."""
        words, args.stop_words = args.stop_words, []

        def progress(done: int, total: int) -> None:
            self._check_client()
            progress_callback(done, total)

        self._wants_entries = args.logprobs or args.top_logprobs > 0
        self.generator.replies.add(self)
        self._context, responses = self.generator.generate(request, args, progress)
        if self._closed:
            self._context.stop()
        return self._context, self._watched(responses, words)

    def close(self) -> None:
        """Free the reply's slot."""
        self._closed = True
        if self._context is not None:
            self._context.stop()
        self.generator.replies.discard(self)

    def _watched(self, responses: Iterator[Response], words: list[str]) -> Iterator[Response]:
        """The responses up to the first stop word.

        mlx-lm's handler drops the text of a response with the reason "stop", so none gets it: it
        takes that reason itself when responses end without one.
        """
        machine = TextStateMachine({"normal": [(word, None) for word in words]} if words else {})
        state = machine.make_state("normal")
        for response in responses:
            self._check_client()
            if math.isnan(response.logprob):
                raise Refused(500, NOT_A_NUMBER)
            state, segments = TextStateMachine.split(state, response.text)
            text = segments[0][1]
            if self._wants_entries and response.finish_reason != "stop":
                self.entries.append(self._entry(response))
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
            raise ClientGone("the client left")

    def _entry(self, response: Response) -> dict[str, Any]:
        """A token and its probability as OpenAI's API has them."""
        ranked = sorted(response.top_tokens, key=lambda token: -token["logprob"])
        entry = self._token(response.token, response.logprob)
        entry["top_logprobs"] = [self._token(token["id"], token["logprob"]) for token in ranked]
        return entry

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        """A token by its text, or, if it is part of a character, by its name in the vocabulary."""
        tokenizer = self.generator.provider.tokenizer
        text = tokenizer.decode([token])
        if "\ufffd" in text:
            name = tokenizer.convert_ids_to_tokens(token)
            return {"token": name, "id": token, "logprob": logprob, "bytes": None}
        return {"token": text, "id": token, "logprob": logprob, "bytes": list(text.encode())}


class Handler(CheckedHandler, APIHandler):
    """One request: checked, and then mlx-lm's to answer."""

    response_generator: Any

    def __init__(self, service: Service, generator: Generator, *args: Any) -> None:
        self.service = service
        self.generator = generator
        self._reply: Reply | None = None
        # The default names this machine's operating system.
        fingerprint = f"outlier-mlx-{__version__}"
        APIHandler.__init__(self, generator, *args, system_fingerprint=fingerprint)

    def do_GET(self) -> None:
        """Answer `/health` and `/v1/models`."""
        self.guarded(lambda: APIHandler.do_GET(self))

    def do_POST(self) -> None:
        """Check the body, then let mlx-lm answer."""
        try:
            self.guarded(self._answer)
        finally:
            if self._reply is not None:
                self._reply.close()

    def _answer(self) -> None:
        raw = read_body(self.headers, self.rfile, self.service.max_body)
        self.unread = False
        chat = self.path.endswith("/chat/completions")
        body = self.generator.provider.limits.check(parse_body(raw), chat=chat)
        # One name for all, or mlx-lm would not generate for them together.
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
        """List the one model, or describe it; mlx-lm would list the hub's cache."""
        model = {"id": self.service.name, "object": "model", "created": self.created}
        model["owned_by"] = "outlier-mlx"
        asked = unquote(self.path.removeprefix("/v1/models").strip("/"))
        if asked not in ("", self.service.name):
            raise Refused(404, f"there is no model {asked[:80]!r}", "model_not_found")
        self.send_json(200, model if asked else {"object": "list", "data": [model]})

    def generate_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As mlx-lm does, with probabilities as OpenAI's API has them, in streams as well."""
        for name in ("tokens", "token_logprobs", "top_tokens"):
            kwargs.pop(name, None)
        response = super().generate_response(*args, **kwargs)
        if self._reply is not None and self._reply.entries:
            entries, self._reply.entries = self._reply.entries, []
            chat = self.object_type.startswith("chat.completion")
            logprobs = {"content": entries} if chat else _as_columns(entries)
            response["choices"][0]["logprobs"] = logprobs
        return response

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if status_code >= 400:
            # mlx-lm gives every failure to generate the status 404.
            error = sys.exception()
            if isinstance(error, Refused):
                raise error
            if status_code == 400:
                raise Refused(400, str(error))
            raise Refused(503, "the model generates nothing at the moment")
        super()._set_completion_headers(status_code)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self.streaming = True

    def _set_cors_headers(self) -> None:
        self.send_cors_headers()


def _as_columns(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Probabilities as `/v1/completions` has them."""
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {token["token"]: token["logprob"] for token in entry["top_logprobs"]}
            for entry in entries
        ],
    }
