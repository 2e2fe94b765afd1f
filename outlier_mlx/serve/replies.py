"""The reply to one request, while it is generated."""

import math
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.calls import CallReader, reads_calls
from outlier_mlx.serve.experts import described
from outlier_mlx.serve.generator import Generator
from outlier_mlx.serve.jobs import Token
from outlier_mlx.serve.pieces import Piece, Splitter
from outlier_mlx.serve.request import Request
from outlier_mlx.terminal import Progress
from outlier_mlx.upstream import TextStateMachine

NOT_A_NUMBER = (
    "the model's output is not a number: its activations overflowed in float16 (serve it with"
    " --dtype bfloat16 or --dtype float32), or its weights are damaged (see `outlier-mlx verify`)"
)


class Reply:
    """The reply to one request.

    It notices that a client disconnected even while nothing is being sent. It finds stop words also
    when the model writes them with other tokens than the tokenizer would. It reads tool calls, and
    it collects log probabilities.

    Args:
        generator: generates.
        request: what to generate.
        connection: the client's.

    Attributes:
        max_tokens: largest number of tokens in the reply; the context may leave fewer than the
            request allows.
        prompt_tokens: number of tokens in the prompt.
        completion_tokens: number of tokens that were generated so far.
        reasoning_tokens: number of those that are reasoning, with the mark that ends it.

    Raises:
        Refused: the prompt is not possible.
    """

    def __init__(self, generator: Generator, request: Request, connection: socket.socket) -> None:
        self.generator = generator
        self.request = request
        self._job = generator.prepare(request)
        self.max_tokens: int = self._job.max_tokens
        self.prompt_tokens = len(self._job.prompt.tokens)
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._connection = connection
        self._responses: Iterator[Token] = iter(())
        self._logprobs: list[dict[str, Any]] = []
        self._stop_word: str | None = None
        self._experts: list[dict[str, Any]] = []

    @property
    def cached_tokens(self) -> int:
        """Number of the prompt's tokens that were in the prompt cache."""
        return self._job.cached

    @property
    def drafts(self) -> tuple[int, int]:
        """Tokens of drafts that were accepted, and that were rejected."""
        counts = self._job.counts
        return counts.accepted, counts.drafted - counts.accepted

    @property
    def generated(self) -> bool:
        """Whether nothing more will be generated."""
        return self._job.ended

    def start(self, progress: Progress) -> None:
        """Wait until generation begins.

        Args:
            progress: called with numbers of tokens while the prompt is processed.

        Raises:
            Refused: generation failed.
            ConnectionError: the client disconnected.
        """
        self.generator.enter(self._job)
        self._responses = self.generator.begin(self._job, self.check, progress)

    def close(self) -> None:
        """End the reply, so that another request can take its place in the batch."""
        self.generator.leave(self._job)

    def pieces(self) -> Iterator[Piece]:
        """What is generated, up to the first stop word. Only the last piece has a finish reason."""
        splitter = self._splitter()
        called = 0
        for text, reason in self._until_stop_word():
            self.reasoning_tokens += splitter.reasons
            piece = splitter.feed(text)
            if reason is not None:
                piece.add(splitter.end(cut=reason == "length"))
            called += len(piece.calls)
            if called > splitter.writing and not self.request.parallel_calls:
                # The first call is complete, or a second one has begun.
                del piece.calls[len(piece.calls) - called + 1 :]
                reason = "stop"
            piece.finish_reason = "tool_calls" if called and reason == "stop" else reason
            if piece:
                piece.logprobs, self._logprobs = self._logprobs, []
                piece.stop_word = self._stop_word
                piece.experts, self._experts = self._experts, []
                yield piece
            if reason is not None:
                return

    def _splitter(self) -> Splitter:
        provider = self.generator.provider
        tokenizer = provider.tokenizer
        if self.request.messages is None:
            return Splitter(TextStateMachine(), "normal", None, reads=False)
        reader = CallReader(tokenizer, self.request.tools) if reads_calls(tokenizer) else None
        return Splitter(
            provider.machine,
            self._job.prompt.initial,
            reader,
            reads=bool(self.request.tools),
            streams=self.request.stream,
        )

    def _until_stop_word(self) -> Iterator[tuple[str, str | None]]:
        """The text of each token up to the first stop word; with the last, "stop" or "length"."""
        words = self.request.stop
        # Each word leads to a state that tells which one it was.
        states: dict[str, list[Any]] = {f"stop {number}": [] for number in range(len(words))}
        machine = TextStateMachine({"normal": list(zip(words, states, strict=True))} | states)
        state = machine.make_state("normal")
        text_of = self._detokenizer()
        for response in self._responses:
            if math.isnan(response.logprob):
                raise Refused(500, NOT_A_NUMBER)
            self.completion_tokens += 1
            if self.request.alternatives is not None and response.finish_reason != "stop":
                self._logprobs.append(self._chosen_and_alternatives(response))
            text = text_of(response)
            if response.taken is not None and response.finish_reason != "stop":
                self._experts.append(described(text, response.taken))
            state, segments = TextStateMachine.split(state, text)
            text = segments[0][1]
            if len(segments) > 1:
                self._stop_word = words[list(states).index(segments[1][0])]
                yield text, "stop"
                return
            if response.finish_reason is not None:
                text += TextStateMachine.flush(state)[1]
                yield text, "length" if response.finish_reason == "length" else "stop"
                return
            yield text, None
        yield "", "stop"

    def _detokenizer(self) -> Callable[[Token], str]:
        """A function that gives the text that each response adds."""
        tokenizer = self.generator.provider.tokenizer
        if self.request.messages is None:
            tokenizer = tokenizer.after(self._job.prompt.tokens)
        detokenizer = tokenizer.detokenizer

        def text_of(response: Token) -> str:
            try:
                return detokenizer.piece(response.token, response.finish_reason)
            except Exception as error:  # the tokenizer's: only this reply fails
                reason = f"{type(error).__name__}: {error}"
                told = f"the text of token {response.token} cannot be decoded: {reason}"
                raise Refused(500, told) from None

        return text_of

    def check(self) -> None:
        """Check that somebody still wants the reply.

        Raises:
            Refused: 503, the server is shutting down.
            ConnectionError: the client disconnected.
        """
        if self._job.abandoned:
            raise Refused(503, "the server is shutting down")
        readable = select.poll()
        readable.register(self._connection, select.POLLIN)
        if readable.poll(0) and not self._connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError("the client disconnected")

    def _chosen_and_alternatives(self, response: Token) -> dict[str, Any]:
        """The chosen token and the likeliest tokens, in the format of OpenAI's API."""
        # JSON has no infinity; such a token is not allowed.
        possible = (pair for pair in response.top_tokens if math.isfinite(pair[1]))
        ranked = sorted(possible, key=lambda pair: -pair[1])
        chosen = self._token(response.token, response.logprob)
        chosen["top_logprobs"] = [self._token(*pair) for pair in ranked]
        return chosen

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        """A token with its text, or with its vocabulary name if it is part of a character."""
        tokenizer = self.generator.provider.tokenizer
        begins = self.completion_tokens == 1 and self.request.messages is not None
        text = tokenizer.decode([token]) if begins else tokenizer.within(token)
        if "\ufffd" in text:
            name = tokenizer.convert_ids_to_tokens(token)
            return {"token": name, "id": token, "logprob": logprob, "bytes": None}
        return {"token": text, "id": token, "logprob": logprob, "bytes": list(text.encode())}
