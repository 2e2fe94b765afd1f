"""What a request's own thread and the thread that generates send to each other."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Queue
from typing import Any

from outlier_mlx.engine.experts import Pass
from outlier_mlx.engine.steps import Counts
from outlier_mlx.serve.request import Request
from outlier_mlx.serve.segments import Prompt


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        token: its id.
        logprob: its log probability, after the logits processors.
        finish_reason: "stop" if it ends the text and is no part of it, "length" if it is the last
            one that was asked for, else None.
        top_tokens: the likeliest tokens and their log probabilities, as many as the request asks
            for, in no order.
        taken: the pass that computed it, and its row there, if the request asks for its experts.
    """

    token: int
    logprob: float
    finish_reason: str | None = None
    top_tokens: tuple[tuple[int, float], ...] = ()
    taken: tuple[Pass, int] | None = None


class Job(Queue[Any]):
    """A request for the thread that generates, and the queue on which that thread answers.

    It gets pairs of numbers while the prompt is read, then each `Token`, and an exception if
    generation fails.

    Args:
        request: what to generate.
        prompt: its tokens.
        max_tokens: largest number of tokens in the reply.
        ends: called in the thread that generates when nothing more will be generated.

    Attributes:
        cached: number of the prompt's tokens whose cache was kept from an earlier request.
        counts: steps that it took alone, tokens of drafts that were checked in them (in OpenAI's
            words predicted), and those of them that are in the reply.
        ended: whether nothing more will be generated.
        abandoned: whether nobody waits for the reply any more.
        passes: the passes that computed tokens which are not told yet, and its row in each.
    """

    def __init__(
        self, request: Request, prompt: Prompt, max_tokens: int, ends: "Callable[[Job], None]"
    ) -> None:
        super().__init__()
        self.request = request
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.cached = 0
        self.counts = Counts()
        self.ended = False
        self.abandoned = False
        self.passes: deque[tuple[Pass, int]] = deque()
        self._ends = ends

    @property
    def longest(self) -> int:
        """The largest number of tokens in its KV cache."""
        return len(self.prompt.tokens) + self.max_tokens

    def answer(self, item: tuple[int, int] | Token | Exception) -> None:
        """Called in the thread that generates."""
        last = isinstance(item, Token) and item.finish_reason is not None
        self.put(item)
        if last or isinstance(item, Exception):
            self.ended = True
            self._ends(self)

    def close(self) -> None:
        """End the generation, also if it has not begun, and wake the thread that waits for it."""
        self.abandoned = self.ended = True
        self.put(None)
