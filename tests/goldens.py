"""The reference cases in ../shared/goldens: where they are, and how close is close enough."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tensor_file import read_arrays

_SHARED = Path(__file__).resolve().parents[1].parent / "shared"

LOGITS_ATOL = 2e-4
LOGITS_RTOL = 1e-4


def require_shared() -> Path:
    """The folder of reference cases. Without it the test skips, or fails when CI is set."""
    if not (_SHARED / "goldens").is_dir():
        reason = "needs the reference cases in ../shared/goldens, beside the project"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason, allow_module_level=True)
    return _SHARED


@dataclass(frozen=True)
class Golden:
    """One case. `expected` is keyed as the file: logits (T, V), greedy_tokens (16,),
    router.N.indices (T, K) and so on; `readme` holds dims and effective alphas."""

    name: str
    overlay: Path
    base: Path | None
    readme: dict[str, Any]
    expected: dict[str, np.ndarray]

    @property
    def tokens(self) -> list[int]:
        """The prompt."""
        return self.expected["input_ids"][0].tolist()

    @property
    def greedy(self) -> list[int]:
        """The greedy continuation."""
        return self.expected["greedy_tokens"].tolist()

    @property
    def moe_layers(self) -> list[int]:
        """The layers with experts."""
        return self.readme["dims"]["moe_layers"]


def golden(name: str) -> Golden:
    """Load a case by the name of its folder."""
    folder = require_shared() / "goldens" / name
    overlay, base = folder / "checkpoint", None
    if (overlay / "overlay").is_dir():
        overlay, base = overlay / "overlay", overlay / "base"
    readme = json.loads((folder / "README.json").read_text())
    return Golden(name, overlay, base, readme, read_arrays(folder / "expected.safetensors"))


def assert_logits_close(
    actual: np.ndarray,
    expected: np.ndarray,
    atol: float = LOGITS_ATOL,
    rtol: float = LOGITS_RTOL,
) -> None:
    """Every logit within atol, and the whole within rtol in the L2 norm."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    worst = float(np.abs(actual - expected).max())
    relative = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    assert worst <= atol, f"logits differ by up to {worst:.3g}, allowed {atol:g}"
    assert relative <= rtol, f"logits differ by {relative:.3g} of their norm, allowed {rtol:g}"


def assert_same_experts(actual: np.ndarray, expected: np.ndarray) -> None:
    """The same set of experts for every token: (T, K) each, in any order."""
    np.testing.assert_array_equal(np.sort(actual, axis=-1), np.sort(expected, axis=-1))
