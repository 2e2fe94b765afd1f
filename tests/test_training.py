"""Gradients and fine-tuning: what is trainable is trained rightly, the ternary weights stay."""

from __future__ import annotations

from collections.abc import Callable
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

from outlier_mlx.runtime.model import Model
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.runtime.switch import TernarySwitchLinear
from tests import builders
from tests.engine import forward, load, rows_to_dense
from tests.library import Library
from tests.reference import Array, Experts, Ternary, route, routed, swiglu

PARTS = ("gate", "up", "down")


@pytest.fixture(scope="module")
def tiers(library: Library) -> dict[str, Path]:
    built = library.overlay(expert_intermediate=96)
    return {
        "f32": library.tier(built),
        "q4": library.tier(built, tier="q4"),
        "affine2": library.tier(built, tier="q4", experts="affine2"),
    }


PROMPT = builders.Built(Path(), builders.Dims(), {}, {}).prompt(24)


def loss_of(model: Any, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def block_of(tier: Path) -> OutlierMoE:
    block = load(tier).layers[1].mlp
    assert isinstance(block, OutlierMoE)
    return block


# Gradients of a block, against float64


def exact_block(block: OutlierMoE) -> Callable[[Array, Array, Array], Array]:
    """y(x, router, alpha) of the block in float64 NumPy."""
    parts: dict[str, list[Ternary]] = {}
    for name in PARTS:
        layer = getattr(block.switch_mlp, f"{name}_proj")
        dense = np.array(rows_to_dense(layer.weight, layer.scales, layer.input_dims), np.float64)
        parts[name] = [Ternary(w, np.ones((1, 1))) for w in dense]
    shared = [np.array(getattr(block.shared_expert, f"{name}_proj").weight) for name in PARTS]

    def run(x: Array, router: Array, alpha: Array) -> Array:
        experts = Experts(router, alpha, **parts)
        return swiglu(x, *shared) + routed(experts, x, route(x @ router.T, block.top_k))

    return run


@pytest.mark.parametrize("tokens", [5, 40])  # unsorted and sorted
def test_gradients_of_a_block_agree_with_differences(tiers: dict[str, Path], tokens: int):
    block = block_of(tiers["f32"])
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    against = rng.standard_normal((tokens, 64)).astype(np.float32)

    def scalar(x: mx.array, router: mx.array, alpha: mx.array) -> mx.array:
        block.gate.weight, block.alpha = router, alpha
        return (block(x[None])[0] * mx.array(against)).sum()

    point = (x, np.array(block.gate.weight), np.array(block.alpha))
    gradients = mx.grad(scalar, argnums=(0, 1, 2))(*map(mx.array, point))
    exact = exact_block(block)
    wide = [value.astype(np.float64) for value in point]
    for i, gradient in enumerate(gradients):
        assert gradient.shape == point[i].shape and np.isfinite(np.array(gradient)).all()
        for _ in range(3):
            step = rng.standard_normal(point[i].shape)
            ends = []
            for sign in (1e-5, -1e-5):
                moved = list(wide)
                moved[i] = wide[i] + sign * step
                ends.append((exact(*moved) * against).sum())
            slope = (ends[0] - ends[1]) / 2e-5
            size = np.linalg.norm(np.array(gradient)) * np.linalg.norm(step)
            assert abs(slope - (np.array(gradient) * step).sum()) < 1e-4 * size
            assert size > 0.1


def dense_twin(block: OutlierMoE) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """The block with every expert applied to every token, weighted by 0 where not chosen."""
    dense = [
        rows_to_dense(layer.weight, layer.scales, layer.input_dims)
        for layer in (getattr(block.switch_mlp, f"{name}_proj") for name in PARTS)
    ]

    def run(x: mx.array, router: mx.array, alpha: mx.array) -> mx.array:
        probs = mx.softmax(x @ router.T, axis=-1)
        kept = probs >= mx.sort(mx.stop_gradient(probs), axis=-1)[:, -block.top_k, None]
        weights = mx.where(kept, probs, 0)
        weights = weights / weights.sum(-1, keepdims=True) * alpha
        gate, up = (mx.einsum("th,eih->tei", x, w) for w in dense[:2])
        y = mx.einsum("tei,ehi->teh", nn.silu(gate) * up, dense[2])
        return block.shared_expert(x) + (y * weights[..., None]).sum(1)

    return run


@pytest.mark.parametrize("tokens", [5, 40])
def test_gradients_of_a_block_agree_with_a_dense_twin(tiers: dict[str, Path], tokens: int):
    block = block_of(tiers["f32"])
    mx.random.seed(tokens)
    x, against = mx.random.normal((2, tokens, 64))

    def sparse(x: mx.array, router: mx.array, alpha: mx.array) -> mx.array:
        block.gate.weight, block.alpha = router, alpha
        return (block(x[None])[0] * against).sum()

    twin = dense_twin(block)
    point = (x, block.gate.weight, block.alpha)
    found = mx.grad(sparse, argnums=(0, 1, 2))(*point)
    stated = mx.grad(lambda *at: (twin(*at) * against).sum(), argnums=(0, 1, 2))(*point)
    for a, b in zip(found, stated, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(mx.abs(b).max()))


# What is trainable


def is_ternary(name: str) -> bool:
    return ".switch_mlp." in name and "lora" not in name


def test_ternary_weights_stay_frozen(tiers: dict[str, Path]):
    """Whoever unfreezes, from the model down to the layer itself: the rest is trainable."""
    model = load(tiers["f32"])
    for module in model.modules():
        module.unfreeze(recurse=False)
    model.layers[1].mlp.switch_mlp.gate_proj.unfreeze(keys=["weight", "scales"])
    model.unfreeze()
    trainable = dict(tree_flatten(model.trainable_parameters()))
    everything = dict(tree_flatten(model.parameters()))
    assert set(trainable) == {key for key in everything if not is_ternary(key)}
    assert {f"model.layers.{n}.mlp.{key}" for n in (1, 3) for key in ("alpha", "gate.weight")} <= {
        *trainable
    }
    model.train()
    _, gradients = nn.value_and_grad(model, loss_of)(model, mx.array([PROMPT]))
    flat = dict(tree_flatten(gradients))
    assert set(flat) == set(trainable)
    for key, gradient in flat.items():
        assert np.isfinite(np.array(gradient)).all(), key
        assert np.abs(np.array(gradient)).max() > 0, key


# Training steps


def with_lora(tier: Path) -> Model:
    model = load(tier)
    model.freeze()
    linear_to_lora_layers(model, 3, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    return model


def packed(model: Model) -> dict[str, Array]:
    flat = dict(tree_flatten(model.parameters()))
    return {key: np.array(value) for key, value in flat.items() if is_ternary(key)}


def assert_nothing_kept(model: Model) -> None:
    """No layer holds a copy that was made from a graph's placeholders."""
    for layer in model.modules():
        if isinstance(layer, TernarySwitchLinear) and layer.prepared is not None:
            assert layer.prepared.rows is layer.weight and layer.prepared.scales is layer.scales


@pytest.mark.parametrize("name", ["f32", "q4", "affine2"])
def test_lora_trains_under_compile_and_leaks_nothing(tiers: dict[str, Path], name: str):
    """As mlx-lm's trainer steps: the model's whole state goes in and comes out of the graph."""
    model = with_lora(tiers[name])
    before, weights = forward(model, PROMPT), packed(model)
    np.testing.assert_array_equal(before, forward(load(tiers[name]), PROMPT))
    names = dict(tree_flatten(model.trainable_parameters()))
    assert any("self_attn.q_proj.lora_b" in key for key in names)
    assert any("shared_expert.up_proj.lora_b" in key for key in names)
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
    assert losses[-1] < losses[0] - 0.3
    assert_nothing_kept(model)
    model.eval()
    after = forward(model, PROMPT)
    assert np.abs(after - before).max() > 0.1
    assert float(loss_of(model, tokens)) < losses[-1]
    for key, value in packed(model).items():
        np.testing.assert_array_equal(value, weights[key])

    # The same adapters on a model that was never inside a compiled function: the same logits.
    fresh = with_lora(tiers[name])
    fresh.load_weights(tree_flatten(model.trainable_parameters()), strict=False)
    np.testing.assert_array_equal(forward(fresh, PROMPT), after)


def test_a_compiled_forward_leaks_nothing(tiers: dict[str, Path]):
    """Inference may be compiled as well, with weights as inputs or as constants."""
    model = load(tiers["q4"])
    before = forward(model, PROMPT)
    layers = [m for m in model.modules() if isinstance(m, TernarySwitchLinear)]
    for inputs in ([model.state], None):
        for layer in layers:
            layer.prepared = None
        compiled = mx.compile(lambda tokens: model(tokens), inputs=inputs)
        for _ in range(2):
            logits = np.array(compiled(mx.array([PROMPT]))[0])
            np.testing.assert_allclose(logits, before, atol=1e-4)
        assert_nothing_kept(model)
        np.testing.assert_array_equal(forward(model, PROMPT), before)


def test_the_affine_copy_is_made_again_after_training(tiers: dict[str, Path]):
    """A compiled step gives every array back as a new object: transcoding happens once after it,
    not at every token."""
    model = load(tiers["q4"])
    layer = model.layers[1].mlp.switch_mlp.gate_proj
    assert isinstance(layer, TernarySwitchLinear)
    made = layer.affine()
    assert layer.affine() is made
    model.train()
    state = [model.state]
    step = mx.compile(lambda tokens: loss_of(model, tokens), inputs=state, outputs=state)
    mx.eval(step(mx.array([PROMPT])), state)
    model.eval()
    forward(model, PROMPT)
    again = layer.affine()
    assert again is not made and layer.affine() is again
    for a, b in zip(again, made, strict=True):
        np.testing.assert_array_equal(a, b)


def test_mlx_lm_trains_a_tier(tiers: dict[str, Path], tmp_path: Path):
    """mlx-lm's own loop, with gradient checkpoints; the adapters load again."""
    model = with_lora(tiers["q4"])
    tokens = mx.array([PROMPT])
    before = float(loss_of(model, tokens))
    data = [(PROMPT, 0)] * 4
    adapters = tmp_path / "adapters.safetensors"
    args = TrainingArgs(
        batch_size=2,
        iters=6,
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
    assert float(loss_of(model, tokens)) < before - 0.3
    again = with_lora(tiers["q4"])
    again.load_weights(str(adapters), strict=False)
    np.testing.assert_array_equal(forward(again, PROMPT), forward(model, PROMPT))
