"""The ranks that run a model together, and what they tell each other, by MLX's own collectives.

Every rank runs the same program. What only one of them can know (what a user types, a sampled
token) is rank 0's.
"""

import json
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from outlier_mlx.engine.distributed.launcher import launched_rank
from outlier_mlx.errors import OutlierError


@dataclass(frozen=True)
class Ranks:
    """The processes that run a model together.

    Attributes:
        rank: number of this one.
        size: how many they are.
        pipeline: whether each has some of the layers, rather than a part of every layer.
        group: MLX's group of them; None: this process is alone.
    """

    rank: int = 0
    size: int = 1
    pipeline: bool = False
    group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process talks to the user."""
        return self.rank == 0


class PeerError(OutlierError):
    """Another rank failed, or differs from the others."""


_ranks = Ranks()
# Whether ranks still wait for one another, so that one that fails can tell the others.
_starting = False
_threads = threading.local()
# Bytes of what a rank tells all others at a time; a character takes 6 in JSON at most.
_MOST = 4096


def ranks() -> Ranks:
    """The ranks of this process; one alone unless `connect` found others."""
    return _ranks


def connect(*, pipeline: bool = False) -> Ranks:
    """Connect to the other ranks that the launcher started, if it did; all ranks must call it.

    Args:
        pipeline: see `Ranks`.

    Raises:
        OutlierError: the others cannot be reached.
    """
    global _ranks, _starting
    if launched_rank() is None:
        return _ranks
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise OutlierError(f"the other ranks cannot be reached: {error}") from error
    if group.size() > 1:
        _ranks, _starting = Ranks(group.rank(), group.size(), pipeline, group), True
    return _ranks


def finish() -> None:
    """Wait until all ranks have come here: one that ends earlier would break the connection."""
    if _ranks.size > 1:
        mx.eval(summed(mx.zeros(1)))


def transport() -> mx.Stream:
    """Where this thread's messages to other ranks are computed, one after the other.

    On several streams, they could overtake one another. MLX has streams for one thread each.
    """
    if not hasattr(_threads, "stream"):
        _threads.stream = mx.new_stream(mx.cpu)
    stream: mx.Stream = _threads.stream
    return stream


def summed(x: mx.array) -> mx.array:
    """The sum of an array over all ranks, in its dtype."""
    return mx.distributed.all_sum(x, group=_ranks.group, stream=transport())


def agreed(x: mx.array) -> mx.array:
    """Rank 0's values of an array that all ranks have in the same shape and dtype.

    Nothing waits for it: it is a part of what MLX computes.
    """
    if _ranks.size == 1:
        return x
    return summed(x if _ranks.leads else mx.zeros_like(x))


def shared(value: Any) -> Any:
    """Rank 0's value on all ranks, as JSON has it; the values of others are not used."""
    if _ranks.size == 1:
        return value
    data = json.dumps(value).encode() if _ranks.leads else b""
    length = agreed(mx.array([len(data)], mx.int64))
    mx.eval(length)
    count: Any = length.item()
    mine = np.frombuffer(data, np.uint8) if _ranks.leads else np.zeros(count, np.uint8)
    whole = agreed(mx.array(mine))
    mx.eval(whole)
    return json.loads(np.array(whole).tobytes())


def gathered(text: str) -> list[str]:
    """The texts of all ranks, by rank.

    Args:
        text: this rank's; of a long one, only the beginning is told.

    Raises:
        PeerError: another rank failed meanwhile, and told why by `fail`.
    """
    if _ranks.size == 1:
        return [text]
    return _gathered({"text": text[: _MOST // 8]})


def fail(reason: str) -> bool:
    """Tell the other ranks why this one ends, while they still wait for one another to load.

    Returns:
        Whether they were told.
    """
    if not _starting:
        return False
    with suppress(PeerError):
        _gathered({"reason": reason[: _MOST // 8]})
    return True


def settle(after: mx.array, reason: str) -> None:
    """Make sure that no rank has failed; all ranks call it at the same place.

    Args:
        after: what this waits for, so that what ranks send for it comes before.
        reason: why this rank cannot go on; empty: it can.

    Raises:
        PeerError: a rank failed.
    """
    failed = summed(mx.depends([mx.array([int(bool(reason))])], [after])[0])
    mx.eval(failed)
    if failed.item():
        _gathered({"reason": reason[: _MOST // 8]} if reason else {"text": ""})


def loaded() -> None:
    """Wait until all ranks have loaded the model.

    Raises:
        PeerError: one of them could not.
    """
    global _starting
    if _starting:
        gathered("")
        _starting = False


def _gathered(told: dict[str, str]) -> list[str]:
    global _starting
    data = json.dumps(told).encode()
    mine = np.zeros((1, _MOST), np.uint8)
    mine[0, : len(data)] = np.frombuffer(data, np.uint8)
    everyone = mx.distributed.all_gather(mx.array(mine), group=_ranks.group, stream=transport())
    mx.eval(everyone)
    rows = [json.loads(row.tobytes().rstrip(b"\0")) for row in np.array(everyone)]
    for rank, row in enumerate(rows):
        if "reason" in row:
            _starting = False
            raise PeerError(f"rank {rank}: {row['reason']}")
    return [row["text"] for row in rows]


def least(number: int) -> int:
    """The least of the numbers of all ranks."""
    return min(map(int, gathered(str(number))))


def one_dtype(dtype: str | None) -> str | None:
    """The dtype for all ranks: that of the first rank whose chip needs another than the model's."""
    return next((found for found in gathered(dtype or "") if found), None)
