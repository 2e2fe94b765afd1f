"""The reference model and the goldens agree before anything else is judged by them."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tests import affine, builders, goldens, reference, reference_reader, tensor_file
from tests.goldens import assert_logits_close, golden
from tests.program import ROOT, run_python
from tests.reference import Array, ReferenceModel, forward, greedy, trace, with_alphas
from tests.reference_reader import read_overlay

CASES = [
    "v1_real_sharded",
    "v2_real_perchannel",
    "v32_alpha_tensors",
    "v32_alpha_json_partial",
    "export_per_file",
    "v33_overlay_yarn",
]


def read_golden(case: goldens.Golden) -> ReferenceModel:
    model = read_overlay(case.overlay, case.base)
    if case.name == "v33_overlay_yarn":  # the reader leaves the pickled alphas alone
        stated = case.readme["effective_alpha"]
        model = with_alphas(model, lambda n, _: np.array(stated[str(n)], np.float32))
    return model


def test_the_foundation_does_not_import_what_it_judges():
    modules = "affine builders damage goldens reference reference_reader tensor_file"
    script = (
        f"import sys\nfrom tests import {', '.join(modules.split())}\n"
        "found = {name.split('.')[0] for name in sys.modules} & {'outlier_mlx', 'mlx', 'mlx_lm'}\n"
        "assert not found, found"
    )
    run_python(script, cwd=ROOT)


# Against the goldens


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_golden(name: str):
    case = golden(name)
    model = read_golden(case)
    for n, stated in case.readme["effective_alpha"].items():
        experts = model.layers[int(n)].experts
        assert experts is not None
        np.testing.assert_allclose(experts.alpha, stated, rtol=1e-6)
    for dtype in (np.float32, np.float64):
        run = trace(model, case.tokens, dtype)
        assert run.logits.dtype == dtype
        assert_logits_close(run.logits, case.expected["logits"], atol=5e-5)
        np.testing.assert_allclose(run.hidden, case.expected["hidden_states"], atol=5e-5)
        assert list(run.routing) == case.moe_layers
        for n, routing in run.routing.items():
            stated = f"router.{n}."
            np.testing.assert_allclose(routing.probs, case.expected[stated + "probs"], atol=1e-5)
            np.testing.assert_array_equal(routing.indices, case.expected[stated + "indices"])
            np.testing.assert_allclose(
                routing.weights, case.expected[stated + "weights"], atol=1e-5
            )
    tokens, logits = greedy(model, case.tokens, 16)
    assert tokens == case.greedy
    assert_logits_close(logits, case.expected["greedy_logits"], atol=5e-5)


def without_bias(model: ReferenceModel) -> ReferenceModel:
    def weights(layer: reference.Layer) -> dict[str, Array]:
        return {k: v * 0 if k.endswith("bias") else v for k, v in layer.weights.items()}

    return replace(model, layers=[replace(x, weights=weights(x)) for x in model.layers])


def alphas_of_json(case: goldens.Golden, default: float) -> Callable[[int, Array], Array]:
    table = json.loads((case.overlay / "alpha.json").read_text())
    stated = {(n, e): value for n, e, value in reference_reader.walk_alphas(table)}
    return lambda n, alpha: np.array([stated.get((n, e), default) for e in range(len(alpha))])


def not_renormalised(logits: Array, top_k: int) -> reference.Routing:
    indices, probs = np.argsort(-logits, axis=-1)[:, :top_k], reference.softmax(logits)
    return reference.Routing(probs, indices, np.take_along_axis(probs, indices, axis=-1))


BROKEN: dict[str, Callable[[goldens.Golden, ReferenceModel], ReferenceModel]] = {
    "eps_swapped_1e-5_1e-6": lambda _, m: replace(m, eps=1e-5 if m.eps < 5e-6 else 1e-6),
    "attention_bias_dropped": lambda _, m: without_bias(m),
    "experts_dropped": lambda _, m: with_alphas(m, lambda n, alpha: alpha * 0),
    "topk_not_renormalised": lambda _, m: m,  # the test puts another `route` in place
    "alpha_forced_to_1": lambda _, m: with_alphas(m, lambda n, alpha: np.ones_like(alpha)),
    "alpha_json_preferred_to_alpha_values": lambda c, m: with_alphas(m, alphas_of_json(c, 0)),
    "yarn_ignored": lambda _, m: replace(m, scaling=None),
    "overlay_ignored": lambda c, m: with_alphas(m, alphas_of_json(c, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_rule_broken_moves_the_logits_as_far_as_the_golden_says(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    """Every README states how far the logits move when one rule is broken: we move as far."""
    case = golden(name)
    model = read_golden(case)
    stated = case.readme["logit_change_if"]
    assert set(stated) <= set(BROKEN)
    for rule, distance in stated.items():
        with monkeypatch.context() as patch:
            if rule == "topk_not_renormalised":
                patch.setattr(reference, "route", not_renormalised)
            logits = forward(BROKEN[rule](case, model), case.tokens)
        moved = np.abs(logits - case.expected["logits"]).max()
        assert moved == pytest.approx(distance, abs=5e-5), rule
        with pytest.raises(AssertionError, match="logits differ"):
            assert_logits_close(logits, case.expected["logits"])


def test_wrong_alpha_default_and_wrong_rope_are_noticed(monkeypatch: pytest.MonkeyPatch):
    case = golden("v32_alpha_json_partial")
    model = read_golden(case)
    ones = with_alphas(model, alphas_of_json(case, default=1))
    assert np.abs(forward(ones, case.tokens) - case.expected["logits"]).max() > 0.1

    def interleaved(x: Array, cos: Array, sin: Array) -> Array:
        a, b = x[..., ::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)

    monkeypatch.setattr(reference, "rotate", interleaved)
    assert np.abs(forward(model, case.tokens) - case.expected["logits"]).max() > 0.1


def test_alpha_json_shapes():
    file = goldens.require_shared() / "goldens" / "alpha_json" / "cases.json"
    table = json.loads(file.read_text())
    for case in table["cases"]:
        found: dict[str, dict[str, float]] = {}
        for n, e, value in reference_reader.walk_alphas(case["payload"]):
            if n < table["n_layers"] and e < table["n_experts"]:
                found.setdefault(str(n), {})[str(e)] = value
        assert found == case["expected"], case["payload"]


def test_yarn_by_hand():
    yarn = reference.Yarn(factor=4.0, original_positions=64)
    plain, one = reference.rope_frequencies(16, 1e6, None)
    scaled, factor = reference.rope_frequencies(16, 1e6, yarn)
    # c(32) = 16 ln(64 / 64π) / (2 ln 1e6) = −0.66 and c(1) = 1.34: the ramp runs from 0 to 2.
    np.testing.assert_allclose(scaled / plain, [1, 1 - 0.5 * 0.75, *[0.25] * 6])
    assert (one, factor) == (1.0, pytest.approx(1.138629436))
    assert reference.rope_frequencies(16, 1e6, replace(yarn, attention_factor=0.5))[1] == 0.5
    # c(32) = −2.27 and c(1) = −0.26: the ramp has no width, and ends 0.001 after its start.
    short = reference.rope_frequencies(16, 1e6, replace(yarn, original_positions=4))[0]
    np.testing.assert_allclose(short / plain, [1, *[0.25] * 7])


def test_routing_ties_go_to_the_lower_index():
    routing = reference.route(np.log([[0.2, 0.3, 0.2, 0.3], [0.25] * 4]), 3)
    assert routing.indices.tolist() == [[1, 3, 0], [0, 1, 2]]
    np.testing.assert_allclose(routing.weights.sum(axis=-1), 1)
    even = np.tile(np.log([0.75, 0.25]), (1, 32))  # wide enough for an unstable sort to show
    assert reference.route(even, 6).indices.tolist() == [[0, 2, 4, 6, 8, 10]]


# Files and quantization


def test_tensor_files_agree_with_safetensors(tmp_path: Path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 5)).astype(np.float32)
    arrays: dict[str, Any] = {
        "f32": values,
        "f16": values.astype(np.float16),
        "i8": rng.integers(-1, 2, (7,), dtype=np.int8),
        "i64": np.arange(4),
        "scalar": np.array(0.5, np.float16),
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    bf16 = tensor_file.stored(values, "BF16")
    plain = {key: tensor_file.stored(value) for key, value in arrays.items()}
    tensor_file.write_stored(ours, {**plain, "bf16": bf16})
    found = dict(safetensors.deserialize(ours.read_bytes()))
    assert found["bf16"]["dtype"] == "BF16" and bytes(found["bf16"]["data"]) == bf16.data
    tensor_file.write_stored(ours, plain)
    safetensors.numpy.save_file(arrays, theirs)
    for read in (tensor_file.read_arrays(theirs), safetensors.numpy.load_file(ours)):
        assert set(read) == set(arrays)
        for key, value in arrays.items():
            assert read[key].dtype == value.dtype
            np.testing.assert_array_equal(read[key], value)


def test_bfloat16_rounds_as_mlx_does():
    import mlx.core as mx

    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    ties = (np.arange(512, dtype=np.uint32) << 16) | 0x3F008000
    values = np.concatenate([bits, ties]).view(np.float32)
    values = np.append(values[np.isfinite(values)], [np.inf, -np.inf, 0.0, -0.0])
    values = values.astype(np.float32)
    expected = np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))
    np.testing.assert_array_equal(tensor_file.to_bfloat16(values), expected)
    assert np.isnan(tensor_file.rounded(np.nan, "BF16"))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_affine_quantization_is_mlx_bit_for_bit(dtype: str, bits: int):
    import mlx.core as mx

    kind = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[dtype]
    rng = np.random.default_rng(bits)
    w = rng.standard_normal((48, 256)) * np.exp(rng.standard_normal((48, 1)) * 2)
    w[0], w[1], w[2], w[3], w[4] = 0, abs(w[1]), -abs(w[2]), 3, w[4] * 1e-7
    w = tensor_file.rounded(w, dtype)
    for group in (32, 64, 128):
        with mx.stream(mx.cpu):
            packed, s, b = mx.quantize(mx.array(w).astype(kind), group_size=group, bits=bits)
            back = mx.dequantize(packed, s, b, group_size=group, bits=bits).astype(mx.float32)
            s, b = s.astype(mx.float32), b.astype(mx.float32)
            mx.eval(packed, s, b, back)
        codes, scales, biases = affine.affine_quantize(w, group, bits, dtype)
        np.testing.assert_array_equal(affine.affine_codes(np.array(packed), bits), codes)
        np.testing.assert_array_equal(np.array(s), scales)
        np.testing.assert_array_equal(np.array(b), biases)
        ours = affine.affine_dequantize(codes, scales, biases, dtype)
        if platform.machine() == "x86_64":
            np.testing.assert_array_equal(np.array(back), ours)
        # Elsewhere the compiler may fuse multiply and add, and then the product is not rounded.
        unit = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype]
        size = np.abs(ours) + np.repeat(np.abs(biases), group, axis=-1)
        assert (np.abs(np.array(back) - ours) <= 2 * unit * size).all()


def test_quantizing_the_base_leaves_the_rest(tmp_path: Path):
    built = builders.write_overlay(tmp_path / "o", intermediate=96)
    model = read_overlay(built.path)
    rough = affine.with_quantized_base(model, 64, 4)
    for before, after in zip(model.layers, rough.layers, strict=True):
        assert before.experts is after.experts
        changed = {k for k, v in before.weights.items() if not np.array_equal(v, after.weights[k])}
        for key in changed:
            step = np.ptp(before.weights[key]) / 15
            assert np.abs(before.weights[key] - after.weights[key]).max() < step
        # 96, the `in` of down_proj, has no group of 64.
        assert changed == {
            *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
        }
    for name in ("embedding", "lm_head"):
        assert 0 < np.abs(getattr(model, name) - getattr(rough, name)).max() < 0.5
    assert rough.norm is model.norm


# Without the goldens


def test_without_shared_a_test_skips_and_in_ci_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(goldens, "_SHARED", Path("nowhere"))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="goldens"):
        golden("v1_real_sharded")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="goldens"):
        golden("v1_real_sharded")
