"""Generation for all requests in one thread: the prompt cache, and the thread."""

import gc
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from outlier_mlx.errors import OutlierError
from outlier_mlx.models.token_ids import check_ids
from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.jobs import Job
from outlier_mlx.serve.mlxlm_server import Response, ResponseGenerator, as_mlx_lm
from outlier_mlx.serve.prefix_cache import Kind, PrefixCache
from outlier_mlx.serve.provider import OneModel
from outlier_mlx.serve.request import Request
from outlier_mlx.terminal import Progress

if TYPE_CHECKING:
    from outlier_mlx.serve.replies import Reply

FAILED = "generation failed; try again"
NOT_LOADED = "the model could not be loaded again; try again later"
OUT_OF_MEMORY = "generation failed; try again, later or with a shorter prompt: memory ran out"


class _PromptCache:
    """The prefix cache as mlx-lm's server asks for it.

    Args:
        prefixes: the caches.
        rest: gives the bytes that requests under way leave; None: no limit.
    """

    def __init__(self, prefixes: PrefixCache, rest: Callable[[], int | None]) -> None:
        self.prefixes = prefixes
        self._rest = rest

    @property
    def nbytes(self) -> int:
        """Size of all caches, in bytes."""
        return self.prefixes.nbytes

    def __len__(self) -> int:
        return 0

    def stats_by_type(self) -> dict[str, Any]:
        """Nothing: it would only be logged."""
        return {}

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """The cache of the longest known prefix, and the tokens after that prefix."""
        cache, count = self.prefixes.fetch(tokens)
        self.prefixes.make_room(self._rest())
        return cache, tokens[count:]

    def insert_cache(
        self, model: Any, tokens: list[int], cache: Any, *, cache_type: Kind = "assistant"
    ) -> None:
        """Keep a cache."""
        self.prefixes.keep(tokens, cache, cache_type)
        # The cache of a whole conversation is where it was, in memory that was taken for it; that
        # of the beginning of a prompt is a copy.
        if cache_type != "assistant":
            self.prefixes.make_room(self._rest())

    def trim_to(self, *, n_bytes: int) -> None:
        """Let go of caches until those that are kept have at most so many bytes."""
        self.prefixes.make_room(max(0, n_bytes))


class _Idle(Exception):
    """There was no request for so long that the model is to be unloaded."""


