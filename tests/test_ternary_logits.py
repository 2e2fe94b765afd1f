"""Imported ternary models of every form: logits, greedy tokens and half precision, as the reference
cases have them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx.engine import loading
from outlier_mlx.errors import CheckpointWarning
from outlier_mlx.imports import import_model
from tests.engine import as_array, forward, greedy_cached
from tests.goldens import LOGITS_ATOL, LOGITS_RTOL, require_shared
from tests.metal import Metal
from tests.reference import Array
from tests.tensor_file import read_arrays

load_model: Any = loading.load_model
CASES = [
    *("bitnet_master_bf16", "bitnet_packed", "falcon_e_packed", "llama_autobitlinear"),
    *("gguf_pq2_qwen3", "gguf_ptq1_qwen35", "gguf_q2_0_merged_qwen3", "gguf_q2_0_qwen3"),
    *("gguf_q2_0_qwen35_tied", "gguf_tq1_llama", "gguf_tq1_qwen2", "gguf_tq2_bitnet"),
    *("gguf_tq2_qwen3", "mlx2_qwen35", "mlx2_qwen3_g128", "mlx2_qwen3_g64_mixed"),
    *("prism_v1_text_tied", "prism_v2_vl"),
]


@dataclass(frozen=True)
class Case:
    """An imported model, and what is expected of it."""

    folder: Path
    expected: dict[str, Array]

    @property
    def tokens(self) -> list[int]:
        """The prompt."""
        found: list[int] = self.expected["input_ids"][0].tolist()
        return found

    @property
    def greedy(self) -> list[int]:
        """The greedy continuation."""
        found: list[int] = self.expected["greedy"][0].tolist()
        return found

    def assert_logits(self, found: Array) -> None:
        """Within the tolerance for float32."""
        stated = self.expected["logits"][0]
        np.testing.assert_allclose(found, stated, atol=LOGITS_ATOL, rtol=LOGITS_RTOL)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    source = require_shared() / "goldens/ternary_models" / request.param
    files = list(source.glob("*.gguf"))
    out = tmp_path_factory.mktemp("imported") / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        import_model(files[0] if files else source, out)
    return Case(out, read_arrays(source / "expected.safetensors"))


def test_logits_and_greedy_tokens(case: Case):
    model, _ = load_model(case.folder)
    case.assert_logits(forward(model, case.tokens))
    assert greedy_cached(model, case.tokens, len(case.greedy))[0] == case.greedy


@pytest.mark.filterwarnings("ignore:.*may overflow float16")
@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.995), ("bfloat16", 0.99)])
def test_half_precision(case: Case, dtype: str, least: float):
    model, _ = load_model(case.folder, dtype=dtype)
    logits, stated = model(mx.array([case.tokens]))[0], case.expected["logits"][0]
    assert logits.dtype == getattr(mx, dtype)
    found = as_array(logits).astype(np.float64)
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(stated, axis=-1)
    assert ((found * stated).sum(axis=-1) / norms).min() >= least


@pytest.mark.slow
def test_the_same_through_the_kernels(case: Case, metal: Metal):
    model, _ = load_model(case.folder)
    case.assert_logits(forward(model, case.tokens))
    assert "tq1_0_linear" in metal.names
    assert greedy_cached(model, case.tokens, 3)[0] == case.greedy[:3]
