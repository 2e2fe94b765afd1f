"""Dividing generated text into text, reasoning and tool calls."""

from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine

from outlier_mlx.serve.calls import Call, CallReader


@dataclass
class Piece:
    """A part of a reply.

    Attributes:
        text: text for the user.
        reasoning: text between the marks of reasoning.
        calls: calls of functions.
        logprobs: log probabilities of the tokens since the last piece, as in OpenAI's API.
        experts: the tokens since the last piece, and their experts; see `experts.described`.
        finish_reason: "stop", "length" or "tool_calls" in the last piece, else None.
        stop_word: the stop word that ended the reply, in the last piece, or None.
    """

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    experts: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_word: str | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return bool(self.text or self.reasoning or self.calls or self.finish_reason)

    def add(self, other: "Piece") -> None:
        """Add the part that comes next."""
        self.text += other.text
        self.reasoning += other.reasoning
        self.calls += other.calls
        self.logprobs += other.logprobs
        self.experts += other.experts
        self.finish_reason = other.finish_reason
        self.stop_word = other.stop_word


class Splitter:
    """Divides text as it is generated.

    What stands between the marks of a call and cannot be read as one is text, with its marks.

    Args:
        machine: finds the marks in the text.
        initial: the machine's state at the start of the reply.
        reader: reads tool calls; None if the model has no format for them.
        reads: whether to read calls; otherwise, they are text.
    """

    def __init__(
        self, machine: TextStateMachine, initial: str, reader: CallReader | None, *, reads: bool
    ) -> None:
        self._state = machine.make_state(initial)
        self._part = initial
        self._reader = reader
        self._reads = reads
        self._block = ""

    @property
    def reasons(self) -> bool:
        """Whether what comes next is reasoning, unless it begins with a mark."""
        return self._part == "reasoning"

    def feed(self, text: str) -> Piece:
        """The next piece of text, divided; what might be the beginning of a mark is held back."""
        self._state, segments = TextStateMachine.split(self._state, text)
        piece = Piece()
        for part, words in segments:
            self._add(piece, part, words)
        return piece

    def end(self, *, cut: bool) -> Piece:
        """What was held back; `cut`: the reply reached its largest number of tokens."""
        self._state, rest, part = TextStateMachine.flush(self._state)
        piece = Piece()
        self._add(piece, part, rest)
        if self._reader is not None and part == "tool" and self._reads:
            self._close(self._reader, piece, end="", whole=not (cut and self._reader.end))
        return piece

    def _add(self, piece: Piece, part: str, text: str) -> None:
        if self._reader is not None and part != self._part:
            if part == "tool":
                self._block = ""
                piece.text += "" if self._reads else self._reader.start
            elif self._part == "tool":
                self._close(self._reader, piece, end=self._reader.end, whole=True)
        self._part = part
        if part == "tool" and self._reads:
            self._block += text
        elif part in ("normal", "tool"):
            piece.text += text
        elif part == "reasoning":
            piece.reasoning += text

    def _close(self, reader: CallReader, piece: Piece, *, end: str, whole: bool) -> None:
        """Add a block that has ended: as calls, if it can be read as calls."""
        if not self._reads:
            piece.text += end
        elif calls := reader.read(self._block, whole=whole):
            piece.calls += calls
        else:
            piece.text += reader.start + self._block + end
