"""What a launcher, such as `mlx.launch`, tells the processes that it starts. Imports no MLX."""

import os
from pathlib import Path

# `mlx.launch` with the ring and JACCL, and MPI's launchers.
_RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
# Of the ring; `mlx.launch` gives an empty one to a process that has no others.
_HOSTS = "MLX_HOSTFILE"


def launched_rank() -> int | None:
    """The number that this process was given; None: it has no others beside it."""
    try:
        if _HOSTS in os.environ and not Path(os.environ[_HOSTS]).read_text().strip():
            return None
    except OSError:
        pass  # MLX says so when it reads it
    found = (os.environ.get(name, "") for name in _RANK_VARIABLES)
    return next((int(value) for value in found if value.isdecimal()), None)


#: What a user is told if another rank is gone.
LOST = "the connection to another rank was lost: its process has ended, or the network failed"
# What MLX's ring raises then.
_LOST = "connection to a peer was lost"


def is_lost(error: BaseException) -> bool:
    """Whether an error of MLX says that another rank is gone."""
    return launched_rank() is not None and _LOST in str(error)
