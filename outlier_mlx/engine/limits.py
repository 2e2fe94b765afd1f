"""Limits of MLX's memory: what it keeps, what it waits at, and what macOS may not page out.

They are MLX's, so there is one of each in a process: those of the plan of the last model loaded.
"""

import os

import mlx.core as mx

from outlier_mlx.engine.buffers import MAX_MB
from outlier_mlx.engine.machine import UNLIMITED, gpu_limit
from outlier_mlx.engine.plan import Plan
from outlier_mlx.upstream import replace_wiring

# Memory limits that plans took the place of.
_usual_limits: list[int] = []
_RECOMMENDED = "max_recommended_working_set_size"


def keep_to(plan: Plan) -> None:
    """Let MLX keep to the plan of a model that is about to be loaded.

    Without a GPU, MLX's own limits stay.

    - Freed memory that it keeps for what comes next: as much as planned; where nothing is paged,
      also what the plan leaves free, without the headroom.
    - The wired limit, which mlx-lm raises while it generates: what is planned, and not all that
      the GPU may use. Other programs, and the page cache, keep the rest.
    - MLX waits for the GPU rather than take more than the GPU may use, if command buffers are large
      (`wait_within_budget`); or than was planned, if experts are paged.
    """
    limit = gpu_limit()
    if limit is None:
        return
    _restore_memory_limit()
    wait_within_budget()
    spare = 0 if plan.slots is not None else _spare(plan)
    mx.set_cache_limit(max(plan.mlx_cache.nbytes, spare))
    # What is in memory already is another model's, which may run, too; the plan may count it.
    planned = plan.needed + max(0, mx.get_active_memory() - plan.beside.nbytes)
    if plan.slots is not None:
        _usual_limits.append(mx.set_memory_limit(min(limit, planned)))
    _bound_wiring(planned)


def wait_within_budget() -> None:
    """Let MLX wait for the GPU before it takes more than the GPU's memory, if buffers are large.

    Intermediate results of a command buffer are freed when the GPU is done with all of it, and MLX
    prepares up to ten buffers ahead. With MLX's own small buffers this is little; with larger ones
    it can be gigabytes in a long prompt. MLX waits at its memory limit, which by default is one and
    a half times what the GPU should use; here it becomes just that. A lower limit stays.
    """
    limit = gpu_limit()
    if MAX_MB in os.environ and limit:
        before = mx.set_memory_limit(limit)
        if before < limit:
            mx.set_memory_limit(before)


def _restore_memory_limit() -> None:
    """Have the memory limit that was there before a plan."""
    while _usual_limits:
        mx.set_memory_limit(_usual_limits.pop())


def _spare(plan: Plan) -> int:
    """Bytes that MLX may keep where everything is loaded."""
    if plan.available.nbytes == UNLIMITED:
        return 0
    left = plan.available.nbytes - plan.available.headroom - plan.needed
    return plan.mlx_cache.nbytes + left


def _bound_wiring(nbytes: int) -> None:
    """Let mlx-lm wire so many bytes at most."""

    def wire() -> int | None:
        recommended = mx.device_info().get(_RECOMMENDED)
        if recommended is None:
            return None
        return int(mx.set_wired_limit(min(int(recommended), nbytes)))

    replace_wiring(wire)
