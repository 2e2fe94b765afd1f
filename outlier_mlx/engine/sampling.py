"""Samplers whose random numbers can go back to those of an earlier token."""

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx

from outlier_mlx.upstream import greedy_sampler

# Log probabilities of float16 are multiplied by the inverse of a temperature: beyond these bounds,
# that of the likeliest token could be infinite, or that of a token that is not allowed no number.
_COLDEST, _HOTTEST = 1e-3, 1e4
# Float32 has no room for much less, of which no token would be a part.
_LEAST_TOP_P = 1e-6


def bounded(temperature: float, top_p: float) -> tuple[float, float]:
    """Temperature and top-p that MLX's floats have room for, and that mean the same.

    Args:
        temperature: below 0.001, it is as 0; above 10000, all tokens are as likely.
        top_p: 0 is off.
    """
    temperature = 0.0 if temperature < _COLDEST else min(temperature, _HOTTEST)
    return temperature, max(top_p, _LEAST_TOP_P) if top_p else top_p


class Sampler(Protocol):
    """Chooses a token (1,) from log probabilities (1, vocab).

    Attributes:
        state: where its random numbers are, (2,) uint32; set it to go back to an earlier place.
    """

    state: mx.array

    def __call__(self, logprobs: mx.array, /) -> mx.array:
        """The token."""


class GlobalSampler:
    """A sampler of mlx-lm, with MLX's own random numbers, which `mx.random.seed` begins.

    Args:
        choose: the sampler.
    """

    def __init__(self, choose: Callable[[mx.array], mx.array] = greedy_sampler) -> None:
        self._choose = choose

    def __call__(self, logprobs: mx.array) -> mx.array:
        """A token (1,) from log probabilities (1, vocab)."""
        return self._choose(logprobs)

    @property
    def state(self) -> mx.array:
        """Where the random numbers are."""
        return _global_state()

    @state.setter
    def state(self, key: mx.array) -> None:
        if key is not _global_state():
            high, low = _words(key)
            mx.random.seed(high << 32 | low)


def _global_state() -> mx.array:
    state: Any = mx.random.state
    key: mx.array = state[0]
    return key


def _words(key: mx.array) -> list[int]:
    words: Any = key.tolist()
    return list(words)
