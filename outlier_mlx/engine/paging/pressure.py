"""Give slots back while the system is short of memory, so that it need not end the process."""

import time
import warnings
from collections.abc import Callable

from outlier_mlx.engine.machine import under_pressure

#: Seconds between two looks, and after slots were given back: the system takes a while to notice.
LOOK_EVERY, WAIT_AFTER = 1.0, 10.0
#: The share of the slots that is given back at a time.
GIVEN_BACK = 0.25


class Pressure:
    """The rule by which slots are given back.

    Args:
        least: number of slots below which none is given back.
        pressed: says whether the system is short of memory.
        clock: seconds of a clock.
    """

    def __init__(
        self,
        least: int,
        pressed: Callable[[], bool] = under_pressure,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.least = least
        self._pressed, self._clock = pressed, clock
        self._next = clock()
        self._told = False

    def fewer(self, slots: int) -> int | None:
        """How many slots are to be left of so many; None: all. It looks at most once a second."""
        now = self._clock()
        if now < self._next or slots <= self.least:
            return None
        self._next = now + LOOK_EVERY
        if not self._pressed():
            return None
        self._next = now + WAIT_AFTER
        left = max(self.least, int(slots * (1 - GIVEN_BACK)))
        if not self._told:
            self._told = True
            warnings.warn(
                f"the system is short of memory: {left} of {slots} experts stay in memory, and"
                " fewer if that is not enough; replies get slower",
                stacklevel=2,
            )
        return left
