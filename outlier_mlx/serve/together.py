"""Several replies to one request, generated at the same time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from queue import Empty, Queue
from typing import Any

from outlier_mlx.serve.pieces import Piece
from outlier_mlx.serve.replies import Reply
from outlier_mlx.terminal import Progress, no_progress


def together(
    replies: Sequence[Reply], pool: Executor, progress: Progress
) -> Iterator[tuple[int, Piece]]:
    """Start replies, and yield the pieces of all of them as they come, with the reply's number.

    Args:
        replies: all for one client.
        pool: its threads wait for what is generated.
        progress: called about once a second while nothing comes.

    Raises:
        Refused: generation of one of them failed.
        ConnectionError: the client disconnected.
    """
    arrived: Queue[Any] = Queue()

    def follow(number: int, reply: Reply) -> None:
        try:
            reply.start(no_progress)
            for piece in reply.pieces():
                arrived.put((number, piece))
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)
        finally:
            reply.close()

    for number, reply in enumerate(replies):
        pool.submit(follow, number, reply)
    left = len(replies)
    while left:
        try:
            item = arrived.get(timeout=1.0)
        except Empty:
            # One that has ended is closed, as all are when the server shuts down.
            under_way = [reply for reply in replies if not reply.generated]
            (under_way or replies)[0].check()
            progress(0, None)
            continue
        if isinstance(item, BaseException):
            raise item
        if item is None:
            left -= 1
        else:
            yield item
