"""Whether a draft pays: tokens expected of a step against the measured time of such a step."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

#: Tokens of a step, the chosen one and its draft, that are tried; few, so that each is measured.
WIDTHS = (2, 3, 4, 6, 8)
# Times of steps with so many tokens, in those of steps with one, until they are measured: the bytes
# that are read if each expert is read once. A step can hardly be faster.
ASSUMED = {2: 1.18, 3: 1.31, 4: 1.40, 5: 1.48, 6: 1.53, 7: 1.57, 8: 1.61}
# A draft must promise so much more text in the same time.
MARGIN = 1.1
# Latest steps of a width whose median time counts.
_LATEST = 9
# Latest drafted tokens that count most in a rate: what is older fades with this factor a token.
_FADES = 0.95
# What a rate begins with counts like so many tokens.
_BELIEF = 2.0
# Chances that are let go by, though only the times measured so far speak against them, before one
# is taken to measure again; doubled with each one that does not pay.
_PATIENCE, _LONGEST_PATIENCE = 32, 512


class Costs:
    """Measured times of a model's steps, by their number of tokens."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}

    def note(self, width: int, seconds: float) -> None:
        """Note the time of a step. The first of a width prepares kernels, and does not count."""
        if width in self._times:
            self._times[width].append(seconds)
        else:
            self._times[width] = deque(maxlen=_LATEST)

    def forget(self, width: int) -> None:
        """Let the next step of a width count alone: the earlier ones may be out of date."""
        if width in self._times:
            self._times[width].clear()

    def of(self, width: int) -> float:
        """The time of a step, in times of a step with one token; assumed if it is not measured.

        Without any measured step of one token, infinite: a draft has to wait for that.
        """
        if width == 1:
            return 1.0
        if not (plain := self._times.get(1)):
            return math.inf
        # A wider step takes at least as long as a narrower one.
        measured = {w: median(t) for w, t in self._times.items() if 1 < w <= width and t}
        if width in measured:
            return measured[width] / median(plain)
        return max([assumed(width), *(seconds / median(plain) for seconds in measured.values())])


def assumed(width: int) -> float:
    """The time of a step of a width, before it is measured."""
    return ASSUMED[8] + 0.05 * (width - 8) if width > 8 else ASSUMED.get(width, 1.0)


class Clock:
    """Measures steps from end to end: what the reader of a text waits for."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._since: float | None = None
        self._after_draft = False
        self._in_time = False

    def waited(self) -> None:
        """Tell that the host knows the token of this step before the step begins.

        After a step without a draft, it waited for what that step had begun.
        """
        self._in_time = False
        if not self._after_draft:
            self._since = time.perf_counter()

    def note(self, width: int) -> None:
        """Note the end of a step."""
        now = time.perf_counter()
        # A step with one token counts if it was begun before the one before it had ended.
        if self._since is not None and (width > 1 or self._in_time):
            self._costs.note(width, now - self._since)
        self._since, self._after_draft, self._in_time = now, width > 1, width == 1


class Gate:
    """Decides how long drafts may be, from the rate at which they were right of late.

    Args:
        costs: times of steps; those of a model, for all its texts.
        rates: rates to begin with, one for each kind of drafts.
        most: tokens of a draft, at most.
    """

    def __init__(self, costs: Costs, rates: Sequence[float], most: int = WIDTHS[-1] - 1) -> None:
        self.most = most
        self._costs = costs
        self._right = [rate * _BELIEF for rate in rates]
        self._judged = [_BELIEF] * len(rates)
        self._widths = [*(width for width in WIDTHS if width <= most), most + 1]
        self._passed, self._patience, self._measures = 0, _PATIENCE, False

    def judge(self, kind: int, right: int, drafted: int) -> None:
        """Note that the first `right` of so many drafted tokens were right."""
        for hit in [1] * right + [0] * (right < drafted):
            self._right[kind] = self._right[kind] * _FADES + hit
            self._judged[kind] = self._judged[kind] * _FADES + 1

    def expected(self, kind: int, drafted: int) -> float:
        """Tokens of a draft that will be right: those before the first wrong one."""
        rate = self._right[kind] / self._judged[kind]
        return sum(rate**place for place in range(1, drafted + 1))

    def pays(self, kind: int) -> bool:
        """Whether a draft of a kind pays, or its time should be measured again."""
        self._measures = False
        if self._best(kind, self.most, self._costs.of):
            self._passed, self._patience = 0, _PATIENCE
            return True
        if self._best(kind, self.most, assumed):
            self._passed += 1
        if self._passed > self._patience:
            self._passed, self._patience = 0, min(2 * self._patience, _LONGEST_PATIENCE)
            self._measures = True
        return self._measures

    def longest(self, kind: int, most: int) -> int:
        """Tokens that the next draft, of a kind, should have, at most `most`; 0: none pays."""
        if not self._measures:
            return self._best(kind, most, self._costs.of)
        self._measures = False
        count = self._best(kind, most, assumed)
        if count:
            self._costs.forget(count + 1)
        return count

    def _best(self, kind: int, most: int, cost: Callable[[int], float]) -> int:
        """Tokens of the draft that promises most text in a time; 0: hardly more than without."""
        gains = {
            width - 1: (1 + self.expected(kind, width - 1)) / cost(width)
            for width in self._widths
            if width <= most + 1
        }
        best = max(gains, key=gains.__getitem__, default=0)
        return best if gains.get(best, 0.0) > MARGIN else 0
