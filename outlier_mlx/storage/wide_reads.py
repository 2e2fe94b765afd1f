"""Small reads of files on the hub, answered from few large ones.

Each request takes a while, and the hub limits how many there may be in five minutes: 3000 of those
who have not logged in (https://huggingface.co/docs/hub/rate-limits).
"""

from collections import OrderedDict
from concurrent.futures import Future
from threading import Lock

from outlier_mlx.storage.safetensors import ReadRange

#: Bytes that are asked for at a time.
BLOCK_BYTES = 8 << 20
# Blocks that are remembered: for 8 threads with 3 tensors each, and some.
_KEPT = 32


class WideReads:
    """Reads ranges of tensors by whole blocks, and remembers the last ones; for several threads."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[int, int], Future[bytes]] = OrderedDict()
        self._tensors = 0
        self._lock = Lock()

    def within(self, read: ReadRange, start: int, stop: int) -> ReadRange:
        """What reads ranges of a tensor that is at bytes `start` to `stop` of a file.

        Args:
            read: reads from the file; it is called for ranges of at most `BLOCK_BYTES` within the
                tensor, and its errors are those of the result.
            start: the tensor's first byte.
            stop: the end of its last byte.
        """
        self._tensors += 1
        tensor = self._tensors

        def fetch(first: int, last: int) -> bytes:
            pieces = []
            for number in range((first - start) // BLOCK_BYTES, -(-(last - start) // BLOCK_BYTES)):
                at = start + number * BLOCK_BYTES
                end = min(stop, at + BLOCK_BYTES)
                block = self._block((tensor, number), read, at, end)
                pieces.append(block[max(0, first - at) : last - at])
                if last >= end:
                    self._finish((tensor, number))
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

        return fetch

    def _finish(self, key: tuple[int, int]) -> None:
        """A block was read to its end: it is the first to be forgotten."""
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key, last=False)

    def _block(self, key: tuple[int, int], read: ReadRange, start: int, stop: int) -> bytes:
        with self._lock:
            found = self._blocks.get(key)
            block = found or self._blocks.setdefault(key, Future())
            self._blocks.move_to_end(key)
            while len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        if found is None:
            try:
                block.set_result(read(start, stop))
            except BaseException as error:
                block.set_exception(error)
                raise
        return block.result()
