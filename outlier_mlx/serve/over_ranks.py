"""Serving over several ranks: rank 0 has the clients, and all ranks take the same turns.

Each turn begins with a message of rank 0: which requests are new, which nobody waits for any more,
and how much of a prompt is read. All else follows from that on every rank, but for the tokens,
which are those that rank 0 chooses.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from queue import Empty
from typing import Any, NoReturn

import mlx.core as mx

from outlier_mlx.engine.distributed.launcher import LOST, is_lost
from outlier_mlx.engine.distributed.ranks import PeerError, ranks, shared
from outlier_mlx.engine.steps import Processor
from outlier_mlx.errors import OutlierError
from outlier_mlx.serve.connections import Connections
from outlier_mlx.serve.http import Service
from outlier_mlx.serve.jobs import Job, Token
from outlier_mlx.serve.loop import Loop
from outlier_mlx.serve.options import ServeOptions
from outlier_mlx.serve.prefix_cache import CONVERSATIONS, PrefixCache
from outlier_mlx.serve.provider import Load, OneModel
from outlier_mlx.serve.request import Request
from outlier_mlx.serve.sampling import Choice, choice_for
from outlier_mlx.serve.segments import Prompt
from outlier_mlx.serve.sequences import Sequence
from outlier_mlx.upstream import greedy_sampler

# Seconds after which rank 0 tells idle ranks something: only then does it notice one that is gone.
_STILL_HERE = 3.0


class SharedJob(Job):
    """A job that all ranks have; on rank 0, it stands for that of a request.

    Args:
        number: the same on all ranks.
        prompt: its tokens.
        max_tokens: largest number of tokens in the reply.
        real: the request's job; None: it is another rank's.
        choice: how tokens are chosen; where `real` is None, it has no effect.

    Attributes:
        failure: what a logits processor raised.
    """

    def __init__(
        self,
        number: int,
        prompt: Prompt,
        max_tokens: int,
        real: Job | None = None,
        choice: Choice | None = None,
    ) -> None:
        request = Request() if real is None else real.request
        super().__init__(request, prompt, max_tokens, lambda _: None)
        self.number, self.real = number, real
        self.failure: Exception | None = None
        given = choice or Choice(greedy_sampler)
        guarded = tuple(self._guarded(process) for process in given.processors)
        self.choice = Choice(given.sampler, guarded)
        if real is not None:
            self.passes = real.passes

    def answer(self, item: tuple[int, int] | Token | Exception) -> None:
        """Tell the request, if there is one here."""
        if isinstance(item, Exception) or (isinstance(item, Token) and item.finish_reason):
            self.ended = True
        if self.real is not None:
            self.real.cached = self.cached
            self.real.answer(item)

    def drop(self) -> None:
        """Let nobody wait for it."""
        self.abandoned = self.ended = True

    def _guarded(self, process: Processor) -> Processor:
        """What fails on one rank must not end a step there alone: the job is dropped after it."""

        def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
            try:
                return logits if self.failure else process(tokens, logits)
            except Exception as error:
                self.failure = error
                return logits

        return guarded


class RanksLoop(Loop):
    """The thread that generates, with the same turns on all ranks; see `Loop`.

    Kept caches are limited by their number. All of them go when rank 0 has no memory for them.

    Attributes:
        tell: called with the reason that ends this rank.
    """

    def __init__(self, provider: OneModel, busy: Callable[[], bool]) -> None:
        super().__init__(provider, busy)
        # What is kept must not depend on the clock, or on the sizes of a rank's heads.
        clock, options = count(), provider.service.options
        self.prefixes = PrefixCache(
            options.prompt_cache_size or CONVERSATIONS,
            None,
            quantized_from=options.quantized_kv_start,
            now=lambda: float(next(clock)),
        )
        self._numbers = count()
        self._shared: dict[int, SharedJob] = {}
        self._most = 1
        self._told = time.monotonic()
        self.tell = lambda reason: provider.service.warn(f"error: {reason}")

    def _run(self) -> None:
        super()._run()
        if ranks().leads and self._provider.failure is None:
            with suppress(RuntimeError):  # they may be gone
                shared({"stop": True})

    def _guarded_turn(self) -> None:
        try:
            self._turn()
        except Exception as error:
            # But for what `PeerError` says, others are in the middle of the same turn, and wait.
            told = isinstance(error, PeerError)
            lost = is_lost(error)
            if ranks().leads or not (told or lost):
                kind = "" if isinstance(error, OutlierError) else f"{type(error).__name__}: "
                self.tell(LOST if lost else f"{kind}{error}")
            os._exit(1)

    def _take_in(self) -> None:
        self._shared = {n: job for n, job in self._shared.items() if not job.ended}
        news, new = self._news() if ranks().leads else (None, [])
        if ranks().leads and news is None:
            return
        told, self._told = shared(news), time.monotonic()
        if told.get("stop"):
            self._stopping = True
            return
        if told["clear"]:
            self.prefixes.clear()
        for number in told["gone"]:
            self._shared[number].drop()
        self._most = told["most"]
        if not ranks().leads:
            new = [_described(words) for words in told["jobs"]]
        for job in new:
            self._shared[job.number] = job
            self._begin_together(job)

    def _news(self) -> tuple[dict[str, Any] | None, list[SharedJob]]:
        """What rank 0 tells, None for nothing, and its jobs in that."""
        new = self._new_jobs()
        idle = not new and not self._batches and not self._waiting
        if idle and time.monotonic() < self._told + _STILL_HERE:
            return None, []
        gone = []
        for job in self._shared.values():
            if job.failure is not None and not job.ended:
                job.answer(self._refusal(job.failure))
                gone.append(job.number)
            elif job.real is not None and job.real.abandoned:
                gone.append(job.number)
        rest = self._provider.memory.rest
        crowded = bool(self._batches) or self._waiting.lately > 1
        news = {
            "jobs": [_words(job) for job in new],
            "gone": gone,
            "most": self._pace.tokens(shared=crowded),
            "clear": rest is not None and self.prefixes.nbytes > max(0, rest),
        }
        return news, new

    def _new_jobs(self) -> list[SharedJob]:
        """New requests; waits a little for one if there is nothing else to do."""
        new: list[SharedJob] = []
        wait = not self._batches and not self._waiting
        try:
            while True:
                job = self.jobs.get(timeout=0.1) if wait else self.jobs.get_nowait()
                wait = False
                if job.abandoned:
                    continue
                try:
                    choice = choice_for(job.request, self._provider.unaffected)
                except Exception as error:
                    job.answer(self._refusal(error))
                    continue
                number = next(self._numbers)
                new.append(SharedJob(number, job.prompt, job.max_tokens, job, choice))
        except Empty:
            return new

    def _begin_together(self, job: SharedJob) -> None:
        tokens = job.prompt.tokens
        cache, job.cached = self.prefixes.fetch(tokens)
        cache = self._provider.new_cache() if cache is None else cache
        self._waiting.add(Sequence(job, cache, job.cached, job.choice))
        job.answer((job.cached, len(tokens)))

    def _slice(self, *, shared: bool) -> int:
        return self._most

    def _may_be_alone(self) -> bool:
        # One alone differs in that it has drafts, and here there are none.
        return False

    def _make_room(self) -> None:
        return


def _words(job: SharedJob) -> dict[str, Any]:
    prompt = job.prompt
    return {
        "number": job.number,
        "tokens": list(map(int, prompt.tokens)),
        "ends": list(prompt.ends),
        "max_tokens": job.max_tokens,
    }


def _described(words: dict[str, Any]) -> SharedJob:
    ends = tuple((end, kind) for end, kind in words["ends"])
    return SharedJob(words["number"], Prompt(words["tokens"], ends), words["max_tokens"])


def follow(name: str, load: Load, options: ServeOptions, tell: Callable[[str], None]) -> NoReturn:
    """Serve as another rank than the first, until that ends; then end the process.

    Args:
        name: the model's name.
        load: see `server.serve`.
        options: the server's; only those of generation count here.
        tell: called with the reason that ends this rank, if the others cannot know it.

    Raises:
        OutlierError: the model cannot be loaded.
    """

    def nothing(_: str) -> None:
        return

    service = Service(name, options, options.access(), nothing, nothing, Connections(1))
    provider = OneModel(service, load)
    loop = RanksLoop(provider, lambda: True)
    loop.tell = tell
    loop.start()
    provider.loaded.wait()
    if provider.failure is not None:
        raise provider.failure
    status = 0
    try:
        loop.thread.join()
    except (KeyboardInterrupt, SystemExit) as end:  # by a signal
        status = getattr(end, "code", 128 + signal.SIGINT)
    os._exit(status)  # as `server.serve` does it
