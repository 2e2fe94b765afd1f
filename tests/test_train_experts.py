"""Ternary experts as training computes them: rounding, gradients, and the tier's own results."""

import itertools
from dataclasses import fields, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import parse_config
from outlier_mlx.runtime.affine2 import ROWS
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.ternary import pack_rows
from outlier_mlx.train.experts import (
    Current,
    Expert,
    ExpertBlock,
    LatentMatrix,
    Mode,
    TernaryMatrix,
    balance_loss,
    change_loss,
)
from outlier_mlx.train.forward import TrainedModel
from outlier_mlx.train.settings import Settings, option
from outlier_mlx.train.trits import (
    Method,
    latent_product,
    packed,
    relative_error,
    ternarise,
    unpacked,
)
from tests import reference
from tests.library import Library
from tests.marks import slow_but
from tests.program import GROUP

Array = np.ndarray
TOKENS = mx.array([[1, 5, 9, 3, 7, 2, 8], [4, 4, 6, 0, 2, 11, 3]])


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def least_error(row: Array) -> float:
    """The least squared error of any trits and any scale, tried one after another."""
    errors = [float((row**2).sum())]
    for trits in itertools.product((-1, 0, 1), repeat=len(row)):
        t = np.array(trits)
        if n := (t != 0).sum():
            errors.append(float(((row - t * max(0.0, (row * t).sum() / n)) ** 2).sum()))
    return min(errors)


def test_lloyd_finds_the_least_error_of_all_trits_and_scales() -> None:
    rows = np.concatenate([normal(12, 7), normal(4, 7, seed=1) ** 3])
    trits, scales = ternarise(mx.array(rows))
    errors = ((rows - np.array(trits * scales)) ** 2).sum(-1)
    np.testing.assert_allclose(errors, [least_error(row) for row in rows], rtol=1e-5)


def test_errors_of_normal_weights_are_the_known_ones() -> None:
    """Max (1960), table I: three levels leave 0.1902 of a normal variable's variance."""
    rows = mx.array(normal(64, 4096))
    lloyd, absmean = (relative_error(rows, *ternarise(rows, m)) for m in ("lloyd", "absmean"))
    assert lloyd**2 == pytest.approx(0.1902, abs=0.001)
    assert absmean > 1.1 * lloyd


@pytest.mark.parametrize("method", ["lloyd", "absmean"])
def test_trits_and_scales_are_what_a_file_holds(method: Method) -> None:
    rows = normal(2, 6, 32)
    rows[0, 1] = 0
    rows[1] *= 1e-5
    trits, scales = (np.array(a) for a in ternarise(mx.array(rows), method))
    assert set(np.unique(trits)) == {-1, 0, 1} and not trits[0, 1].any()
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(trits, np.sign(rows) * (abs(rows) > scales / 2))


def test_packed_trits_come_back() -> None:
    trits = np.random.default_rng(0).integers(-1, 2, (3, 5, 24)).astype(np.int8)
    codes = packed(trits)
    assert codes.shape == (3, 5, 6) and codes.dtype == mx.uint8
    np.testing.assert_array_equal(np.array(unpacked(codes, mx.float32)), trits)


def test_the_gradient_passes_by_the_rounding() -> None:
    x, latent, weight = (mx.array(normal(*s, seed=s[0])) for s in ((5, 16), (8, 16), (5, 8)))
    trits, scales = ternarise(latent)

    def loss(x: mx.array, latent: mx.array) -> mx.array:
        return (latent_product(x, latent, "lloyd") * weight).sum()

    exact = (x @ trits.T) * scales[:, 0]
    np.testing.assert_array_equal(latent_product(x, latent, "lloyd"), exact)
    of_x, of_latent = mx.grad(loss, argnums=(0, 1))(x, latent)
    np.testing.assert_allclose(of_x, weight @ (trits * scales), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_latent, weight.T @ x, rtol=1e-5, atol=1e-5)


