"""Files of the kind alpha_overlay.pt for two MoE layers of five, with three experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.checkpoints.alpha_overlay import AlphaOverlay, read_alpha_overlay
from tests.form_builders import Pickle, torch_save, torch_zip

LAYERS, EXPERTS = 5, 3
NEW = {1: [0.25, 0.5, -0.75], 3: [1.25, 0.0, 2.0]}
OLD = {1: [1.0, 1.5, 0.5], 3: [0.125, 0.625, 0.375]}


def read(path: Path, value: Any) -> AlphaOverlay:
    """What is found in a file that holds a value, or the bytes or pickle that are given."""
    if isinstance(value, Pickle):
        value = torch_zip(value)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch_save(path, value)
    return read_alpha_overlay(path, LAYERS, EXPERTS)


def flat(table: dict[int, list[float]]) -> dict[tuple[int, int], float]:
    return {(n, e): value for n, values in table.items() for e, value in enumerate(values)}


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)
