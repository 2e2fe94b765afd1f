"""Parts of files, read by a few threads into the buffers in which they are used.

A read that fails leaves its buffers half full, and one that never ends may still fill them later:
they may be used again only when `Reading.done`.
"""

import fcntl
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

import numpy as np

from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.paths import inside

#: Seconds in which no read ends, after which those under way are given up.
TIMEOUT = 30.0
#: Seconds between two calls of what is done while a reading is waited for.
MEANWHILE_EVERY = 0.003

# Where direct reads may begin and end, in a file and in memory: a multiple of every disk's sector,
# and of macOS's pages. Its F_NOCACHE reads between pages go through the page cache.
ALIGNMENT = 16384


class OpenFile:
    """A file that stays open, and how to tell that it is no longer the one at its path."""

    def __init__(self, path: Path, direct: bool = False) -> None:
        """Open a file.

        Args:
            path: where it is.
            direct: read past the page cache, where the system and the file's disk can.

        Raises:
            CheckpointError: there is no file, or it is a link out of its folder.
            OutlierError: it cannot be opened.
        """
        self.path = inside(path.parent, path.name).absolute()
        self.direct = direct
        try:
            self.handle = self._opened()
        except OSError as error:
            raise OutlierError(f"{self.path}: cannot be read: {error.strerror}") from None
        self._identity = _identity(os.fstat(self.handle))

    def _opened(self) -> int:
        if self.direct and sys.platform == "darwin":
            handle = os.open(self.path, os.O_RDONLY)
            fcntl.fcntl(handle, fcntl.F_NOCACHE, 1)
            return handle
        if self.direct:
            try:
                return os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            except OSError:
                self.direct = False  # tmpfs, for one, has no direct reads
        return os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        # Only here: a thread may still be reading when its model is gone.
        if hasattr(self, "handle"):
            os.close(self.handle)

    def check(self) -> None:
        """Check that this file is still at its path, as it was when it was opened.

        Raises:
            CheckpointError: it was removed, replaced, cut or written to.
        """
        try:
            found = _identity(self.path.stat())
        except OSError as error:
            reason = "was removed" if isinstance(error, FileNotFoundError) else error.strerror
            raise CheckpointError(f"{self.path}: {reason} while the model is in use") from None
        if found == self._identity:
            return
        if found[:2] != self._identity[:2]:
            what = "was replaced"
        elif found[2] != self._identity[2]:
            what = f"has {found[2]} bytes instead of {self._identity[2]}"
        else:
            what = "was written to"
        raise CheckpointError(
            f"{self.path}: {what} while the model is in use; load the model again"
        )


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Chunk:
    """Bytes of a tensor, from `offset` of the file on, and the buffer for them."""

    file: OpenFile
    tensor: str
    offset: int
    buffer: memoryview

    def read(self, scratch: memoryview) -> None:
        """Fill the buffer.

        Args:
            scratch: aligned memory for direct reads, longer than the buffer by two `ALIGNMENT`.

        Raises:
            CheckpointError: the file ends before.
            OutlierError: it cannot be read.
        """
        if not self.file.direct:
            self._fill(self.buffer, self.offset, self.buffer.nbytes)
            return
        # These reads begin and end at multiples of ALIGNMENT, which tensors do not.
        before = self.offset % ALIGNMENT
        end = before + self.buffer.nbytes
        aligned = scratch[: -(-end // ALIGNMENT) * ALIGNMENT]
        self._fill(aligned, self.offset - before, end, ALIGNMENT)
        # NumPy copies without holding up other threads.
        np.copyto(
            np.frombuffer(self.buffer, np.uint8), np.frombuffer(aligned, np.uint8)[before:end]
        )

    def _fill(self, buffer: memoryview, offset: int, needed: int, step: int = 1) -> None:
        """Read `needed` bytes or more; what a short read leaves begins at a multiple of `step`."""
        done = 0
        while done < needed:
            try:
                count = os.preadv(self.file.handle, [buffer[done:]], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                raise self.failed(f"cannot be read: {error.strerror}") from None
            reached = done + count
            if reached < needed:
                reached -= reached % step
                if reached <= done:
                    where = f"{self.file.path}: {self.tensor}"
                    raise CheckpointError(f"{where}: the file ends within this tensor")
            done = reached

    def failed(self, reason: str) -> OutlierError:
        """The error of this chunk."""
        return OutlierError(f"{self.file.path}: {self.tensor}: {reason}")


class Reading:
    """Some chunks that are being read."""

    def __init__(self, readers: "Readers", chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.left = len(chunks)
        self.error: Exception | None = None
        self.begun = time.monotonic()
        self._readers = readers

    @property
    def done(self) -> bool:
        """Whether no thread writes to the buffers any more."""
        return not self.left

    def cancel(self) -> None:
        """Read nothing more for it; reads under way still end, and `wait` then fails."""
        if self.left and self.error is None:
            self.error = self.chunks[0].failed("its reading was stopped")

    def wait(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Return when everything is in its buffers.

        Args:
            meanwhile: called every few milliseconds until then.

        Raises:
            CheckpointError: a file is shorter than its header says, or is another one by now.
            OutlierError: a file cannot be read, or no read ended for `TIMEOUT` seconds.
        """
        try:
            self._readers.wait(self, meanwhile)
        except BaseException:
            self.cancel()
            raise
        for file in {chunk.file for chunk in self.chunks}:
            file.check()
        if self.error is not None:
            raise self.error


class Readers:
    """Threads that read chunks: first those that are waited for."""

    def __init__(self, threads: int, scratch_bytes: int) -> None:
        """Nothing is started before the first chunk.

        Args:
            threads: how many read at a time.
            scratch_bytes: what `Chunk.read` may need, at most.
        """
        self._idle, self._missing = 0, threads
        self._scratch_bytes = scratch_bytes
        self._lock = threading.Lock()
        self._work, self._ended = (threading.Condition(self._lock) for _ in range(2))
        self._queue: list[tuple[bool, int, Chunk, Reading]] = []
        self._added = 0
        self._last = 0.0  # when a read ended
        self.closed = False

    def start(self, chunks: Sequence[Chunk], *, early: bool = False) -> Reading:
        """Queue chunks; those that are read early come after all others."""
        reading = Reading(self, chunks)
        with self._lock:
            for chunk in chunks:
                heappush(self._queue, (early, self._added, chunk, reading))
                self._added += 1
                if self._missing and self._idle < len(self._queue):
                    self._missing -= 1
                    # A read that never ends must not keep the program from ending.
                    threading.Thread(target=self._run, daemon=True).start()
            self._work.notify(len(chunks))
        return reading

    def wait(self, reading: Reading, meanwhile: Callable[[], None] | None = None) -> None:
        """Return when a reading is done, or given up because no read ends; see `Reading.wait`."""
        while not self._wait(reading, TIMEOUT if meanwhile is None else MEANWHILE_EVERY):
            if meanwhile is not None:
                meanwhile()

    def _wait(self, reading: Reading, seconds: float) -> bool:
        """Wait until a reading ends, for `seconds` at most; returns whether it did."""
        until = time.monotonic() + seconds
        with self._lock:
            while reading.left:
                now = time.monotonic()
                spare = max(reading.begun, self._last) + TIMEOUT - now
                if spare <= 0 or self.closed:
                    if reading.error is None:
                        reason = f"no read ended for {TIMEOUT:g} seconds"
                        reading.error = reading.chunks[0].failed(reason)
                    self._close()
                    return True
                if now >= until:
                    return False
                self._ended.wait(min(spare, until - now))
        return True

    def close(self) -> None:
        """Drop what is queued, and let the threads end."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        self.closed = True
        for _, _, chunk, reading in self._queue:
            reading.left -= 1
            reading.error = reading.error or chunk.failed("its reading was stopped")
        self._queue.clear()
        self._work.notify_all()
        self._ended.notify_all()

    def _run(self) -> None:
        scratch = memoryview(mmap.mmap(-1, self._scratch_bytes))  # begins at a page
        while (taken := self._next()) is not None:
            chunk, reading = taken
            error = None
            if reading.error is None:
                try:
                    chunk.read(scratch)
                except Exception as failure:  # whoever waits gets it
                    error = failure
            with self._lock:
                self._last = time.monotonic()
                reading.error = reading.error or error
                reading.left -= 1
                if not reading.left:
                    self._ended.notify_all()
            del taken, chunk, reading  # an idle thread keeps no buffers

    def _next(self) -> tuple[Chunk, Reading] | None:
        with self._lock:
            self._idle += 1
            while not self._queue and not self.closed:
                self._work.wait()
            self._idle -= 1
            return None if self.closed else heappop(self._queue)[2:]
