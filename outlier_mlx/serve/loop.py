"""The thread that generates for all requests: it reads prompts in slices, between steps."""

import gc
import re
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from queue import Empty, Queue
from typing import Any

import mlx.core as mx

from outlier_mlx.engine.constraint import ConstraintError
from outlier_mlx.engine.steps import Counts
from outlier_mlx.serve.access import Refused
from outlier_mlx.serve.batch import Batch
from outlier_mlx.serve.jobs import Job
from outlier_mlx.serve.pace import Pace
from outlier_mlx.serve.prefix_cache import open_prefixes
from outlier_mlx.serve.provider import OneModel
from outlier_mlx.serve.sampling import choice_for
from outlier_mlx.serve.sequences import Sequence, read
from outlier_mlx.serve.single import Single
from outlier_mlx.serve.waiting import Waiting
from outlier_mlx.upstream import wired_limit

FAILED = "generation failed; try again"
NOT_LOADED = "the model could not be loaded again; try again later"
OUT_OF_MEMORY = "generation failed; try again, later or with a shorter prompt: memory ran out"
# Seconds at the end for what waits to be written to the disk.
WRITING = 1.5
# Steps after which MLX lets go of the memory that it keeps for later.
CLEAR_EVERY = 512

Watch = Callable[[list[Job]], AbstractContextManager[Any]]


def unwatched(jobs: list[Job]) -> AbstractContextManager[Any]:
    """Watch nothing."""
    return nullcontext()


