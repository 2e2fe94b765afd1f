"""Prompt lookup: what followed the latest tokens where they stood before."""

from bisect import bisect
from collections.abc import Sequence

from outlier_mlx.engine.drafting.gate import Clock, Costs, Gate

# A longer match says no more.
LONGEST_MATCH = 16
# Earlier places of the latest two tokens that are compared, the latest first.
CANDIDATES = 8
# Least lengths of matches whose drafts are judged together; the first class begins with two tokens.
CLASSES = (3, 4, 6, 9, LONGEST_MATCH)
# Rates to begin with: a new text has to show first that short matches mean something.
RATES = (0.2, 0.25, 0.4, 0.6, 0.7, 0.8)


class Index:
    """A text, and where its latest tokens stood before.

    Adding a token costs the same however long the text is: for each two tokens in a row, the latest
    place after them is known, and for each place the one before it with the same two.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}
        self._earlier: list[int] = []

    def add(self, token: int) -> None:
        """Add a token to the text."""
        pair = (self.tokens[-1] if self.tokens else -1, token)
        self.tokens.append(token)
        self._earlier.append(self._latest.get(pair, 0))
        self._latest[pair] = len(self.tokens)

    def find(self) -> tuple[int, int]:
        """The place after the longest match of the latest tokens, and the length of the match.

        Of equal matches, the latest. The length is 0 if even the latest two tokens are new.
        """
        best, longest = 0, 0
        place = self._earlier[-1] if self._earlier else 0
        for _ in range(CANDIDATES):
            if not place:
                break
            if (length := self._match(place)) > longest:
                best, longest = place, length
                if length == LONGEST_MATCH:
                    break
            place = self._earlier[place - 1]
        return best, longest

    def after(self, place: int, count: int) -> list[int]:
        """So many tokens from a place on; beyond the text, what repeats since then."""
        found = self.tokens[place : place + count]
        while len(found) < count:
            found.append(found[place - len(self.tokens)])
        return found

    def _match(self, place: int) -> int:
        tokens, end = self.tokens, len(self.tokens)
        length = 2  # by the index
        while length < min(LONGEST_MATCH, place) and (
            tokens[place - 1 - length] == tokens[end - 1 - length]
        ):
            length += 1
        return min(length, place)


class PromptLookup:
    """Drafts from the text itself, when they pay; see `engine.steps.Drafts`.

    What a draft would have said is compared with what the model writes all the time, in steps
    without drafts, too. So a text that never repeats itself never costs a step.
    """

    def __init__(self, costs: Costs) -> None:
        self._index = Index()
        self._costs = costs
        self._gate = Gate(costs, RATES)
        self._clock = Clock(costs)
        # The first token of what would be drafted, and its class; the model has yet to write it.
        self._foreseen: int | None = None
        self._kind = 0
        self._ready = False
        self._noted = 0

    def begin(self, tokens: Sequence[int]) -> None:
        """Begin with a prompt, or go on with a text that got more tokens without drafts."""
        for token in tokens[len(self._index.tokens) :]:
            self._index.add(token)
        self._noted = len(self._index.tokens)
        self._clock = Clock(self._costs)
        self._foreseen, self._ready = None, False

    def ready(self) -> bool:
        """Whether the next token is worth waiting for."""
        return self._ready

    def draft(self, token: int, most: int) -> list[int]:
        """Tokens that may follow `token`; none if that would not pay."""
        self._clock.waited()
        place = self._add(token)
        return self._index.after(place, self._gate.longest(self._kind, most)) if place else []

    def note(self, tokens: Sequence[int], drafted: int) -> None:
        """Note the tokens of a step."""
        self._clock.note(drafted + 1)
        self._noted += len(tokens)
        if drafted:
            self._gate.judge(self._kind, len(tokens) - 1, drafted)
            self._foreseen = None
        # `draft` may have added the first.
        missing = self._noted - len(self._index.tokens)
        for token in tokens[len(tokens) - missing :]:
            self._add(token)
            self._foreseen = None if drafted else self._foreseen
        pays = self._foreseen is not None and self._gate.pays(self._kind)
        # After a draft, the next token is known already.
        self._ready = drafted > 0 or pays

    def _add(self, token: int) -> int:
        """Add a token, and compare it with what was foreseen.

        Returns:
            The place from which on a draft would be taken; 0 if there is none.
        """
        if self._foreseen is not None:
            self._gate.judge(self._kind, int(self._foreseen == token), 1)
        self._index.add(token)
        place, length = self._index.find()
        self._foreseen = self._index.tokens[place] if place else None
        self._kind = bisect(CLASSES, length)
        return place
