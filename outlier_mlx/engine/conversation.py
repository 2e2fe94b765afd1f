"""A conversation: messages, and a KV cache that goes on from turn to turn."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from outlier_mlx.engine.generate import Options, context_length, stream_tokens
from outlier_mlx.errors import OutlierError
from outlier_mlx.terminal import Progress

Message = dict[str, str]


class Stopped(Exception):
    """The user ended a reply while the prompt was still being read."""


class Conversation:
    """Messages, and what the model has read of them.

    Only what the KV cache does not hold yet is read for a reply. What the model wrote stays in the
    cache as the tokens that it wrote, which need not be those that its text would be split into.

    Args:
        model: as `outlier_mlx.load` returns it.
        tokenizer: likewise; it must have a chat template.
        options: how to generate. `system_prompt` is the conversation's.

    Attributes:
        messages: as chat templates take them.
        options: may be replaced between replies.
        cache: mlx-lm's cache of each layer, or None if what it holds is not known.
        cached: the tokens that it holds.
        read: tokens that the last reply had to read.

    Raises:
        OutlierError: the model has no chat template.
    """

    def __init__(self, model: nn.Module, tokenizer: TokenizerWrapper, options: Options) -> None:
        if not tokenizer.has_chat_template:
            raise OutlierError("this model has no chat template; `outlier-mlx generate` needs none")
        if options.seed is not None:
            mx.random.seed(options.seed)
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.messages: list[Message] = []
        self.forget()

    def reset(self) -> None:
        """Begin anew, with the same system prompt."""
        self.messages = []
        self.forget()

    def set_system(self, text: str | None) -> None:
        """Change the system prompt; what was said stays."""
        self.options = replace(self.options, system_prompt=text)

    def forget(self) -> None:
        """Drop the KV cache; the next reply reads everything again."""
        self.cache: list[Any] | None = None
        self.cached: list[int] = []
        self.read = 0
        # The template's text up to the end of the last reply, and its tokens as they were read and
        # written.
        self.spoken: tuple[str, list[int]] = ("", [])

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, if that is known."""
        return context_length(self.model)

    def reply(
        self,
        text: str,
        *,
        progress: Progress | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[GenerationResponse]:
        """Say something, and get the model's reply.

        Whatever ends the reply early, what was written of it stays in the conversation; if nothing
        was, neither does the question.

        Args:
            text: the user's message.
            progress: told tokens read and tokens to read.
            stopped: asked before each step whether to end the reply.

        Yields:
            mlx-lm's responses, the last with a finish reason unless the reply was stopped.

        Raises:
            OutlierError: the template does not take the conversation, or it is too long.
        """
        self.messages.append({"role": "user", "content": text})
        answer, response = "", None
        try:
            prompt, tokens = self._prompt()
            for response in self._generate(tokens, progress, stopped):
                answer += response.text
                yield response
            if response is not None and response.finish_reason is not None:
                # The token that ended the reply is the template's to write.
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
        """The whole conversation in the template's words, and its tokens."""
        system = self.options.system_prompt
        first = [] if system is None else [{"role": "system", "content": system}]
        try:
            text = self.tokenizer.apply_chat_template(
                first + self.messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            raise OutlierError(f"the chat template does not take this: {error}") from error
        before, tokens = self.spoken
        rest = text.removeprefix(before)
        if not before or rest == text or not self._begins_apart(rest):
            tokens, rest = [], text
        tokens = tokens + self.tokenizer.encode(rest, add_special_tokens=False)
        if self.context is not None and len(tokens) >= self.context:
            raise OutlierError(
                f"the conversation has {len(tokens)} tokens, and the model takes {self.context};"
                " /reset begins anew"
            )
        return text, tokens

    def _begins_apart(self, text: str) -> bool:
        """Whether the text begins with a token that never joins what stands before it."""
        return any(text.startswith(token) for token in self.tokenizer.get_added_vocab())

    def _cache_for(self, tokens: list[int]) -> tuple[list[Any], int]:
        """A cache that holds a beginning of `tokens`, and how many of them: not all."""
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
        progress: Progress | None,
        stopped: Callable[[], bool],
    ) -> Iterator[GenerationResponse]:
        """Extend the cache by what is new in `tokens`, and by the reply.

        Between steps the cache holds exactly `cached`, and is the conversation's; within a step it
        is nobody's, so that an exception leaves it behind.
        """
        cache, known = self._cache_for(tokens)
        self.cache, self.cached = None, tokens[:known]

        def reading(done: int, total: int | None) -> None:
            if done == total:
                return
            if stopped():
                self.cache, self.cached = cache, tokens[: known + done]
                raise Stopped
            if progress is not None:
                progress(done, total)

        room = self.options.max_tokens
        if self.context is not None:
            room = min(room, self.context - len(tokens))
        options = replace(self.options, system_prompt=None, max_tokens=room)
        self.read = len(tokens) - known
        written: list[int] = []
        for response in stream_tokens(
            self.model, self.tokenizer, tokens[known:], options, cache, reading
        ):
            written.append(response.token)
            self.cache, self.cached = cache, tokens + written
            yield response
            if response.finish_reason is not None or stopped():
                return
            self.cache = None