class Generator(ResponseGenerator):
    """Generates for all requests in one thread, which continues after an error.

    Attributes:
        replies: replies that are being generated.
        pool: threads that wait for replies, for clients that ask for several at a time.
    """

    def __init__(self, provider: OneModel) -> None:
        self.provider = provider
        self.replies: set[Reply] = set()
        self.pool = ThreadPoolExecutor(provider.service.options.decode_concurrency, "reply")
        # Jobs that began before the latest failure get no more tokens, but its reason.
        self._failures = 0
        self._reason = FAILED
        self._stepped = time.monotonic()
        super().__init__(provider, self._new_cache())

    def _new_cache(self) -> _PromptCache:
        options = self.provider.service.options
        prefixes = PrefixCache(options.prompt_cache_size, options.prompt_cache_bytes)
        return _PromptCache(prefixes, lambda: self.provider.memory.rest)

    def _run_generate(self) -> None:
        self.provider.load_default()
        while not self._stop and self.provider.failure is None:
            idle = False
            try:
                self._generate()
                return
            except _Idle:
                idle = True
            except Exception as error:
                self._reason = self._explain(error)
            # Not in the block above: the error's traceback holds on to what fills the memory.
            if not idle:
                self._start_over()
                continue
            self._unload()
            while not self._stop and self.provider.state != "loaded":
                self._reload_for_a_request()

    def _next_request(self, timeout: float | None = None) -> Any:
        """Called by mlx-lm for the next request; with a time-out if it does nothing else.

        Raises:
            _Idle: there was none for so long that the model is to be unloaded.
        """
        request = super()._next_request(timeout)
        minutes = self.provider.service.options.idle_unload
        if request is not None or timeout is None or minutes is None or self.replies:
            return request
        if time.monotonic() - self._stepped < 60 * minutes or not self.requests.empty():
            return None
        raise _Idle

    def _unload(self) -> None:
        self.provider.unload()
        self.prompt_cache = self._new_cache()
        gc.collect()
        mx.clear_cache()
        self.provider.service.log("the model is unloaded, until the next request")

    def _reload_for_a_request(self) -> None:
        """Wait a little for a request, and load the model for it, which takes no request away."""
        with self.requests.not_empty:
            if not self.requests.queue and not self.requests.not_empty.wait(0.1):
                return
        begun = time.monotonic()
        try:
            self.provider.reload()
        except Exception as error:
            self.provider.service.warn(f"the model could not be loaded again: {error}")
            self._reason = NOT_LOADED
        if self.provider.state != "loaded":
            self._start_over()
            return
        self._stepped = time.monotonic()
        self.provider.service.log(f"the model is loaded again: {self._stepped - begun:.1f} s")

    def _explain(self, error: Exception) -> str:
        """Log why generation failed; returns what to tell clients."""
        text = f"{type(error).__name__}: {error}"
        self.provider.service.warn(f"generation failed: {text}")
        return OUT_OF_MEMORY if re.search("memory|alloc", text, re.IGNORECASE) else FAILED

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
        """Whether the thread that generates runs."""
        return self._generation_thread.is_alive()

    def idle(self) -> float:
        """Seconds since the last step of generation; 0 if there is nothing to generate, or with."""
        if self.provider.state != "loaded":
            return 0.0
        waited = time.monotonic() - self._stepped
        return waited if any(not reply.generated for reply in list(self.replies)) else 0.0

    def enter(self, reply: "Reply") -> None:
        """Register a reply that is going to be generated."""
        if not self.replies:
            self._stepped = time.monotonic()
        self.replies.add(reply)

    def leave(self, reply: "Reply", job: Job) -> None:
        """End a reply and its job."""
        job.close()
        self.provider.memory.give_back(job)
        self.replies.discard(reply)
        if not self.replies:
            self._stepped = time.monotonic()

    def _told(self, job: Job) -> None:
        """Called in the thread that generates for whatever a job gets."""
        self._stepped = time.monotonic()
        if job.ended:
            self.provider.memory.give_back(job)

    def prepare(self, request: Request) -> Job:
        """Tokenize a request's prompt, in the calling thread, so that nobody else waits for it.

        Args:
            request: what to generate; its stop words are left to the caller.

        Returns:
            A job for `begin`; its `arguments.max_tokens` are at most what the context leaves.

        Raises:
            Refused: 400, for a prompt that cannot be tokenized or exceeds the context.
        """
        prompt, arguments = as_mlx_lm(request, self.provider.service.name)
        prompt.tokens = self._tokenize_now(prompt, arguments)
        return Job(prompt, arguments, self._told)

    def begin(self, job: Job, check: Callable[[], None], progress: Progress) -> Iterator[Response]:
        """Wait until there is memory for a job, and generation begins.

        Args:
            job: what to generate.
            check: called whenever something was generated, and once a second; what it raises ends
                the iteration.
            progress: progress callback (prompt tokens processed, prompt tokens in total).

        Returns:
            mlx-lm's responses; iterating raises the same errors.

        Raises:
            Refused: 503, because generation failed.
        """
        self.provider.memory.take(job, job.longest, check)
        job.failures = self._failures
        self.requests.put((job, job.prompt, job.arguments))
        items = self._items(job, check, progress)
        next(items)  # the context, which the job keeps
        return items

    def _items(self, job: Job, check: Callable[[], None], progress: Progress) -> Iterator[Any]:
        while True:
            try:
                item = job.get(timeout=1.0)
            except Empty:
                check()
                if job.failures != self._failures or not self.generation_available():
                    raise Refused(503, self._reason) from None
                continue
            check()
            if item is None:
                return
            if isinstance(item, Exception):
                raise Refused(503, self._explain(item)) from None
            if isinstance(item, tuple):
                progress(*item)
                continue
            yield item

    def _tokenize(self, tokenizer: TokenizerWrapper, request: Any, args: Any) -> Any:
        """Called by mlx-lm in the thread that generates; what it raises ends only this job."""
        if request.abandoned:
            raise ConnectionError("nobody waits for this reply")
        return request.tokens

    def _tokenize_now(self, request: Any, args: Any) -> Any:
        try:
            tokenized = request.tokens or super()._tokenize(self.provider.prompts, request, args)
        except Refused:
            raise
        except OutlierError as error:
            raise Refused(400, str(error)) from None
        except Exception as error:
            raise Refused(400, f"the prompt cannot be read: {error}") from None
        prompt = tokenized[0]
        if not isinstance(prompt, list) or not prompt:
            raise Refused(400, "the prompt is empty")
        try:
            check_ids(prompt, self.provider.rows, "the prompt")
        except OutlierError as error:
            raise Refused(400, str(error)) from None
        self._bound(prompt, args)
        return tokenized

    def _bound(self, prompt: list[int], arguments: Any) -> None:
        """Bound the number of tokens to generate by the context and by the memory.

        Raises:
            Refused: 400, nothing can be generated.
        """
        context, fit = self.provider.limits.context, self.provider.memory.tokens
        if context is not None and len(prompt) >= context:
            raise Refused(
                400,
                f"the prompt has {len(prompt)} tokens; the context length is {context}",
                "context_length_exceeded",
            )
        if fit is not None and len(prompt) >= fit:
            raise Refused(
                400,
                f"the prompt has {len(prompt)} tokens; this server has memory for {fit}",
                "insufficient_memory",
            )
        room = min(limit for limit in (context, fit, 1 << 31) if limit is not None) - len(prompt)
        arguments.max_tokens = min(arguments.max_tokens, room)

    def stop(self, seconds: float) -> bool:
        """End all replies and the thread; returns whether the thread ended within `seconds`."""
        self._stop = True
        for reply in list(self.replies):
            reply.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._generation_thread.join(seconds)
        return not self._generation_thread.is_alive()
