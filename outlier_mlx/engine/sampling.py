"""Samplers with random numbers of their own, which can go back to those of an earlier token."""

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler


class Sampler:
    """Chooses a token from log probabilities, as mlx-lm's samplers do.

    Args:
        choose: a sampler of mlx-lm: log probabilities (1, vocab) to a token (1,).
        seed: begins random numbers that nothing else uses; None: MLX's global ones.

    Attributes:
        greedy: whether it uses no random numbers.
    """

    def __init__(
        self, choose: Callable[[mx.array], mx.array] = greedy_sampler, seed: int | None = None
    ) -> None:
        self._choose = choose
        self._key = None if seed is None else mx.random.key(seed)
        self.greedy = choose is greedy_sampler

    def __call__(self, logprobs: mx.array) -> mx.array:
        """A token (1,) from log probabilities (1, vocab)."""
        if self.greedy or self._key is None:
            return self._choose(logprobs)
        # mlx-lm's samplers know only MLX's global random numbers.
        others, mx.random.state[0] = mx.random.state[0], self._key
        try:
            token = self._choose(logprobs)
            self._key = mx.random.state[0]
        finally:
            mx.random.state[0] = others
        return token

    @property
    def state(self) -> mx.array:
        """Where the random numbers are; set it to go back to an earlier place."""
        return mx.random.state[0] if self._key is None else self._key

    @state.setter
    def state(self, key: mx.array) -> None:
        if self._key is None:
            mx.random.state[0] = key
        else:
            self._key = key
