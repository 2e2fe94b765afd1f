"""Dividing generated text into text, reasoning and tool calls."""

from dataclasses import dataclass, field, replace
from typing import Any

from outlier_mlx.serve.call_stream import CallStream
from outlier_mlx.serve.calls import Call, CallReader
from outlier_mlx.upstream import TextStateMachine


@dataclass
class Piece:
    """A part of a reply.

    Attributes:
        text: text for the user.
        reasoning: text between the marks of reasoning.
        arguments: more of the arguments of the last call in the pieces before.
        calls: calls of functions; the arguments of the last one may go on in the next piece.
        logprobs: log probabilities of the tokens since the last piece, as in OpenAI's API.
        experts: the tokens since the last piece, and their experts; see `experts.described`.
        finish_reason: "stop", "length" or "tool_calls" in the last piece, else None.
        stop_word: the stop word that ended the reply, in the last piece, or None.
    """

    text: str = ""
    reasoning: str = ""
    arguments: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    experts: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_word: str | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        generated = self.text or self.reasoning or self.arguments or self.calls
        return bool(generated or self.finish_reason)

    def add(self, other: "Piece") -> None:
        """Add the part that comes next."""
        self.text += other.text
        self.reasoning += other.reasoning
        if self.calls:
            last = self.calls[-1]
            self.calls[-1] = replace(last, arguments=last.arguments + other.arguments)
        else:
            self.arguments += other.arguments
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
        streams: whether to give calls while they are written, where the format allows that. What
            turns out to be no call is given as far as it was one, and then as text.
    """

    def __init__(
        self,
        machine: TextStateMachine,
        initial: str,
        reader: CallReader | None,
        *,
        reads: bool,
        streams: bool = False,
    ) -> None:
        self._state = machine.make_state(initial)
        self._part = initial
        self._reader = reader
        self._reads = reads
        self._streams = streams
        self._mark = self._block = ""
        self._stream: CallStream | None = None
        # Without marks, a call can only be the whole reply.
        self._may_begin = reads and reader is not None and not reader.start
        self._began = False

    @property
    def writing(self) -> bool:
        """Whether the arguments of a call are being written."""
        return self._stream is not None and self._stream.writing

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
        if self._reader is not None and (part == "tool" or self._began) and self._reads:
            self._close(self._reader, piece, end="", whole=not (cut and self._reader.end))
        elif self._may_begin:
            piece.text += self._block
        return piece

    def _add(self, piece: Piece, part: str, text: str) -> None:
        if self._reader is not None and part != self._part:
            if part == "tool":
                self._open(self._reader, self._reader.start)
                piece.text += "" if self._reads else self._reader.start
            elif self._part == "tool":
                self._close(self._reader, piece, end=self._reader.end, whole=True)
        self._part = part
        if self._began or (part == "tool" and self._reads):
            self._take(piece, text)
        elif part == "normal" and self._may_begin and self._reader is not None:
            self._begin(self._reader, piece, text)
        elif part in ("normal", "tool"):
            piece.text += text
        elif part == "reasoning":
            piece.reasoning += text

    def _begin(self, reader: CallReader, piece: Piece, text: str) -> None:
        """Hold back the beginning of a reply until it is clear whether the reply is a call."""
        self._block += text
        held, call = self._block, reader.begins(self._block)
        if call is None:
            self._may_begin = False
            piece.text += held
        elif call:
            self._may_begin, self._began = False, True
            self._open(reader, held.removesuffix(call))
            self._take(piece, call)

    def _open(self, reader: CallReader, mark: str) -> None:
        self._mark, self._block = mark, ""
        self._stream = CallStream(reader.names) if self._streams and self._reads else None

    def _take(self, piece: Piece, text: str) -> None:
        """Add to the text of a call."""
        if self._stream is None:
            self._block += text
            return
        arguments, calls = self._stream.feed(text)
        piece.add(Piece(arguments=arguments, calls=calls))

    def _close(self, reader: CallReader, piece: Piece, *, end: str, whole: bool) -> None:
        """Add what is left of a block that has ended: as calls, if it can be read as calls."""
        if not self._reads:
            piece.text += end
            return
        mark, stream, self._stream = self._mark, self._stream, None
        if stream is not None:
            piece.add(Piece(arguments=stream.end()))
            self._block = stream.rest
            if stream.began:
                mark = end = ""
        if calls := reader.read(self._block, whole=whole):
            piece.calls += calls
        else:
            piece.text += mark + self._block + end
