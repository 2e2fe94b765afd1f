"""How fast a model decodes that reads experts from a disk: the formula of `bench --trace`.

A token goes through the MoE layers one after the other. Of a layer, the time line is

    1  own part   attention, norms and router, and an equal part of what no layer has (the head, the
                  KV cache): bytes / bandwidth
    2  routed     known now: the missing experts begin to be read, as soon as the disk is free
    3  shared FFN bytes / bandwidth, while the disk reads
    4  wait       until the disk has read what is needed
    5  experts    bytes of the needed experts / bandwidth

With look-ahead, experts for the next MoE layer are queued at 2, and the disk also reads during 5
and the next layer's 1. What is missing is read first, then what is queued, in its order. Of a
layer's queue, what proves to be needed is taken to come first, since that is the likeliest. What is
read in vain delays what is queued behind it. Without look-ahead, nothing but 3 overlaps with the
disk:

    seconds = (base + experts) / bandwidth + sum over layers of max(0, missing / disk - shared FFN)

Nothing else is counted: no launches, no time for looking up, and both rates are reached always. So
this is the most that there can be.
"""

import numpy as np

from outlier_mlx.measure.expert_trace import About
from outlier_mlx.measure.replay import Counts


def decode_seconds(
    counts: Counts, about: About, bandwidth_gb_s: float, disk_gb_s: float
) -> np.ndarray:
    """Seconds of each pass, if it is a decoded token.

    Args:
        counts: what a replay counted.
        about: what the parts of the model take.
        bandwidth_gb_s: GB/s of memory.
        disk_gb_s: GB/s of the disk.

    Returns:
        (passes,) float64.
    """
    passes, layers = counts.needed.shape
    compute, disk = (about.expert_bytes / rate / 1e9 for rate in (bandwidth_gb_s, disk_gb_s))
    own = (about.base_bytes - about.shared_bytes) / layers / bandwidth_gb_s / 1e9
    shared = about.shared_bytes / layers / bandwidth_gb_s / 1e9
    missed = disk * counts.missed.astype(np.float64)
    useful = disk * counts.useful.astype(np.float64)
    in_vain = disk * counts.early.astype(np.float64) - useful
    # Seconds: where the layers are, when the disk begins with its queue, and what reading in vain
    # is queued there before what the present layer reads.
    now = free = stale = np.zeros(passes)
    for layer in range(layers):
        now = now + own
        done = np.maximum(0.0, now - free)
        ahead, done = np.maximum(0.0, stale - done), np.maximum(0.0, done - stale)
        wanted = np.maximum(0.0, useful[:, layer] - done)
        done = np.maximum(0.0, done - useful[:, layer])
        behind = np.maximum(0.0, in_vain[:, layer] - done)
        # Nothing waits for what is in vain, unless something that is wanted is queued behind it.
        free = np.maximum(free, now) + missed[:, layer]
        free = np.where(wanted > 0, free + ahead + wanted, free)
        waits = (wanted > 0) | (missed[:, layer] > 0)
        stale = np.where(wanted > 0, 0.0, ahead) + behind
        now = np.maximum(now + shared, np.where(waits, free, 0.0))
        now = now + compute * counts.needed[:, layer]
    return now
