"""How fast a model decodes that reads experts from a disk: the formula of `bench --trace`.

A token goes through the MoE layers one after the other. Of a layer, the time line is

    1  own part   attention, norms and router, and an equal part of what no layer has (the head, the
                  KV cache): bytes / bandwidth
    2  routed     known now: the missing experts begin to be read, as soon as the disk is free
    3  shared FFN bytes / bandwidth, while the disk reads
    4  wait       until the disk has read what is needed
    5  experts    bytes of the needed experts / bandwidth

With look-ahead, experts for the next MoE layer are read from 2 on, after the missing ones of this
layer, in the order of the layers; so the disk also reads during 5 and the next layer's 1. Without
it, nothing but 3 overlaps with the disk:

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
    now, free = np.zeros(passes), np.zeros(passes)  # and when the disk has nothing to do
    ahead = np.zeros(passes)  # when the experts of the layer in hand that were read early are there
    for layer in range(layers):
        now = now + own
        ready = np.where(counts.early[:, layer] > 0, ahead, 0.0)
        free = np.maximum(free, now)
        free = free + disk * counts.missed[:, layer]
        ready = np.where(counts.missed[:, layer] > 0, free, ready)
        if layer + 1 < layers:
            free = free + disk * counts.early[:, layer + 1]
            ahead = free
        now = np.maximum(now + shared, ready) + compute * counts.needed[:, layer]
    return now
