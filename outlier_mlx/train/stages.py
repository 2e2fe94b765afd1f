"""What a training makes: the layers with experts, and what it was worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TrainedLayer:
    """A layer's router and experts, as they will be written.

    Attributes:
        layer: its number.
        router: (experts, hidden) float32.
        alphas: (experts,) float32.
        trits: by "gate_proj", "up_proj" and "down_proj": (experts, out, in) int8.
        scales: by the same names: (experts, out) float16.
    """

    layer: int
    router: np.ndarray
    alphas: np.ndarray
    trits: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]


@dataclass(frozen=True)
class Upcycled:
    """The result of a training.

    Attributes:
        layers: the layers with experts, ascending; each may be read when it is asked for.
        before: the base's perplexity on the held-out windows, by the corpus' name.
        after: the same with the experts.
        stages: what each stage did, as JSON values.
        peak: bytes of memory that MLX had at most.
    """

    layers: Sequence[TrainedLayer]
    before: dict[str, float]
    after: dict[str, float]
    stages: list[dict[str, Any]]
    peak: int
