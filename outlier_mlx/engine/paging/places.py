"""Which experts a routing needs, and where an expert can be."""

from typing import Literal

import mlx.core as mx
import numpy as np

#: In a slot; on its way to one, because it was read early; or nowhere but in the files.
Place = Literal["memory", "early", "disk"]


def needed(indices: mx.array, weights: mx.array) -> set[int]:
    """The experts of a routing whose weight is not 0; waits for it.

    Args:
        indices: (..., k) uint32.
        weights: (..., k) float32.
    """
    chosen, of = np.array(indices, copy=False), np.array(weights, copy=False)
    return set(chosen[of != 0].tolist())
