"""MLX's streams (queues of computations) for threads that compute at the same time."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import mlx.core as mx

# MLX frees no stream, nor the thread behind one on the CPU, so they are used again.
_idle: defaultdict[str, SimpleQueue[mx.Stream]] = defaultdict(SimpleQueue)


@contextmanager
def own_mlx_stream() -> Iterator[None]:
    """Compute on a stream that no other thread uses for as long as the block lasts.

    On the CPU a stream is a thread: without this, all threads would wait for one.
    """
    device = mx.default_device()
    idle = _idle[str(device)]
    try:
        stream = idle.get_nowait()
    except Empty:
        stream = mx.new_thread_unsafe_stream(device)
    try:
        with mx.stream(stream):
            yield
    finally:
        idle.put(stream)
