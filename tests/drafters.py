"""Drafts that tests decide themselves."""

from __future__ import annotations

import random
from collections.abc import Sequence


class Guesses:
    """Drafts of random lengths that follow a known text, and leave it at random places.

    Args:
        text: what the model will write.
        seed: of the lengths and places.
        wrong: share of drafted tokens that are other ones.
        longest: tokens of a draft, at most.
        vocab: wrong tokens are below it.
    """

    def __init__(
        self, text: Sequence[int], seed: int, wrong: float = 0.2, longest: int = 9, vocab: int = 200
    ) -> None:
        self.text, self.wrong, self.longest, self.vocab = list(text), wrong, longest, vocab
        self.shortest = 0
        self.draw = random.Random(seed)
        self.given: list[int] = []
        self.prompt: list[int] = []
        self.lengths: list[int] = []

    def begin(self, tokens: Sequence[int]) -> None:
        self.prompt = list(tokens)

    def ready(self) -> bool:
        return self.draw.random() < 0.8

    def draft(self, token: int, most: int) -> list[int]:
        assert token == self.text[len(self.given)]
        length = min(most, self.draw.randint(self.shortest, self.longest))
        right = self.text[len(self.given) + 1 :][:length]
        self.lengths.append(len(right))
        return [
            self.draw.randrange(self.vocab) if self.draw.random() < self.wrong else token
            for token in right
        ]

    def note(self, tokens: Sequence[int], drafted: int) -> None:
        assert len(tokens) <= drafted + 1
        self.given += tokens
