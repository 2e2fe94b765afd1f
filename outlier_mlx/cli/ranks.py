"""Commands that several processes run together, started by `mlx.launch`. Imports no MLX early."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlier_mlx.engine.distributed.launcher import launched_rank
from outlier_mlx.errors import OutlierError

#: Commands that run a model over several ranks.
TOGETHER = ("generate", "chat", "serve", "bench", "perplexity", "eval")
LOST = "the connection to another rank was lost: its process has ended, or the network failed"
# MLX's ring says so in what it raises if the process at the other end is gone.
_LOST = "connection to a peer was lost"


def only_the_first_talks() -> None:
    """Let a process that is not rank 0 write nothing."""
    if launched_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - to the end


@contextmanager
def together(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Run a command with the other ranks, if a launcher started several.

    Args:
        name: the command's.
        options: its options; those that have no meaning here are refused.

    Raises:
        OutlierError: the command or an option is for one process alone.
    """
    if launched_rank() is None:
        if options.get("pipeline"):
            raise OutlierError("--pipeline is for several processes: start them with mlx.launch")
        yield
        return
    from outlier_mlx.engine.distributed.ranks import connect, finish

    own = connect(pipeline=bool(options.get("pipeline")))
    if own.size > 1:
        _quiet_transport(debug=bool(options.get("debug")))
        _check(name, options)
    yield
    finish()


def join(folder: Path) -> None:
    """Make sure that all ranks are about to do the same with the same model.

    Raises:
        PeerError: one of them is not.
    """
    from outlier_mlx.engine.distributed.handshake import agree, facts
    from outlier_mlx.engine.distributed.ranks import ranks

    if ranks().size > 1:
        agree(facts(folder, sys.argv[1:]))


def tell_others(reason: str) -> None:
    """Tell the other ranks why this one ends, if they wait for it."""
    if launched_rank() is None:
        return
    from outlier_mlx.engine.distributed.ranks import fail

    fail(reason)


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    return launched_rank() is not None and _LOST in str(error)


# Options that have no meaning, or no one result, where several processes compute.
_ALONE = {
    "draft_model": "a draft model runs in one process alone",
    "expert_skip": "which experts are in memory differs from rank to rank",
    "prompt_cache": "a KV cache is spread over the ranks",
    "cache_dir": "a KV cache is spread over the ranks",
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


def _quiet_transport(*, debug: bool) -> None:
    """Drop what MLX's transport writes beside its errors, a line for each failed attempt."""
    if debug or os.environ.get("MLX_RING_VERBOSE"):
        return
    if launched_rank() == 0:
        own = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        sys.stderr = own
    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 2)
