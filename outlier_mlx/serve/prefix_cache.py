"""KV caches of what was read and generated before, found by the tokens they begin with."""

from typing import Any, Literal

from mlx_lm.models.cache import LRUPromptCache

Kind = Literal["system", "user", "assistant"]


class PrefixCache:
    """KV caches of prefixes of conversations.

    It is used in the thread that generates.

    Args:
        size: largest number of caches.
        nbytes: largest size of all caches; None: no limit.
    """

    def __init__(self, size: int, nbytes: int | None) -> None:
        self._caches = LRUPromptCache(size, 1 << 63 if nbytes is None else nbytes)

    @property
    def nbytes(self) -> int:
        """Size of all caches in memory, in bytes."""
        return int(self._caches.nbytes)

    def fetch(self, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """A copy of the cache of the longest known prefix of a prompt.

        Args:
            tokens: the prompt's, at least one.

        Returns:
            The cache of each layer, or None, and the number of tokens in it. The number is less
            than that of the prompt's tokens, because generation starts from one that is not cached.
        """
        # Of an entry with just these tokens, the LRU cache would give all.
        known = self._caches.fetch_nearest_cache
        cache, rest = known(None, tokens)
        if cache is not None and not rest:
            cache, rest = known(None, tokens[:-1])
            return cache, len(tokens) - 1 - len(rest)
        return cache, len(tokens) - len(rest)

    def keep(self, tokens: list[int], cache: list[Any], kind: Kind) -> None:
        """Keep a cache.

        Args:
            tokens: the tokens in it.
            cache: the cache of each layer, which nobody changes any more.
            kind: what ends here: the system prompt, the user's message or the reply.
        """
        self._caches.insert_cache(None, tokens, cache, cache_type=kind)

    def make_room(self, nbytes: int | None) -> None:
        """Let go of caches until those that are kept are not larger; None: keep all."""
        self._caches.trim_to(n_bytes=nbytes)
