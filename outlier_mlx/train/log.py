"""The log of a training: one JSON object a line.

It stays in the work folder, so that a run that was interrupted and resumed has one history.
Every object has "event" and "time" (seconds since 1970). `docs/upcycle.md` lists them.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.texts import decode_json

#: The log's file in the work folder.
FILE = "log.jsonl"

Event = dict[str, Any]


class RunLog:
    """Writes events into the work folder, and passes them on.

    What is told before the training's own first event waits for it: until then the work folder is
    not made. Such events are not written when a run is resumed, as they are there already.
    """

    def __init__(self, work: Path, others: Sequence[Callable[[Event], None]] = ()) -> None:
        self._path, self._others = work / FILE, others
        self._waiting: list[Event] = []
        self._begun = False

    def tell(self, event: Event) -> None:
        """Take an event from outside of the training."""
        event = self._passed_on(event)
        if self._begun:
            self._write([event])
        else:
            self._waiting.append(event)

    def __call__(self, event: Event) -> None:
        """Take an event of the training."""
        before = self._begin()
        self._write([*before, self._passed_on(event)])

    def _begin(self) -> list[Event]:
        """What is to be written before the first event of the training."""
        if self._begun:
            return []
        self._begun = True
        if not _has_text(self._path):
            return self._waiting
        _drop_cut_line(self._path)
        return [self._passed_on({"event": "resumed"})]

    def _passed_on(self, event: Event) -> Event:
        event = {"event": event["event"], "time": round(time.time(), 3)} | event
        for other in self._others:
            other(event)
        return event

    def _write(self, events: Iterable[Event]) -> None:
        lines = "".join(as_line(event) for event in events)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(lines)


def as_line(event: Event) -> str:
    """An event as a line of JSON."""
    return json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"


def _has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _drop_cut_line(path: Path) -> None:
    """Remove the last line if a kill cut it off."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


@dataclass
class StageHistory:
    """What happened in a stage.

    Attributes:
        title: of the stage.
        steps: how many it has; of one that ended early, how many were made; 0 for one that does
            not train.
        losses: step, and the parts of the loss by name.
        held_out: step, and perplexity by text, on some windows.
        load: by text and layer, the share of tokens that used each expert, as last measured.
        after: perplexity by text on all held-out windows at the end; empty: it did not end.
        kept: whether the result was kept.
    """

    title: str
    steps: int
    losses: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    held_out: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    load: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    kept: bool = True


@dataclass
class History:
    """What a log says.

    Attributes:
        before: the base's perplexity by text on all held-out windows.
        stages: in the order in which they ran.
    """

    before: dict[str, float] = field(default_factory=dict)
    stages: list[StageHistory] = field(default_factory=list)


def read_log(path: Path) -> History:
    """The history in a log; a line that a kill cut off at its end is ignored.

    A run that was killed has logged steps after the last state that it saved. When it is resumed,
    these steps come again, and the later ones count.

    Raises:
        CheckpointError: it cannot be read, or a line is no event of a training.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    history = History()
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            _add(history, decode_json(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: line {number}: no event of a training ({error})"
            ) from None
    return history


def _add(history: History, event: Event) -> None:
    kind = event["event"]
    if kind == "step":
        stage = _stage(history, event["stage"])
        stage.steps = int(event["steps"])
        step = int(event["step"])
        stage.losses = [one for one in stage.losses if one[0] < step]
        stage.held_out = [one for one in stage.held_out if one[0] < step]
        stage.losses.append((step, _numbers(event["parts"] or {"loss": event["loss"]})))
    elif kind == "held_out":
        stage = _stage(history, event["stage"])
        stage.held_out.append((int(event["step"]), _numbers(event["perplexity"])))
        stage.load = event.get("load") or stage.load
    elif kind == "stage":
        stage = _stage(history, event["name"])
        history.before = history.before or _numbers(event.get("before") or {})
        stage.after = _numbers(event.get("after") or {})
        stage.load = event.get("load") or stage.load
        stage.kept = event.get("kept") is not False
        stage.steps = int(event.get("steps", stage.steps))


def _stage(history: History, title: str) -> StageHistory:
    """The stage of a title, which is made if it is new."""
    for stage in history.stages:
        if stage.title == title:
            return stage
    history.stages.append(StageHistory(title, 0))
    return history.stages[-1]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}