class Loop:
    """The thread that loads the model, and generates with it.

    Each turn takes one step of all that is being generated, and then reads one slice of the prompts
    that wait. What fails ends the requests whose generation had begun; the thread goes on.

    Args:
        provider: the model.
        busy: whether there are requests, also those that are not in the loop yet.

    Attributes:
        jobs: requests come through it, each once there is memory for it.
        prefixes: kept caches.
        moved: time of the last turn that did something, of `time.monotonic`.
        thread: the thread; it runs until `stop`.
        counts: all steps for one sequence alone, and the drafts in them.
        watch: called for each step of generation with the jobs of the batch's rows; the step is
            taken inside the context that it returns.
    """

    watch: Watch = staticmethod(unwatched)

    def __init__(self, provider: OneModel, busy: Callable[[], bool]) -> None:
        self.jobs: Queue[Job] = Queue()
        service = provider.service
        self.prefixes = open_prefixes(service.options, service.log, service.warn)
        self.moved = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="generation")
        self._provider = provider
        self._options = provider.service.options
        self._busy = busy
        self._stopping = False
        self.counts = Counts()
        self._steps = 0
        self._begun: list[Job] = []
        self._waiting = Waiting()
        self._batches: list[Batch | Single] = []
        self._pace = Pace(1)

    def start(self) -> None:
        """Start the thread, which loads the model first."""
        self.thread.start()

    def stop(self) -> None:
        """Let the thread end after its present turn."""
        self._stopping = True

    def _run(self) -> None:
        self._provider.load_default()
        while not self._stopping and self._provider.failure is None:
            self._pace = Pace(self._provider.prefill_step)
            with wired_limit(self._provider.model):
                while not self._stopping and not self._is_idle():
                    self._guarded_turn()
            if self._stopping:
                self.prefixes.close(WRITING)
            self._unload()
            while not self._stopping and self._provider.state != "loaded":
                self._reload_for_a_request()

    def _guarded_turn(self) -> None:
        try:
            self._turn()
            return
        except Exception as error:
            reason = self._explain(error)
        # Not in the block above: the error's traceback holds on to what fills the memory.
        self._start_over(reason)

    def _turn(self) -> None:
        """Take one step of all that is generated, and read one slice of prompts."""
        self._take_in()
        self._let_go()
        if not self._batches and not self._waiting:
            return
        for batch in list(self._batches):
            self._step(batch)
        self._batches = [batch for batch in self._batches if len(batch)]
        # Whose first token is computed already gets it before others' prompts are read.
        if not any(batch.begins for batch in self._batches):
            self._read()
        self.moved = time.monotonic()

    def _take_in(self) -> None:
        """Take new jobs; wait a little for one if there is nothing else to do."""
        try:
            wait = not self._batches and not self._waiting
            while True:
                job = self.jobs.get(timeout=0.1) if wait else self.jobs.get_nowait()
                wait = False
                if not job.abandoned:
                    self._begin(job)
        except Empty:
            return

    def _begin(self, job: Job) -> None:
        """Let a job wait for its prompt to be read; what goes wrong here ends only this job."""
        self._begun.append(job)
        try:
            tokens = job.prompt.tokens
            choice = choice_for(job.request, self._provider.unaffected)
            cache, job.cached = self.prefixes.fetch(tokens)
            cache = self._provider.new_cache() if cache is None else cache
            self._waiting.add(Sequence(job, cache, job.cached, choice))
            job.answer((job.cached, len(tokens)))
        except Exception as error:
            job.answer(self._refusal(error))
        self._make_room()

    def _let_go(self) -> None:
        """Drop what nobody waits for any more."""
        self._begun = [job for job in self._begun if not job.ended]
        self._waiting.drop_abandoned()
        for batch in self._batches:
            batch.remove([sequence for sequence in batch.sequences if sequence.job.abandoned])
        self._batches = [batch for batch in self._batches if len(batch)]

    def _step(self, batch: Batch | Single) -> None:
        with self.watch([sequence.job for sequence in batch.sequences]):
            results = batch.step()
        for sequence, result in results:
            if isinstance(result, Exception):
                result = self._refusal(result)
            elif result.finish_reason is not None:
                self.prefixes.keep(sequence.tokens, sequence.cache, "assistant")
            sequence.job.answer(result)
        if isinstance(batch, Single):
            self.counts += batch.latest
        self._separate(batch)
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()

    def _read(self) -> None:
        """Read a slice of one prompt, or several short prompts; generation begins for the read."""
        room = self._options.decode_concurrency - sum(map(len, self._batches))
        if room < 1 or not self._waiting:
            return
        shared = bool(self._batches) or self._waiting.lately > 1
        most = self._slice(shared=shared)
        together = min(room, self._options.prompt_concurrency) if self._provider.batches else 1
        group = self._waiting.next_group(most, together)
        reading = [sequence for sequence in group if sequence.left]
        if reading:
            mx.synchronize()  # with the step that was prepared
            begun = time.perf_counter()
            slices = [sequence.slice(most) for sequence in reading]
            read(self._provider.model, reading, slices)
            if (quantized := self._provider.quantized) is not None:
                for sequence in reading:
                    quantized.apply(sequence.cache)
            self._pace.took(sum(map(len, slices)), time.perf_counter() - begun)
        for sequence in reading:
            self._keep_prefix(sequence)
            sequence.job.answer((len(sequence.tokens), len(sequence.job.prompt.tokens)))
        self._generate([sequence for sequence in group if not sequence.left])

    def _slice(self, *, shared: bool) -> int:
        """Tokens of a prompt to read now, at most."""
        return self._pace.tokens(shared=shared)

    def _may_be_alone(self) -> bool:
        """Whether one sequence can be generated by itself, with drafts."""
        return True

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Keep a copy of a cache where a part of the prompt ends that others can share."""
        count = len(sequence.tokens)
        kinds = [kind for end, kind in sequence.job.prompt.ends if end == count]
        if kinds:
            self.prefixes.keep(sequence.tokens[:], sequence.copied_cache(), kinds[-1])
            self._make_room()

    def _generate(self, sequences: list[Sequence]) -> None:
        """Begin to generate: all in one batch where caches can be merged, else each by itself."""
        groups = [sequences] if self._provider.batches else [[one] for one in sequences]
        for group in filter(None, groups):
            # One whose last sequence has just ended is no more to join.
            under_way = [batch for batch in self._batches if len(batch)]
            together = under_way if self._provider.batches else []
            alone = self._may_be_alone() and not together and len(group) == 1
            if alone and not group[0].job.request.experts:
                self._batches.append(self._single(group[0]))
                continue
            batch = together[0] if together else self._batch()
            if isinstance(batch, Single):
                batch, single = self._batch(), batch
                self._batches.remove(single)
                batch.go_on(single.pending())
            if batch not in self._batches:
                self._batches.append(batch)
            batch.add(group)
        # Until here: who waits is told if this fails.
        self._waiting.remove(sequences)

    def _batch(self) -> Batch:
        provider = self._provider
        return Batch(provider.model, provider.ends, provider.quantized)

    def _single(self, sequence: Sequence, *pending: mx.array) -> Single:
        provider = self._provider
        chosen = (pending[0], pending[1]) if pending else None
        return Single(
            provider.model,
            sequence,
            provider.ends,
            provider.quantized,
            provider.drafting,
            chosen,
        )

    def _separate(self, batch: Batch | Single) -> None:
        """Let the last sequence of a batch go on alone, if no other is about to come."""
        if isinstance(batch, Single) or len(batch) != 1 or batch.begins or self._waiting:
            return
        if self._may_be_alone() and not batch.sequences[0].job.request.experts:
            self._batches[self._batches.index(batch)] = self._single(*batch.pending())

    def _make_room(self) -> None:
        """Let go of kept caches that take memory which requests under way can need."""
        limits = [self._provider.memory.rest]
        if self._options.prompt_cache_bytes is not None:
            active = sum(batch.nbytes for batch in self._batches) + self._waiting.nbytes
            limits.append(max(0, self._options.prompt_cache_bytes - active))
        known = [limit for limit in limits if limit is not None]
        if known:
            self.prefixes.make_room(max(0, min(known)))

    def _is_idle(self) -> bool:
        """Whether there was no request for so long that the model is to be unloaded."""
        minutes = self._options.idle_unload
        if minutes is None or self._busy() or not self.jobs.empty():
            return False
        return time.monotonic() - self.moved >= 60 * minutes

    def _unload(self) -> None:
        """Let go of the model, and of all that was computed with it, in the thread that made it."""
        self._forget()
        self._provider.unload()
        if self._stopping:  # nobody needs the memory, and whoever stops the server waits
            return
        gc.collect()
        mx.clear_cache()
        self._provider.service.log("the model is unloaded, until the next request")

    def _forget(self) -> None:
        """Let go of all caches."""
        self._batches, self._waiting = [], Waiting()
        self.prefixes.clear()

    def _reload_for_a_request(self) -> None:
        """Wait a little for a request, and load the model for it, which takes no request away."""
        with self.jobs.not_empty:
            if not self.jobs.queue and not self.jobs.not_empty.wait(0.1):
                return
        begun = time.monotonic()
        try:
            self._provider.reload()
        except Exception as error:
            self._provider.service.warn(f"the model could not be loaded again: {error}")
        if self._provider.state != "loaded":
            while not self.jobs.empty():
                self.jobs.get_nowait().answer(Refused(503, NOT_LOADED))
            return
        if self._options.cache_dir is not None:  # the files may be of other weights now
            self.prefixes.close(0)
            service = self._provider.service
            self.prefixes = open_prefixes(self._options, service.log, service.warn)
        self.moved = time.monotonic()
        self._provider.service.log(f"the model is loaded again: {self.moved - begun:.1f} s")

    def _refusal(self, error: Exception) -> Refused:
        """What to tell the client of the one request that failed.

        Only what a client demanded itself is named: other errors can name files of the server. It
        would be in vain to send the same demand again, so it gets no status that asks for that.
        """
        if isinstance(error, ConstraintError):
            return Refused(400, str(error), "invalid_json_schema")
        return Refused(503, self._explain(error))

    def _explain(self, error: Exception) -> str:
        """Log why generation failed; returns what to tell clients."""
        text = f"{type(error).__name__}: {error}"
        self._provider.service.warn(f"generation failed: {text}")
        return OUT_OF_MEMORY if re.search("memory|alloc", text, re.IGNORECASE) else FAILED

    def _start_over(self, reason: str) -> None:
        """End all that had begun, and let go of all caches."""
        self._forget()
        gc.collect()
        mx.clear_cache()
        for job in self._begun:
            if not job.ended:
                job.answer(Refused(503, reason))
        self._begun = []
