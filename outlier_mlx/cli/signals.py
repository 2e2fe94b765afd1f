"""Signals that end the program: it cleans up first, as it does for Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

#: What the program says when one of these ends it.
WORDS: dict[int, str] = {signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


class Ended(SystemExit):
    """A signal ends the program; its exit code is 128 and the signal's number, as in shells."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(self.status)
        self.word = WORDS[number]


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Let signals that would end the process at once raise `Ended` in the block.

    Signals that are ignored stay so, as SIGHUP under `nohup`. While the program cleans up, no
    further one interrupts it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in WORDS if signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, _: object) -> NoReturn:
        for other in taken:
            signal.signal(other, signal.SIG_IGN)
        raise Ended(number)

    try:
        for number in taken:
            signal.signal(number, end)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let signals end the process at once in the block, as the system does it.

    MLX does not let Python's own handlers run while it looks for other ranks.
    """
    before = {number: signal.getsignal(number) for number in (*WORDS, signal.SIGINT)}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
