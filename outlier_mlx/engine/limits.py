"""Limits of MLX's memory: what it keeps, what it waits at, and what macOS may not page out."""

import os

import mlx.core as mx

from outlier_mlx.engine.buffers import MAX_MB
from outlier_mlx.engine.machine import gpu_limit


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
