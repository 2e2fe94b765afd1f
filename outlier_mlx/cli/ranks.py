"""Commands that several processes run together, started by `mlx.launch`. Imports no MLX early."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from outlier_mlx.cli.signals import WORDS, ending_at_once
from outlier_mlx.cli.watching import watch
from outlier_mlx.engine.distributed.launcher import LOST, launched_rank
from outlier_mlx.errors import OutlierError, one_line

#: Commands that run a model over several ranks.
TOGETHER = ("generate", "chat", "serve", "bench", "perplexity", "eval")


# The terminal of a rank that does not talk, for the case that the one that does cannot hear of it.
_terminal = 2


def only_the_first_talks() -> None:
    """Let a process that is not rank 0 write nothing."""
    global _terminal
    if launched_rank():
        _terminal = os.dup(2)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - to the end


@contextmanager
def together(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Run a command with the other ranks, if a launcher started several.

    Args:
        name: the command's.
        options: those that were given; some have no meaning here, and are refused.

    Raises:
        OutlierError: the command or an option is for one process alone.
    """
    if launched_rank() is None:
        if options.get("pipeline"):
            raise OutlierError("--pipeline is for several processes: start them with mlx.launch")
        yield
        return
    from outlier_mlx.engine.distributed.ranks import connect, finish

    with ending_at_once():
        own = connect(pipeline=bool(options.get("pipeline")))
    try:
        if own.size > 1:
            watch(_tell, hide=not options.get("debug"))
            _check(name, options)
        yield
        finish()
    except BaseException as error:
        _ending.set()
        if own.size > 1:
            atexit.register(_leave, _status_of(error))
        raise


def _status_of(error: BaseException) -> int:
    """The exit code of a program that an error ends."""
    usual = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return int(getattr(error, "status", getattr(error, "exit_code", usual)))


def _leave(status: int) -> None:
    """End at once: MPI would wait for the others, who wait for this rank."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def join(folder: Path, *others: Path | None) -> None:
    """Make sure that all ranks are about to do the same with the same model.

    Args:
        folder: the model's.
        others: further models and files that must be the same; None: there is none.

    Raises:
        PeerError: one of them is not.
    """
    from outlier_mlx.engine.distributed.handshake import agree, facts
    from outlier_mlx.engine.distributed.ranks import ranks

    if ranks().size > 1:
        agree(facts([folder, *filter(None, others)], sys.argv[1:]))


def tell_others(error: BaseException, reason: str) -> None:
    """Tell the other ranks why this one ends; if they do not listen, tell the user.

    They listen until the model is loaded. From then on, what is wrong with an input ends all ranks
    alike, and the first one says it.

    Args:
        error: what ends this rank.
        reason: what the program says of it.
    """
    if launched_rank() is None:
        return
    from outlier_mlx.engine.distributed.ranks import fail, ranks

    if fail(reason) or (isinstance(error, OutlierError) and ranks().size > 1):
        return
    tell_user(reason)


def tell_user(reason: str) -> None:
    """Say on the terminal why a rank ends that does not talk otherwise."""
    if rank := launched_rank():
        with suppress(OSError):
            os.write(_terminal, f"error: rank {rank}: {one_line(reason)}\n".encode())


# Options that have no meaning, or no one result, where several processes compute.
_ALONE = {
    "prompt_lookup": "the times by which drafts pay differ from rank to rank",
    "draft_model": "a draft model runs in one process alone",
    "num_draft_tokens": "a draft model runs in one process alone",
    "expert_skip": "which experts are in memory differs from rank to rank",
    "prompt_cache": "a KV cache is spread over the ranks",
    "cache_dir": "a KV cache is spread over the ranks",
    "cache_dir_size": "a KV cache is spread over the ranks",
    "prompt_cache_bytes": "sizes of KV caches differ from rank to rank; --prompt-cache-size works",
    "idle_unload": "ranks load the model together, once",
    "kernels": "kernels are timed in one process",
    "settings": "MLX's settings are compared in one process",
    "trace": "a trace is replayed in one process",
}


def _check(name: str, options: Mapping[str, Any]) -> None:
    if name not in TOGETHER:
        raise OutlierError(f"{name} is for one process; mlx.launch is for {', '.join(TOGETHER)}")
    for option, reason in _ALONE.items():
        if options.get(option):
            spelling = f"--{option.replace('_', '-')}"
            raise OutlierError(f"{spelling}: not with several ranks: {reason}")


# Set when the main thread ends by itself, and says why.
_ending = threading.Event()


def _tell(number: int | None) -> None:
    if not _ending.is_set():
        word = f"error: {LOST}" if number is None else WORDS.get(number, "interrupted")
        with suppress(OSError):  # the terminal may be gone
            print(word, file=sys.stderr, flush=True)
