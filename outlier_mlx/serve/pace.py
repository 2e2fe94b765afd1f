"""How much of a prompt is read between two steps of generation."""

# A slice has at least so many tokens, about those of a short prompt.
LEAST = 32
# The weight of earlier slices falls by this factor with each slice: a step takes longer as the
# conversation grows.
FORGET = 0.9


class Pace:
    """How many tokens of prompts to read at a time, from the time that earlier slices took.

    The time of a slice is taken as a + b · tokens, fitted by least squares: a is what every slice
    costs, say to read all weights, however short the prompt. While others may be waiting, a slice
    takes about 2a: at least half as fast as slices of any length can be read, and a short prompt,
    which takes a by itself, waits a on average. Without others, it takes 4a.

    Args:
        most: largest number of tokens; a step that long still fits in memory.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._longest = LEAST
        self._sums = [0.0] * 5  # of 1, n, n², t and n · t

    def tokens(self, *, shared: bool) -> int:
        """Tokens to read next, at most.

        Args:
            shared: whether others wait, are being generated, or have come lately.
        """
        fixed, each = self._fit()
        # What was not tried is not known: no more than twice as long.
        wanted = min((1 if shared else 3) * fixed / each, 2 * self._longest)
        tokens = LEAST
        while tokens * 2 <= min(wanted, self._most):  # powers of two, so that shapes come again
            tokens *= 2
        return min(tokens, self._most)

    def took(self, tokens: int, seconds: float) -> None:
        """Note how long a slice took."""
        self._count += 1
        self._longest = max(tokens, self._longest)
        if self._count == 1:  # it also compiled kernels, and read weights from disk
            return
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        pairs = zip(self._sums, new, strict=True)
        self._sums = [FORGET * old + more for old, more in pairs]

    def _fit(self) -> tuple[float, float]:
        """Seconds a and b; until slices had several lengths, so that they get longer."""
        weight, n, nn, t, nt = self._sums
        spread = weight * nn - n * n
        if spread <= 1e-3 * n * n:
            return 2.0 * self._longest, 1.0
        each = max((weight * nt - n * t) / spread, 1e-9)
        return max(0.0, (t - each * n) / weight), each