def block_of(latent: bool, hidden: int = 32, width: int = 64, experts: int = 3) -> ExpertBlock:
    """A block with all experts taking part, over an FFN that is no FFN."""
    now = Current()
    now.mode = Mode(experts=tuple(range(experts)), top_k=2)
    block = ExpertBlock(0, nn.Linear(hidden, hidden), hidden, experts, now)
    block.router = mx.array(normal(experts, hidden, seed=9))
    block.alpha = mx.array([0.5, 1.5, 0.8])
    for number in range(experts):
        made: dict[str, TernaryMatrix | LatentMatrix] = {}
        for at, name in enumerate(("gate", "up", "down")):
            shape = (hidden, width) if name == "down" else (width, hidden)
            matrix = LatentMatrix(mx.array(normal(*shape, seed=3 * number + at)) * 0.2, "lloyd")
            made[name] = matrix if latent else TernaryMatrix(*matrix.stored())
        block.experts[number] = Expert(made)
    return block


@pytest.mark.parametrize("latent", [True, False])
def test_a_block_computes_what_the_tier_computes(latent: bool) -> None:
    block = block_of(latent)
    tier = OutlierMoE(block.mlp, 32, 64, 3, 2, ROWS)
    tier.gate.weight, tier.alpha = block.router, block.alpha
    for name in ("gate", "up", "down"):
        linear = tier.switch_mlp[f"{name}_proj"]
        matrices = [expert.stored()[name] for expert in block.experts]
        linear.weight = mx.array(np.stack([pack_rows(trits) for trits, _ in matrices]))
        linear.scales = mx.array(np.stack([s.astype(np.float32) for _, s in matrices]))
        linear.prepare()
    x = mx.array(normal(2, 40, 32, seed=5))
    tier.train()
    np.testing.assert_allclose(block(x), tier(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("latent", [True, False])
def test_a_block_computes_what_numpy_computes(latent: bool) -> None:
    block = block_of(latent)
    stored = [expert.stored() for expert in block.experts]
    parts = {
        part: [reference.Ternary(e[part][0], e[part][1][:, None]) for e in stored]
        for part in ("gate", "up", "down")
    }
    experts = reference.Experts(np.array(block.router), np.array(block.alpha), **parts)
    x = normal(40, 32, seed=5)
    routed = reference.routed(experts, x, reference.route(x @ experts.router.T, 2))
    base = np.array(block.mlp(mx.array(x)))
    np.testing.assert_allclose(block(mx.array(x)[None])[0], base + routed, rtol=1e-4, atol=2e-5)


def test_losses_of_routers() -> None:
    even = mx.full((1, 4, 4), 0.25)
    used = mx.array(np.eye(4, dtype=bool)[None])
    assert float(balance_loss(even, used)) == pytest.approx(1)
    one = mx.array(np.eye(4, dtype=np.float32)[[0, 0, 0, 0]][None])
    assert float(balance_loss(one, one > 0)) == pytest.approx(4)
    assert float(change_loss(one)) == pytest.approx(0)
    assert float(change_loss(mx.array(np.eye(4, dtype=np.float32)[None]))) == pytest.approx(1)


@pytest.fixture
def trained(library: Library) -> TrainedModel:
    """A base of four layers with three experts in two of them, all of which take part."""
    model, _ = load_model(library.base(family="llama", biases=True).path)
    made = TrainedModel(model, (1, 2), 3, 4)
    for block in made.blocks.values():
        other = block_of(False, hidden=64)
        block.router, block.alpha, block.experts = other.router, other.alpha, other.experts
    return made


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_without_experts_it_is_the_base(
    library: Library, family: str, tied: bool, bits: int | None
) -> None:
    head_dim = 32 if family == "qwen3" else None
    folder = library.base(family=family, tied=tied, head_dim=head_dim).path
    base, _ = load_model(folder)
    if bits is not None:
        nn.quantize(base, 64, bits)
    made = TrainedModel(load_model(folder)[0], (1, 3), 4, bits)
    rounded = bits is not None
    logits = made.hidden(TOKENS, Mode(rounded=rounded)) @ made.head(rounded).T
    np.testing.assert_allclose(logits, base(TOKENS), rtol=1e-5, atol=2e-5)
    plain = made.hidden(TOKENS, Mode()) @ made.head().T
    np.testing.assert_allclose(plain, load_model(folder)[0](TOKENS), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("compiled", slow_but([False], [False, True]))
def test_gradients_are_those_of_differences(
    trained: TrainedModel, rounded: bool, compiled: bool
) -> None:
    """Through checkpointed and compiled layers, in the gradient's direction."""
    numbers = trained.numbers(["scales", "router", "alpha"])
    assert len(numbers) == 2 * (3 * 3 + 2)
    # Scales are rounded to float16, so that differences of them say nothing.
    numbers = {name: place for name, place in numbers.items() if "scales" not in name}
    trained.train(numbers)
    mode = Mode(experts=(0, 1, 2), rounded=rounded)
    weight = mx.array(normal(2, 7, 64, seed=8))

    def loss(values: dict[str, mx.array]) -> mx.array:
        for name, value in values.items():
            numbers[name].put(value)
        return (trained.hidden(TOKENS, mode) * weight).sum()

    values = {name: place.value for name, place in numbers.items()}
    gradient = mx.grad(loss)
    gradients = (mx.compile(gradient) if compiled else gradient)(values)
    size = sum(float(mx.square(g).sum()) for g in gradients.values()) ** 0.5
    assert not [n for n, g in gradients.items() if not bool(mx.any(g != 0))]

    def moved(by: float) -> float:
        return float(loss({n: v + by / size * gradients[n] for n, v in values.items()}))

    assert (moved(1e-3) - moved(-1e-3)) / 2e-3 == pytest.approx(size, rel=0.02)


def test_losses_of_routers_reach_the_router(trained: TrainedModel) -> None:
    numbers = trained.numbers(["router"])
    mode = Mode(experts=(0, 1, 2))
    trained.train(numbers)

    def loss(values: dict[str, mx.array]) -> mx.array:
        for name, value in values.items():
            numbers[name].put(value)
        return trained.hidden(TOKENS, mode).sum() * 0

    values = {name: place.value for name, place in numbers.items()}
    assert not any(bool(mx.any(g != 0)) for g in mx.grad(loss)(values).values())
    mode = replace(mode, balance=1.0)
    assert not [n for n, g in mx.grad(loss)(values).items() if not bool(mx.any(g != 0))]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"layers": (2, 1)}, "--layers: (2, 1)"),
        ({"layers": (1, 4)}, "the base has 4 layers"),
        ({"expert_size": 40}, "--expert-size: 40; expected a multiple of 32"),
        ({"expert_size": 256}, "has only 128 neurons"),
        ({"batch": 1}, "--batch: 1; expected at least 2"),
        ({"top_k": 3}, "--top-k: 3; there are only 2 experts"),
        ({"base_bits": 3}, "--base-bits: 3"),
        ({"learning_rate": float("nan")}, "--learning-rate: nan"),
        ({"expert_steps": -1}, "--steps: -1; expected at least 0"),
        ({"straight_through": False, "joint_weights": True}, "--no-straight-through turns off"),
        ({"keep_share": 1.0}, "keep_share: 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(library: Library, changed: dict, said: str) -> None:
    config = parse_config(library.base().config)
    with pytest.raises(OutlierError, match=said.replace("(", r"\(").replace(")", r"\)")):
        Settings(**changed).check(config, 2)


def test_settings_are_called_what_a_user_types() -> None:
    options = GROUP.commands["upcycle"].params
    typed = {word for each in options for word in each.opts}
    names = [field.name for field in fields(Settings)]
    assert {option(name) for name in names if option(name) != name} <= typed
    assert {name for name in names if option(name) == name} == {
        "keep_share",
        "temperature",
        "alpha",
    }


def test_open_settings_are_chosen_by_the_base(library: Library) -> None:
    chosen = Settings().resolved(parse_config(library.base().config))
    assert (chosen.layers, chosen.expert_size) == ((1, 2, 3), 64)
    assert Settings(layers=(2,), expert_size=32).resolved(
        parse_config(library.base().config)
    ) == Settings(layers=(2,), expert_size=32)
    assert chosen.digest() != Settings().digest()
