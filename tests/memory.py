"""What MLX has in memory, so that a test's count is of its own arrays."""

import gc

import mlx.core as mx


def at_rest() -> int:
    """Bytes of the arrays that are in use; MLX's peak is counted anew from here.

    Models are circles of objects: those that earlier tests left are freed whenever Python next
    looks for circles, and a count that they are part of would go down in the middle of a test.
    """
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()
