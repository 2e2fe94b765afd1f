"""Leaving out experts that would have to be read and that matter little: on request, and lossy."""

from collections.abc import Collection

import mlx.core as mx
import numpy as np


def leave_out(
    indices: mx.array, weights: mx.array, missing: Collection[int], share: float
) -> tuple[mx.array, int]:
    """Give weight 0 to missing experts of which every token's share is below `share`.

    A token's share of an expert is |weight| / sum of |weight| over its k experts, where weights are
    those that experts are summed with: of the router, times alpha. Those of other experts stay.

    Args:
        indices: (..., k) uint32, evaluated.
        weights: (..., k) float32, evaluated.
        missing: experts that would have to be read.
        share: between 0 and 1.

    Returns:
        The weights, and how many experts are left out.
    """
    chosen, of = np.array(indices, copy=False), np.abs(np.array(weights, copy=False))
    small = of < share * of.sum(axis=-1, keepdims=True)
    used = of != 0
    out = set(chosen[small & used].tolist()) - set(chosen[~small & used].tolist())
    out.intersection_update(missing)
    if not out:
        return weights, 0
    kept = ~np.isin(chosen, sorted(out))
    return mx.where(mx.array(kept), weights, 0.0), len(out)
