"""Ends a process of several when a signal comes or another one is gone, also while MLX waits.

MLX's ring fails what waits for a peer whose process has ended, but not what is begun later: that
never ends, and Python's own signal handlers do not run meanwhile. The ring says on stderr that a
connection was lost, so a thread reads what the process writes there.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

# What the ring writes begins with this; the second ends it.
_RING, _LOST = b"[ring]", b"Too many send/recv errors"
# Seconds in which the program can end by itself after it lost a rank, or got a signal.
_GRACE = 2.0


def watch(tell: Callable[[int | None], None], *, hide: bool) -> None:
    """Begin to watch, in the main thread.

    Args:
        tell: called in another thread before that ends the process, with the number of a signal;
            None: another rank is gone.
        hide: whether what the ring writes to stderr is dropped from now on.
    """
    real = os.dup(2)
    if sys.stderr.name != os.devnull:  # that of a rank that does not talk
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    written, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    hidden = _RING if hide else b"\n"  # which no line begins with
    threading.Thread(target=_run, args=(written, signals, real, hidden, tell), daemon=True).start()


def _run(
    written: int, signals: int, real: int, hidden: bytes, tell: Callable[[int | None], None]
) -> None:
    rest = b""
    while True:
        ready, _, _ = select.select([written, signals], [], [])
        if signals in ready:
            number = os.read(signals, 1)[0]
            if number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                time.sleep(_GRACE)
                tell(number)
                os._exit(128 + number)
        if written in ready:
            *lines, rest = (rest + os.read(written, 1 << 16)).split(b"\n")
            others = [line + b"\n" for line in lines if not line.startswith(hidden)]
            os.write(real, b"".join(others))
            if any(line.startswith(_RING) and _LOST in line for line in lines):
                time.sleep(_GRACE)
                tell(None)
                os._exit(1)
