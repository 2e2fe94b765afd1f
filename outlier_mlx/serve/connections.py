"""Connections: how many there are, whose they are, and how long a client may take."""

import io
import ipaddress
import json
import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPException
from typing import Any

from outlier_mlx.serve.access import Refused

# Time limits for receiving the head of a request, and its body.
HEAD_SECONDS = 10.0
BODY_SECONDS = 60.0
# Bytes of a head; http.server alone would take 100 lines of 64 KB from anybody.
HEAD_BYTES = 1 << 18
# Time limit for all the waiting until a client takes what is sent to it.
SEND_SECONDS = 60.0
# Connections whose request is still arriving, besides as many as can be answered.
SPARE = 16


class Connection(io.RawIOBase):
    """A client's connection, as a stream that raises TimeoutError for slow clients.

    Args:
        accepted: the connected socket.
        owner: see `owner_of`.

    Attributes:
        deadline: when receiving must have ended, on the clock of `time.monotonic`.
        heard: when something was received, on the same clock.
        room: bytes that may still be received; None: any number.
    """

    def __init__(self, accepted: socket.socket, owner: str | None) -> None:
        super().__init__()
        self.socket = accepted
        self.owner = owner
        self.heard = time.monotonic()
        self.deadline = self.heard + HEAD_SECONDS
        self.room: int | None = HEAD_BYTES
        self._patience = SEND_SECONDS

    def readable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive what there is, at the latest at the deadline.

        Raises:
            TimeoutError: nothing came before the deadline.
            HTTPException: there is no room for more; http.server answers with status 431.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the client is too slow")
        if self.room is not None and self.room <= 0:
            raise HTTPException("the head of the request is too long")
        self.socket.settimeout(left)
        count = self.socket.recv_into(buffer)
        if self.room is not None:
            self.room -= count
        self.heard = time.monotonic()
        return count

    def write(self, data: Any) -> int:
        """Send all of the data."""
        if self._patience <= 0:
            raise TimeoutError("the client does not take what is sent")
        self.socket.settimeout(self._patience)
        started = time.monotonic()
        try:
            self.socket.sendall(data)
        finally:
            self._patience -= time.monotonic() - started
        return len(data)

    def turn_away(self) -> None:
        """Answer that there are too many connections, without waiting, and end receiving."""
        body = json.dumps(_crowded().as_json()).encode()
        head = (
            "HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Retry-After: 1\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with suppress(OSError):
            self.socket.send(head.encode() + body, socket.MSG_DONTWAIT)
            self.socket.shutdown(socket.SHUT_RDWR)


class Connections:
    """The open connections of a server.

    A connection is arriving until its request is complete; then it is answered. Both kinds have a
    limit, so nobody waits for clients that are silent: if too many are arriving, the one that has
    been silent for the longest is closed. No other machine has more than half of either kind. This
    one can have all, because all its programs, and a proxy before the server, have one address.

    Args:
        limit: requests that are answered at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._arriving: set[Connection] = set()
        self._answered: set[Connection] = set()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._arriving) + len(self._answered)

    def admit(self, accepted: socket.socket, address: str) -> Connection:
        """Register a new connection; if there are too many that are arriving, another is closed.

        Args:
            accepted: the connected socket.
            address: the client's.
        """
        new = Connection(accepted, owner_of(address))
        with self._changed:
            places = self._limit + SPARE
            rivals = _of_owner(self._arriving, new)
            if len(rivals) < _share(places, new):
                rivals = self._arriving if len(self._arriving) >= places else set()
            oldest = min(rivals, key=lambda rival: rival.heard, default=None)
            if oldest is not None:
                self._arriving.remove(oldest)
            self._arriving.add(new)
        if oldest is not None:
            oldest.turn_away()
        return new

    def check_room(self, connection: Connection) -> None:
        """Check that one more request can be answered.

        Raises:
            Refused: 503.
        """
        with self._changed:
            own = _of_owner(self._answered, connection)
            if len(self._answered) >= self._limit or len(own) >= _share(self._limit, connection):
                raise _crowded()

    def claim(self, connection: Connection) -> None:
        """Register that a connection's request has arrived.

        Raises:
            Refused: 503, there are too many.
            ConnectionError: the connection was closed for another.
        """
        with self._changed:
            if connection not in self._arriving:
                raise ConnectionError("the connection was closed to make room")
            self.check_room(connection)
            self._arriving.remove(connection)
            self._answered.add(connection)

    def leave(self, connection: Connection) -> None:
        """Register that a connection has ended."""
        with self._changed:
            self._arriving.discard(connection)
            self._answered.discard(connection)
            self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Close those that are arriving, and wait until the others have ended."""
        with self._changed:
            for connection in self._arriving:
                connection.turn_away()
            self._changed.wait_for(lambda: not len(self), seconds)


def owner_of(address: str) -> str | None:
    """Whose an address is: itself, or the network of an IPv6 address; None for this machine."""
    found = ipaddress.ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    if found.is_loopback:
        return None
    # A household or a server usually gets all the addresses that have the first 64 bits in common.
    return str(ipaddress.ip_network((found, 32 if found.version == 4 else 64), strict=False))


def _crowded() -> Refused:
    return Refused(503, "too many connections; try again")


def _of_owner(connections: set[Connection], one: Connection) -> set[Connection]:
    return {connection for connection in connections if connection.owner == one.owner}


def _share(places: int, connection: Connection) -> int:
    return places if connection.owner is None else max(1, places // 2)
