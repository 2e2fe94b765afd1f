"""Conversations whose prompts are being read, and whose turn it is."""

import time
from collections import deque

from outlier_mlx.serve.sequences import Sequence

# Others may come again soon if some came within so many seconds.
LATELY = 10.0
# Of so many turns, one belongs to the one that came first, however long its prompt is.
TURNS = 4


class Waiting:
    """Sequences whose prompts wait to be read: short ones first, and the oldest now and then."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []  # in the order of arrival
        self._turn = 0
        self._arrivals: deque[float] = deque(maxlen=2)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def nbytes(self) -> int:
        """Size of their KV caches, in bytes."""
        return sum(layer.nbytes for sequence in self.sequences for layer in sequence.cache)

    @property
    def lately(self) -> int:
        """How many of the last two arrivals were a short time ago, or still wait."""
        recent = sum(time.monotonic() - arrival < LATELY for arrival in self._arrivals)
        return max(recent, min(2, len(self.sequences)))

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        self._arrivals.append(time.monotonic())
        self.sequences.append(sequence)

    def remove(self, sequences: list[Sequence]) -> None:
        """Remove sequences."""
        self.sequences = [waiting for waiting in self.sequences if waiting not in sequences]

    def drop_abandoned(self) -> None:
        """Remove those that nobody waits for any more."""
        self.sequences = [waiting for waiting in self.sequences if not waiting.job.abandoned]

    def next_group(self, most: int, together: int) -> list[Sequence]:
        """Whose prompts to read next.

        Args:
            most: tokens of a slice, at most.
            together: sequences whose prompts are read together, at most.

        Returns:
            At least one sequence, if any waits. Several only if the next slice of each ends what is
            to be read of its prompt, and all slices, padded to the longest, are `most` tokens.
        """
        self._turn += 1
        by_length = sorted(self.sequences, key=lambda sequence: sequence.left)
        first = self.sequences[0] if self._turn % TURNS == 0 else by_length[0]
        if len(first.slice(most)) < first.left:
            return [first]
        group, longest = [first], first.left
        for sequence in by_length:
            longest = max(longest, sequence.left)
            whole = len(sequence.slice(most)) == sequence.left
            if sequence in group or not whole:
                continue
            if len(group) == together or longest * (len(group) + 1) > most:
                break
            group.append(sequence)
        return group
