"""What paged experts cost a model."""

from dataclasses import asdict, dataclass
from typing import Any

from outlier_mlx.terminal import size


@dataclass
class PagingStatistics:
    """What a model's experts cost so far.

    Attributes:
        hits: experts that were needed, and in a slot or on the way there.
        misses: experts that were needed, and had to be read.
        early: experts that were read before it was known that they are needed.
        bytes_read: bytes of all experts that were read.
        skipped: experts that were left out rather than read.
        waited: seconds for which the model waited for experts.
        guessed: experts that were needed where the layer below had made a guess.
        foreseen: how many of them were in the guess.
        reads_early: whether experts are read early; None: that is being found out.
    """

    hits: int = 0
    misses: int = 0
    early: int = 0
    bytes_read: int = 0
    skipped: int = 0
    waited: float = 0.0
    guessed: int = 0
    foreseen: int = 0
    reads_early: bool | None = None

    @property
    def hit_rate(self) -> float | None:
        """Share of the needed experts that did not have to be read; None: none was needed."""
        needed = self.hits + self.misses
        return self.hits / needed if needed else None

    @property
    def recall(self) -> float | None:
        """Of the needed experts, the share that was foreseen; None: nothing was guessed."""
        return self.foreseen / self.guessed if self.guessed else None

    def __str__(self) -> str:
        """All counts in a line."""
        needed, early = self.hits + self.misses, f", {self.early} of them early" * bool(self.early)
        reads = self.misses + self.early
        skipped = f", {self.skipped} left out" * bool(self.skipped)
        return (
            f"experts: {self.hits} of {needed} were in memory{skipped}; {reads} read{early}:"
            f" {size(self.bytes_read)}, {self.waited:.2f} s waited{self._of_guesses()}"
        )

    def _of_guesses(self) -> str:
        if self.recall is None:
            return ""
        tried = {None: "is being tried", True: "pays, and stays on", False: "does not pay: off"}
        return f"; look-ahead foresaw {self.recall:.0%}, and {tried[self.reads_early]}"

    def as_json(self) -> dict[str, Any]:
        """All counts as JSON values."""
        return asdict(self) | {"hit_rate": self.hit_rate, "recall": self.recall}
