"""Finished responses that are kept, so that a later request can continue them."""

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MAX_RESPONSES = 1000
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Kept:
    """A response that is kept.

    Attributes:
        response: the response.
        items: the items of the conversation up to its end, without instructions.
    """

    response: dict[str, Any]
    items: list[Any]


class ResponseStore:
    """Keeps responses by their ids; the ones that were used least recently are dropped first.

    They are kept as JSON, of which the size is known; as objects, they could take many times that.
    Each has its whole conversation, though several may share most of one.

    Args:
        size: largest number of responses.
        nbytes: largest size of all of them as JSON.
    """

    def __init__(self, size: int = MAX_RESPONSES, nbytes: int = MAX_BYTES) -> None:
        self._size, self._nbytes, self._room = size, nbytes, nbytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, kept: Kept) -> None:
        """Keep a response, unless it is larger than all that can be kept."""
        text = json.dumps([kept.response, kept.items]).encode()
        if len(text) > self._nbytes:
            return
        with self._lock:
            self._kept[kept.response["id"]] = text
            self._room -= len(text)
            while self._room < 0 or len(self._kept) > self._size:
                self._room += len(self._kept.popitem(last=False)[1])

    def get(self, name: str) -> Kept | None:
        """The response of this id, if it is kept."""
        with self._lock:
            if name not in self._kept:
                return None
            self._kept.move_to_end(name)
            text = self._kept[name]
        return Kept(*json.loads(text))

    def drop(self, name: str) -> bool:
        """Drop a response; returns whether it was kept."""
        with self._lock:
            if name not in self._kept:
                return False
            self._room += len(self._kept.pop(name))
            return True
