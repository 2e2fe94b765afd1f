"""Alphas as part of experts' float16 scales, for formats that have no alphas.

An expert adds alpha * D(silu(G x) * (U x)): its alpha can go into the scales of `down`, and a
factor can move between the scales of `up` and `down`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outlier_mlx.storage.rounding import narrowed, nearest_product, rounding_error


def in_float16(values: np.ndarray, where: str) -> np.ndarray:
    """Numbers as llama.cpp's blocks hold them; `where` names file and tensor.

    Raises:
        CheckpointError: one is too large.
    """
    return narrowed(values, "float16", where, keeps="--format transformers")


@dataclass(frozen=True)
class Folded:
    """Scales of an expert's rows in float16.

    Attributes:
        gate: (width,) float16.
        up: (width,) float16.
        down: (hidden,) float16, times alpha.
        rounding: the largest relative difference to what the exact scales would give: of the gate,
            or of the product of up and down.
    """

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    rounding: float


def common_alpha(alphas: Mapping[int, np.ndarray]) -> float:
    """The alpha of all experts of all layers, if they have the same that is not 0; else 1."""
    values = {float(alpha) for each in alphas.values() for alpha in each}
    return values.pop() if len(values) == 1 and values != {0.0} else 1.0


def fold(gate: np.ndarray, up: np.ndarray, down: np.ndarray, alpha: float, where: str) -> Folded:
    """Round an expert's scales to float16, alpha included.

    Where `up` and `down` each have one scale for the whole matrix, two float16 numbers are looked
    for whose product is nearest: 1024 pairs come closer than one number does.

    Args:
        gate: (width,) float32, the scales of the rows of the gate.
        up: (width,) float32.
        down: (hidden,) float32.
        alpha: float32.
        where: what messages call the expert.

    Raises:
        CheckpointError: a scale is too large for float16.
    """
    wanted = down.astype(np.float64) * alpha
    halves = [in_float16(values, where) for values in (gate, up, wanted)]
    off = [rounding_error(*pair) for pair in zip((gate, up, wanted), halves, strict=True)]
    if not wanted.any():
        off[1] = 0.0  # the expert adds nothing
    product = float(up[0]) * float(wanted[0])
    alike = (up == up[:1]).all() and (wanted == wanted[:1]).all()
    if off[1] + off[2] > 0 and alike and product:
        one, other = nearest_product(float(up[0]), float(wanted[0]))
        halves[1:] = np.full_like(halves[1], one), np.full_like(halves[2], other)
        off[1], off[2] = abs(float(one) * float(other) / product - 1), 0.0
    return Folded(halves[0], halves[1], halves[2], max(off[0], off[1] + off[2]))
