"""What a request's own thread and the thread that generates send to each other."""

from collections.abc import Callable
from queue import Queue
from typing import Any

from outlier_mlx.serve.mlxlm_server import GenerationArguments, GenerationContext, Prompt


class Job(Queue[Any]):
    """A request for the thread that generates, and the queue on which mlx-lm answers it.

    mlx-lm puts the context of the generation, then pairs of numbers while the prompt is processed,
    responses, and None or an exception at the end.

    Args:
        prompt: what to generate from, with its tokens.
        arguments: how to generate.
        told: called in the thread that generates, with the job, for whatever mlx-lm puts.

    Attributes:
        ended: whether nothing more will be generated.
        context: mlx-lm's, once it generates for this job.
        failures: failures of the thread that generates before this job was given to it.
    """

    def __init__(
        self, prompt: Prompt, arguments: GenerationArguments, told: "Callable[[Job], None]"
    ) -> None:
        super().__init__()
        self._told = told
        self.ended = False
        self.prompt = prompt
        self.arguments = arguments
        self.context: GenerationContext | None = None
        self.failures = 0

    @property
    def tokens(self) -> list[int]:
        """The prompt's tokens."""
        tokens: list[int] = self.prompt.tokens[0]
        return tokens

    @property
    def longest(self) -> int:
        """The largest number of tokens in its KV cache."""
        return len(self.tokens) + int(self.arguments.max_tokens)

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Called in the thread that generates."""
        if isinstance(item, GenerationContext):
            self.context = item
            if self.prompt.abandoned:
                item.stop()
        self.ended = self.ended or item is None or isinstance(item, Exception)
        self._told(self)
        super().put(item, block, timeout)

    def close(self) -> None:
        """End the generation, also if it has not begun, and wake the thread that waits for it."""
        self.prompt.abandoned = self.ended = True
        if self.context is not None:
            self.context.stop()
        super().put(None)
