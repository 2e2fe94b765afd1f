"""Whole models through the Metal kernels, run by the emulator: the reference cases, the embedded
pair, and a tier's own code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_lm_load_model

from kernels.emulator import VirtualMetal, virtual_metal
from outlier_mlx.cli.showcase import heldout
from outlier_mlx.engine.loading import load as load_with_tokenizer
from outlier_mlx.runtime import ops
from outlier_mlx.runtime.model import Model
from outlier_mlx.runtime.switch import TernarySwitchLinear
from tests.builders import write_overlay
from tests.engine import assert_same_run, forward, greedy_cached, load, tier_of, trace
from tests.goldens import assert_logits_close, golden
from tests.kernel_cases import ROUNDING
from tests.library import Library
from tests.reference import Array, Routing, Trace

# Every model among the reference cases; the first runs each time.
GOLDENS = ["v1_real_sharded"]
MORE_GOLDENS = ["v2_real_perchannel", "v32_alpha_tensors", "v32_alpha_json_partial"]
MORE_GOLDENS += ["v33_overlay_yarn", "export_per_file", "packed_experts_dir", "packed_monolith"]
MORE_GOLDENS += ["v0_toy_moe", "v0_toy_gqa_bias"]

DECODE = ["tq1_0_route", "tq1_0_swiglu", "tq1_0_down"]
BLOCKS = ["tq1_0_route", "tq1_0_sort", "tq1_0_swiglu", "tq1_0_qmv", "tq1_0_mix"]
TRANSCODE = ["tq1_0_route"] + ["tq1_0_to_affine2"] * 3


@pytest.fixture
def metal() -> Iterator[VirtualMetal]:
    """The emulator, also where there is a GPU."""
    with virtual_metal(count=False) as device:
        yield device


def assert_resident(model: Model) -> None:
    """Experts are held at 1.6 bits and in no other form."""
    layers = [m for m in model.modules() if isinstance(m, TernarySwitchLinear)]
    assert layers
    for layer in layers:
        assert layer.prepared is None and layer.weight.dtype == mx.uint8


def run_golden(name: str, path: Path, metal: VirtualMetal) -> None:
    case = golden(name)
    model = load(tier_of(case.overlay, case.base, path / "tier"))
    assert_resident(model)
    layers = len(model.args.moe_layers)

    found = trace(model, case.tokens)
    # `trace` asks each router twice.
    assert metal.names == [DECODE[0], *DECODE] * layers
    if "hidden_states" in case.expected and f"router.{case.moe_layers[0]}.probs" in case.expected:
        keys = ("probs", "indices", "weights")
        routing = {
            n: Routing(*(case.expected[f"router.{n}.{key}"] for key in keys))
            for n in case.moe_layers
        }
        logits, hidden = case.expected["logits"], case.expected["hidden_states"]
        assert_same_run(found, Trace(logits, hidden, routing))
    assert_logits_close(found.logits, case.expected["logits"])

    metal.clear()
    tokens, logits = greedy_cached(model, case.tokens, len(case.greedy), (4,))
    assert tokens == case.greedy
    if "greedy_logits" in case.expected:
        assert_logits_close(logits, case.expected["greedy_logits"])
    assert metal.names == DECODE * layers * (len(case.greedy) + 1)

    with pytest.MonkeyPatch.context() as patch:
        for size, launched in ((4, BLOCKS), (0, TRANSCODE)):
            patch.setattr(ops, "pairs_in_a_block", lambda *_, size=size: size)
            metal.clear()
            batch = np.array(model(mx.array([case.tokens] * 2)))
            assert metal.names == launched * layers
            for logits in batch:
                assert_logits_close(logits, case.expected["logits"])


@pytest.mark.parametrize("name", GOLDENS)
def test_a_reference_case(name: str, tmp_path: Path, metal: VirtualMetal):
    run_golden(name, tmp_path, metal)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_GOLDENS)
def test_more_reference_cases(name: str, tmp_path: Path, metal: VirtualMetal):
    run_golden(name, tmp_path, metal)


def test_a_model_without_experts_launches_nothing(tmp_path: Path, metal: VirtualMetal):
    case = golden("v0_toy_dense")
    model = load(tier_of(case.overlay, case.base, tmp_path / "tier"))
    assert_logits_close(forward(model, case.tokens), case.expected["logits"])
    assert metal.names == []


SIZES = [
    {"experts": 70, "top_k": 66, "expert_intermediate": 3},
    {"experts": 1030, "top_k": 2, "expert_intermediate": 1},
    {"experts": 1, "top_k": 1, "expert_intermediate": 1},
    {"hidden": 4, "heads": 2, "experts": 3, "top_k": 1, "expert_intermediate": 4},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_conversion_accepts_runs_on_a_gpu(sizes: dict[str, Any], tmp_path: Path):
    built = write_overlay(tmp_path / "overlay", layers=1, moe_layers=(0,), **sizes)
    tier = tier_of(built.path, None, tmp_path / "tier")
    expected = [forward(load(tier), built.prompt(length)) for length in (1, 9)]
    with virtual_metal(count=False):
        model = load(tier)
        for length, logits in zip((1, 9), expected, strict=True):
            assert_logits_close(forward(model, built.prompt(length)), logits)


# The embedded pair


@pytest.fixture(scope="module")
def pair(library: Library) -> Path:
    return library.demo_tier("q4")


@pytest.fixture(scope="module")
def prompt(pair: Path) -> list[int]:
    _, tokenizer = load_with_tokenizer(pair)
    return tokenizer.encode(heldout()["sea"][0])[:24]


def error(found: Array, exact: Array) -> float:
    """Of all logits together, relative."""
    found, exact = found.astype(np.float64), exact.astype(np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.slow
def test_the_embedded_pair(pair: Path, prompt: list[int], metal: VirtualMetal):
    model = load(pair)
    assert_resident(model)
    layers = len(model.args.moe_layers)
    logits = forward(model, prompt)
    tokens, _ = greedy_cached(model, prompt[:12], 3)
    assert metal.names == DECODE * layers * 4
    metal.clear()
    several = np.array(model(mx.array([prompt] * 4)))
    assert metal.names == BLOCKS * layers  # 192 pairs for 6 experts
    model.train()  # plain MLX
    metal.clear()
    assert_logits_close(logits, forward(model, prompt))
    assert_logits_close(several[1], forward(model, prompt))
    assert greedy_cached(model, prompt[:12], 3)[0] == tokens
    assert metal.names == []


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision(dtype: str, pair: Path, prompt: list[int]):
    """As near to float32 as the dtype's rounding allows: a few units over three layers, and no
    further than plain MLX in the same dtype."""
    exact, plain = (forward(load(pair, name), prompt) for name in ("float32", dtype))
    with virtual_metal(count=False) as metal:
        model = load(pair, dtype)
        found = forward(model, prompt)
        assert metal.names == DECODE * len(model.args.moe_layers)
        read = {launch.inputs["x"][1] for launch in metal.launches if "x" in launch.inputs}
        assert read == {getattr(mx, dtype)}
    assert error(found, exact) < 16 * ROUNDING[getattr(mx, dtype)]
    assert error(found, exact) < 1.1 * error(plain, exact)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [*GOLDENS, *MORE_GOLDENS])
def test_reference_cases_in_half_precision(dtype: str, name: str, tmp_path: Path):
    case = golden(name)
    tier = tier_of(case.overlay, case.base, tmp_path / "tier")
    plain = forward(load(tier, dtype), case.tokens)
    with virtual_metal(count=False) as metal:
        found = forward(load(tier, dtype), case.tokens)
        assert set(metal.names) == set(DECODE)
    exact = case.expected["logits"]
    assert error(found, exact) < 32 * ROUNDING[getattr(mx, dtype)]
    assert error(found, exact) < 1.1 * error(plain, exact)


# A tier's own code


def test_a_tiers_own_code_has_the_kernels(tmp_path: Path, metal: VirtualMetal):
    built = write_overlay(tmp_path / "overlay", tokenizer=False)
    options: dict[str, Any] = {"tier": "f32"}
    tier = tier_of(built.path, None, tmp_path / "tier", **options)
    ours = load(tier)
    theirs, _ = mlx_lm_load_model(tier, trust_remote_code=True)
    assert type(theirs) is not type(ours)
    for length in (3, 60):
        tokens = built.prompt(length)
        metal.clear()
        expected = forward(ours, tokens)
        launched = [(launch.name, launch.kernel.text) for launch in metal.launches]
        metal.clear()
        np.testing.assert_array_equal(forward(theirs, tokens), expected)
        found = [(launch.name, launch.kernel.text) for launch in metal.launches]
        assert [name for name, _ in found] == [name for name, _ in launched] != []
        for (_, text), (_, original) in zip(found, launched, strict=True):
            assert text.split() == original.split()


def test_experts_in_mlx_own_format_are_left_to_mlx(tmp_path: Path, metal: VirtualMetal):
    built = write_overlay(tmp_path / "overlay", tokenizer=False, expert_intermediate=96)
    model = load(tier_of(built.path, None, tmp_path / "tier", experts="affine2"))
    for length in (1, 60):
        forward(model, built.prompt(length))
    assert metal.names == ["tq1_0_route"] * 2 * len(model.args.moe_layers)
