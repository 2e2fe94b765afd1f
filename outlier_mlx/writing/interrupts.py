"""Steps that Ctrl-C, or a signal that ends the program, does not divide."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undivided() -> Iterator[None]:
    """Hold back what Ctrl-C and other signals raise until the block has ended.

    Signals that end the process at once still do.
    """
    if threading.current_thread() is not threading.main_thread():  # where none raises anything
        yield
        return
    came: list[int] = []
    former: dict[int, Callable[[int, Any], Any]] = {}
    try:
        with ExitStack() as stack:
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    former[number] = handler
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, lambda number, _: came.append(number))
            yield
    finally:
        if came:
            former[came[0]](came[0], None)
