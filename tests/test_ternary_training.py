"""Training with ternary models: gradients, adapters, and what stays frozen."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from outlier_mlx.engine.loading import load_model
from tests.engine import forward
from tests.library import Library
from tests.reference import Array
from tests.ternary_models import QWEN3, ROTATED, Ternary
from tests.test_training import loss_of

PROMPT = [5, 17, 101, 3, 64, 220, 9, 77, 41]


@pytest.fixture
def rotated(library: Library) -> Ternary:
    return library.ternary(**ROTATED)


def test_gradients_are_those_of_the_dense_weights(library: Library):
    """Also through a rotation that several layers share."""
    case = library.ternary(**ROTATED)
    model, _ = load_model(case.folder)
    mlp, prefix = model.layers[0].mlp, "language_model.model.layers.0.mlp"
    w = {
        n: mx.array(case.weights[f"{prefix}.{n}_proj.weight"], mx.float32)
        for n in ("gate", "up", "down")
    }
    mx.random.seed(0)
    x, against = mx.random.normal((2, 5, 512))

    def dense(x: mx.array) -> mx.array:
        y = (nn.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T
        return (y * against).sum()

    expected = mx.grad(dense)(x)
    for mode in (True, False):
        mlp.train(mode)
        found = mx.grad(lambda x: (mlp(x) * against).sum())(x)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def with_lora(folder: Path) -> Any:
    model, _ = load_model(folder)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    return model


@pytest.fixture
def attention(library: Library) -> Ternary:
    """Rotated, and quickly compiled."""
    return library.ternary(config=QWEN3 | {"num_hidden_layers": 1}, group=64, block=64)


def test_lora_trains_under_compile_and_changes_no_trit(attention: Ternary):
    model = with_lora(attention.folder)
    before = forward(model, PROMPT)
    np.testing.assert_array_equal(before, forward(load_model(attention.folder)[0], PROMPT))
    names = {*dict(flat(model.trainable_parameters()))}
    assert names and all("lora" in name for name in names)
    assert "model.layers.0.self_attn.q_proj.lora_b" in names
    packed = frozen(model)
    model.train()
    optimizer = optim.Adam(3e-3)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_of)(model, tokens)
        optimizer.update(model, gradients)
        return loss

    tokens, losses = mx.array([PROMPT]), []
    for _ in range(4):
        losses.append(float(step(tokens)))
        mx.eval(state)
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    assert np.abs(forward(model, PROMPT) - before).max() > 0.1
    for name, value in frozen(model).items():
        np.testing.assert_array_equal(value, packed[name])


def frozen(model: Any) -> dict[str, Array]:
    leaves = ("linear.weight", "linear.scales", "signs")
    pairs = flat(model.parameters())
    return {name: np.array(value) for name, value in pairs if name.endswith(leaves)}


def flat(tree: Any) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(tree)
    return [*found]


def test_mlx_lm_trains_adapters_that_load_again(attention: Ternary, tmp_path: Path):
    model = with_lora(attention.folder)
    adapters, data = tmp_path / "adapters.safetensors", [(PROMPT, 0)] * 2
    args = TrainingArgs(
        batch_size=1,
        iters=2,
        val_batches=1,
        steps_per_report=100,
        steps_per_eval=100,
        steps_per_save=100,
        max_seq_length=64,
        adapter_file=str(adapters),
        grad_checkpoint=True,
    )
    train(model, optim.Adam(3e-3), data, data, args)
    model.eval()
    again = with_lora(attention.folder)
    again.load_weights(str(adapters), strict=False)
    np.testing.assert_array_equal(forward(again, PROMPT), forward(model, PROMPT))
    lora = model.layers[0].mlp.gate_proj
    with pytest.raises(ValueError, match="cannot be fused"):
        lora.fuse()


def test_who_unfreezes_trains_no_trits(rotated: Ternary):
    model, _ = load_model(rotated.folder)
    for module in model.modules():
        module.unfreeze(recurse=False)
    model.unfreeze()
    names = [*dict(flat(model.trainable_parameters()))]
    assert names and not any(
        ".scales" in n or "signs" in n or "_proj.weight" in n
        for n in names
        if "in_proj_a" not in n and "in_proj_b" not in n
    )


def test_a_compiled_model_is_the_same(attention: Ternary):
    model, _ = load_model(attention.folder)
    before = forward(model, PROMPT)
    for inputs in ([model.state], None):
        compiled = mx.compile(lambda tokens: model(tokens), inputs=inputs)
        for _ in range(2):
            np.testing.assert_allclose(compiled(mx.array([PROMPT]))[0], before, atol=2e-4)
    gc.collect()
    np.testing.assert_array_equal(forward(model, PROMPT), before)


def test_scales_and_signs_stay_as_they_are(rotated: Ternary):
    model, _ = load_model(rotated.folder)
    model.set_dtype(mx.bfloat16)
    layer = model.layers[0].mlp.gate_proj
    assert layer.scales.dtype == mx.float16 and model.rotations[0].signs.dtype == mx.float16
    assert model(mx.array([PROMPT])).dtype == mx.bfloat16
