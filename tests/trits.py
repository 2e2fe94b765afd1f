"""Random trits, and pieces small enough for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from outlier_mlx.ternary import (
    flat,
    ggml,
    pack_rows,
    pack_tq1_0,
    rows,
)

ALL_BYTES = np.arange(256, dtype=np.uint8)
PACKERS: list[Callable[[np.ndarray], Any]] = [pack_tq1_0, pack_rows]


def random_trits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, shape, np.int8)


def without_code_3(packed: np.ndarray) -> np.ndarray:
    """Rows of TQ2_0 blocks, (..., blocks * 66) uint8, with code 2 in place of the unused code 3."""
    packed = packed.copy()
    codes = packed.reshape(-1, 66)[:, :64]
    codes &= ~(codes >> 1 & codes & 0x55)
    return packed


@contextmanager
def tiny_chunks(size: int = 4) -> Iterator[None]:
    """Small inputs then take every path that large ones take, rows longer than a chunk included."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (flat, ggml, rows):
            patch.setattr(module, "_CHUNK", size)
        yield
