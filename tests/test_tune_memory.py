"""Gradients of quantized matrices' scales in little memory, and the plan of what `tune` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from outlier_mlx.engine.loading import load, load_tokenizer
from outlier_mlx.engine.machine import budget
from outlier_mlx.engine.memory import check_fits
from outlier_mlx.engine.needs import Use
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure import quantized_gradients, tuning
from outlier_mlx.measure.quantized_gradients import row_by_row
from outlier_mlx.measure.tuned_parts import PARTS
from outlier_mlx.measure.tuning import kept_tokens, plan_tuning, tune
from outlier_mlx.models.config import raw_config
from tests.large import write_large
from tests.library import Library
from tests.memory import at_rest
from tests.program import run

# Qwen2.5-7B with two experts in 14 of its layers.
SEVEN_B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "moe_layers": [*range(8, 22)],
    "num_experts": 2,
    "moe_intermediate_size": 18944,
    "dtype": "bfloat16",
}
WINDOW = 256


class Net(nn.Module):
    """A quantized matrix with a bias, and one that is embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.QuantizedLinear(64, 96, group_size=32, bits=4)
        self.linear.bias = mx.random.normal((96,))
        self.table = nn.QuantizedEmbedding(50, 96, group_size=32, bits=8)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., 64) to (..., 50)."""
        return self.table.as_linear(mx.tanh(self.linear(x)))


@pytest.mark.parametrize("weights", [200, 1 << 22])
def test_gradients_in_parts_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, weights: int
) -> None:
    """Those that MLX computes itself, also if rows do not divide into equal parts."""
    monkeypatch.setattr(quantized_gradients, "WEIGHTS", weights)
    net = Net()
    x = mx.random.normal((2, 3, 64))
    weight = mx.random.normal((2, 3, 50))
    modules = net.linear, net.table

    def loss(x: mx.array, *numbers: mx.array) -> mx.array:
        for at, module in enumerate(modules):
            module.scales, module.biases = numbers[2 * at : 2 * at + 2]
        return (net(x) * weight).sum()

    numbers: Any = [number for module in modules for number in (module.scales, module.biases)]
    gradient = mx.value_and_grad(loss, argnums=tuple(range(5)))
    wanted, theirs = gradient(x, *numbers)
    with row_by_row(net, scales=True):
        found, ours = gradient(x, *numbers)
    with row_by_row(net, scales=False):
        _, of_x = gradient(x, *numbers)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(of_x[0], ours[0])
    assert not any(mx.any(one) for one in of_x[1:])
    assert type(net.linear) is nn.QuantizedLinear


@pytest.mark.slow
@pytest.mark.parametrize("parts", [list(PARTS), ["base"], ["alphas"]])
def test_a_scaled_down_run_takes_what_was_planned(
    library: Library, monkeypatch: pytest.MonkeyPatch, parts: list[str]
) -> None:
    """Within 15 %, models included, of a model whose weights are most of what it takes.

    The gradients of all its weights together would take more than five times as much.
    """
    monkeypatch.setattr(quantized_gradients, "WEIGHTS", 1 << 16)
    dims: dict[str, Any] = {"hidden": 384, "intermediate": 1536, "expert_intermediate": 256}
    dims |= {"vocab": 2048, "experts": 2, "top_k": 1}
    tier = library.tier(library.overlay(**dims), tier="q4")
    texts = np.random.default_rng(0).integers(0, 2048, (4, 33)).tolist()
    model, teacher = load(tier)[0], load(tier)[0]
    mx.eval(model.parameters(), teacher.parameters())
    models = at_rest()
    plan = plan_tuning(tier, parts, 33, teacher=True, kept=kept_tokens(texts, 1))
    tuned = tune(model, texts, parts, teacher=teacher, epochs=1, batch=2, dtypes=plan.dtypes)
    assert models + plan.nbytes == pytest.approx(tuned.peak, rel=0.15)
    weights = sum(v.size * 8 for m in model.modules() if (v := m.get("weight")) is not None)
    assert plan.nbytes < 4 * weights


def test_a_tier_of_7b_is_tuned_on_a_mac_with_32_gb(tmp_path: Path) -> None:
    """All parts, with 8 GB to spare; towards a teacher with 8 bits, on one with 48 GB."""
    tier = write_large(tmp_path / "q4", **SEVEN_B)
    eight = {"quantization": {"group_size": 64, "bits": 8, "mode": "affine"}}
    teacher = write_large(tmp_path / "q8", **SEVEN_B | eight)
    plan, use = plan_tuning(tier, list(PARTS), WINDOW), Use(WINDOW, logits=WINDOW)
    assert plan.numbers > 220e6 and plan.nbytes < 12e9
    found = check_fits(tier, use, budget(32), more=plan.nbytes)
    assert found.needed < budget(32).nbytes - 7e9
    plan = plan_tuning(tier, list(PARTS), WINDOW, teacher=True, kept=20 * WINDOW)
    with pytest.raises(OutlierError, match=r"q4 and q8 need 2\d\.\d+ GB"):
        check_fits(tier, use, budget(32), beside=teacher, more=plan.nbytes)
    check_fits(tier, use, budget(48), beside=teacher, more=plan.nbytes)


def test_predictions_are_planned_of_windows_that_the_teacher_sees_twice(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in tokens of the text, not in bytes."""
    place = library.place(expert_intermediate=64)
    tier, text = place / "tier", place / "text.txt"
    texts = [[1, 2, 3]] * 10
    assert (kept_tokens(texts, 1), kept_tokens(texts, 2)) == (4, 20)
    seen: list[int] = []

    def planned(*given: Any, kept: int, **how: Any) -> None:
        seen.append(kept)
        raise OutlierError("that is enough")

    monkeypatch.setattr(tuning, "plan_tuning", planned)
    how = "--text", text, "--window", 16, "--teacher", tier, "--out", tmp_path / "out"
    for epochs in (1, 2):
        run("tune", tier, *how, "--epochs", epochs, code=1)
    tokens = len(load_tokenizer(tier, raw_config(tier)).encode(text.read_text()))
    windows = tokens // 16
    assert seen == [15 * round(windows / 5), 15 * windows]
    assert seen[1] < len(text.read_bytes()) * 0.75
