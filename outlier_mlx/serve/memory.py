"""Memory for KV caches, which the requests under way and the prompt cache share."""

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable

# Sizes of caches are looked at up to this number of tokens.
MANY_TOKENS = 1 << 31


class CacheMemory:
    """Memory for KV caches. A request takes what it can need at most, or waits for it in line.

    mlx-lm makes all caches of a batch as long as the longest. So as much is in use as if all
    requests under way had the longest cache.

    Args:
        nbytes: bytes for all KV caches; None: no limit.
        size: bytes of a KV cache of a number of tokens.

    Attributes:
        tokens: largest number of tokens whose KV cache fits, if no other is in use; None: any.
    """

    def __init__(self, nbytes: int | None, size: Callable[[int], int]) -> None:
        self._nbytes = nbytes
        self._size = size
        self._taken: dict[Hashable, int] = {}
        self._line: deque[Hashable] = deque()
        self._changed = threading.Condition()
        self.tokens: int | None = None
        if nbytes is not None and size(MANY_TOKENS) > nbytes:
            self.tokens = bisect_right(range(MANY_TOKENS), nbytes, key=size) - 1

    @property
    def rest(self) -> int | None:
        """Bytes that no request under way can need; None: no limit."""
        with self._changed:
            return None if self._nbytes is None else self._nbytes - self._needed(0)

    def take(self, job: Hashable, tokens: int, check: Callable[[], None]) -> None:
        """Wait until there is memory for a KV cache, after those who came before.

        Args:
            job: whose memory it is.
            tokens: largest number of tokens in it, at most `self.tokens`.
            check: called once a second; what it raises ends the waiting.
        """
        with self._changed:
            self._line.append(job)
            try:
                while self._line[0] is not job or not self._fits(tokens):
                    self._changed.wait(1.0)
                    check()
                self._taken[job] = tokens
            finally:
                self._line.remove(job)
                self._changed.notify_all()

    def give_back(self, job: Hashable) -> None:
        """Give back what was taken, if it was not given back before."""
        with self._changed:
            self._taken.pop(job, None)
            self._changed.notify_all()

    def _fits(self, tokens: int) -> bool:
        if self._nbytes is None or not self._taken:
            return True
        return self._needed(1, tokens) <= self._nbytes

    def _needed(self, more: int, tokens: int = 0) -> int:
        longest = max([tokens, *self._taken.values()])
        return (len(self._taken) + more) * self._size(longest)
