"""A conversation: its messages, and a KV cache that is kept from turn to turn."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.drafting import Drafting
from outlier_mlx.engine.generate import (
    Options,
    context_limit,
    generate_from_tokens,
)
from outlier_mlx.engine.responses import Response
from outlier_mlx.engine.templates import render
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutlierError
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.upstream import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

Message = dict[str, str]


class Stopped(Exception):
    """The user stopped a reply while the prompt was still being processed."""


class Conversation:
    """The messages of a conversation and their KV cache.

    For each reply, only the tokens that are not in the KV cache yet are processed. The cache keeps
    the model's own tokens. The tokenizer might split the same text into other tokens.

    Args:
        model: the model that `outlier_mlx.load` returns.
        tokenizer: the tokenizer that `outlier_mlx.load` returns; it must have a chat template.
        options: options of generation; `system_prompt` belongs to the conversation.
        drafting: guesses at next tokens; None: looked up in the conversation where that pays.

    Attributes:
        messages: messages with "role" and "content", as chat templates expect them.
        options: may be replaced between replies.
        cache: mlx-lm's cache of each layer, or None if its content is not known.
        cached: the tokens in the cache.
        read: number of prompt tokens that the last reply had to process.

    Raises:
        OutlierError: the model has no chat template.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        options: Options,
        drafting: Drafting | None = None,
    ) -> None:
        if not tokenizer.has_chat_template:
            raise OutlierError("this model has no chat template; `outlier-mlx generate` needs none")
        if options.seed is not None:
            mx.random.seed(options.seed)
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.drafting = drafting or Drafting(model)
        self.messages: list[Message] = []
        self.forget()

    def reset(self) -> None:
        """Start a new conversation with the same system prompt."""
        self.messages = []
        self.forget()

    def set_system(self, text: str | None) -> None:
        """Change the system prompt and keep the messages."""
        self.options = replace(self.options, system_prompt=text)

    def forget(self) -> None:
        """Drop the KV cache; the next reply processes all messages again."""
        self.cache: list[Any] | None = None
        self.cached: list[int] = []
        self.read = 0
        # The rendered conversation up to the end of the last reply, and the tokens that the model
        # read and wrote for it.
        self.spoken: tuple[str, list[int]] = ("", [])

    @property
    def context(self) -> int | None:
        """Tokens that the conversation can have; see `context_limit`."""
        return context_limit(self.model, self.options)

    def reply(
        self,
        text: str,
        *,
        progress: Progress = no_progress,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Response]:
        """Send a message, and generate the model's reply.

        A reply that ends early stays in the conversation as far as it was written. If nothing was
        written, the user's message is removed again.

        Args:
            text: the user's message.
            progress: progress callback (prompt tokens processed, prompt tokens in total).
            stopped: called before each step; True ends the reply.

        Yields:
            mlx-lm's responses. The last one has a finish reason unless the reply was stopped.

        Raises:
            OutlierError: the chat template fails, or the conversation is too long.
        """
        self.messages.append({"role": "user", "content": text})
        answer, response = "", None
        try:
            prompt, tokens = self._prompt()
            for response in self._generate(tokens, progress, stopped):
                answer += response.text
                yield response
            if response is not None and response.finish_reason is not None:
                # The template itself writes the token that ends the reply.
                end = -1 if response.finish_reason == "stop" else None
                self.spoken = (prompt + answer, tokens + self.cached[len(tokens) : end])
        except Stopped:
            pass
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def _prompt(self) -> tuple[str, list[int]]:
        """The whole conversation as rendered text, and its tokens."""
        system = self.options.system_prompt
        first = [] if system is None else [{"role": "system", "content": system}]
        text = render(self.tokenizer, first + self.messages, add_generation_prompt=True)
        before, tokens = self.spoken
        rest = text.removeprefix(before)
        if not before or rest == text or not self._begins_apart(rest):
            tokens, rest = [], text
        tokens = tokens + self.tokenizer.encode(rest, add_special_tokens=False)
        if self.context is not None and len(tokens) >= self.context:
            raise OutlierError(
                f"the conversation has {len(tokens)} tokens; the context length is {self.context};"
                " /reset starts a new conversation"
            )
        return text, tokens

    def _begins_apart(self, text: str) -> bool:
        """Whether the text begins with an added token, which never merges with text before it."""
        return any(text.startswith(token) for token in self.tokenizer.get_added_vocab())

    def _cache_for(self, tokens: list[int]) -> tuple[list[Any], int]:
        """A cache of a prefix of `tokens`, and the prefix's length: less than all tokens."""
        if self.cache is not None:
            pairs = zip(self.cached, tokens[:-1], strict=False)
            known = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
            if known is None:
                known = min(len(self.cached), len(tokens) - 1)
            surplus = len(self.cached) - known
            if not surplus:
                return self.cache, known
            if known and can_trim_prompt_cache(self.cache):
                trim_prompt_cache(self.cache, surplus)
                return self.cache, known
        return make_prompt_cache(self.model, self.options.max_kv_size), 0

    def _generate(
        self,
        tokens: list[int],
        progress: Progress,
        stopped: Callable[[], bool],
    ) -> Iterator[Response]:
        """Add the new `tokens` and the reply to the cache.

        Between steps, `self.cache` holds exactly the tokens `self.cached`. During a step it is
        None, so that after an exception no cache of unknown content is used.
        """
        cache, known = self._cache_for(tokens)
        self.cache, self.cached = None, tokens[:known]

        def reading(done: int, total: int | None) -> None:
            if done == total:
                return
            if stopped():
                self.cache, self.cached = cache, tokens[: known + done]
                raise Stopped
            progress(done, total)

        room = self.options.max_tokens
        if self.context is not None:
            room = min(room, self.context - len(tokens))
        options = replace(self.options, system_prompt=None, max_tokens=room)
        self.read = len(tokens) - known
        written: list[int] = []
        responses = generate_from_tokens(
            self.model,
            self.tokenizer,
            tokens[known:],
            options,
            cache,
            reading,
            before=tokens[:known],
            drafting=self.drafting,
        )
        # When it is closed, the cache holds what was yielded and nothing else.
        with closing(responses):
            for response in responses:
                written.append(response.token)
                self.cache, self.cached = cache, tokens + written
                yield response
                if response.finish_reason is not None or stopped():
                    return
                self.cache = None
