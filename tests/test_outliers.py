"""Outlier features of models: the planted ones are found, and looking changes nothing."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import outlier_mlx
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.outlier_counts import Accumulator
from outlier_mlx.measure.outlier_definitions import Thresholds, blog_summary, pooled_summary
from outlier_mlx.measure.outlier_parameters import count_parameters, weights_bits
from outlier_mlx.measure.outlier_probes import find_probes, watched
from outlier_mlx.measure.outlier_report import short_count
from outlier_mlx.measure.outliers import Measurement, Options, measure
from tests.builders import write_overlay
from tests.goldens import require_shared
from tests.memory import at_rest
from tests.tensor_file import read_arrays

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
# What each family needs besides.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "olmoe": EXPERTS | {"num_experts": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "glm4_moe": EXPERTS
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
        "rope_scaling": None,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4": {"attention_bias": False, "partial_rotary_factor": 0.5},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 2},
    "olmo2": {},
    "olmo3": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


def build(family: str, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of mlx-lm with random weights, and its config."""
    mx.random.seed(3)
    config = {"model_type": family, **SMALL, **FAMILIES.get(family, {}), **changes}
    module = importlib.import_module(f"mlx_lm.models.{family}")
    return module.Model(module.ModelArgs.from_dict(config)), config


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """By name."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


def tokens(length: int, many: int = 1) -> list[list[int]]:
    return np.random.default_rng(5).integers(0, SMALL["vocab_size"], (many, length)).tolist()


def listed(measured: Measurement, thresholds: Thresholds | None = None) -> tuple[dict, dict]:
    pooled = pooled_summary(measured.counts.pooled(), thresholds or Thresholds())
    return blog_summary(measured.sequences["all"]), pooled


@pytest.mark.parametrize("hold", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_planted_models(name: str, hold: Any) -> None:
    folder = require_shared() / "goldens" / "frankenmoe" / f"outlier_{name}"
    case = json.loads((folder / "expected.json").read_text())
    arrays = read_arrays(folder / "expected.safetensors")
    model, _ = load_model(folder)
    measured = measure(model, arrays["input_ids"].tolist(), Options(hold=hold))
    blog, pooled = listed(measured)
    expected = case["stats"]["blog"]
    exact = [key for key in expected if key != "per_sequence"]
    assert {key: blog[key] for key in exact} == {key: expected[key] for key in exact}
    # Maxima are a model's activations, equal to a few last places; held in bfloat16, to 2^-8.
    close = 1e-5 if hold is None else 2**-8
    for found, wanted in (
        *zip(blog["per_sequence"], expected["per_sequence"], strict=True),
        (pooled["dims"], case["stats"]["pooled"]["dims"]),
    ):
        for feature, golden in zip(found, wanted, strict=True):
            magnitude = golden.pop("max_magnitude")
            assert feature["max_magnitude"] == pytest.approx(magnitude, rel=close)
            assert feature == feature | golden
    for key in ("layer_pct", "seq_pct", "num_outliers"):
        assert pooled[key] == case["stats"]["pooled"][key]
    hits = measured.counts.pooled()
    assert {
        str(d): {"probe_hits": hits.probe_hits[d], "position_hits": hits.position_hits[d]}
        for d in np.flatnonzero(hits.probe_hits)
    } == case["stats"]["any_hit_dims"]
    for probe, row in zip(measured.counts.probes, measured.counts.largest, strict=True):
        np.testing.assert_allclose(row, arrays[f"probe_max.{probe.name}"], rtol=close, atol=1e-5)
    assert measured.perplexity == pytest.approx(case["perplexity"], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_read_what_enters_attention_and_ffn(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = build(family)
    entered: list[np.ndarray] = []

    def recorded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: nn.Module, x: mx.array, *given: Any, **named: Any) -> Any:
            entered.append(np.array(x))
            return original(self, x, *given, **named)

        return call

    ffn = "block_sparse_moe" if family == "mixtral" else "mlp"
    blocks = {type(layer[name]) for layer in model.layers for name in ("self_attn", ffn)}
    for block in blocks:
        monkeypatch.setattr(block, "__call__", recorded(block.__call__))
    probed: list[np.ndarray] = []
    probes = find_probes(model)
    with watched(model, probes, lambda number, _, values: probed.append(np.array(values))):
        model(mx.array(tokens(9)))
    # A dense block inside a MoE block (a shared expert) reads the vector once more.
    entered = [x for n, x in enumerate(entered) if n == 0 or not np.array_equal(x, entered[n - 1])]
    assert len(probed) == len(entered) == 2 * len(model.layers)
    for read, x in zip(probed, entered, strict=True):
        np.testing.assert_array_equal(read, x)


def test_kinds_of_probes() -> None:
    model, _ = build("glm4_moe")
    found = [(probe.kinds, probe.experts) for probe in find_probes(model)]
    assert found == [
        (("attention",), 0),
        (("dense_ffn",), 0),
        (("attention",), 0),
        (("routed_experts", "shared_experts"), 4),
    ]
    assert find_probes(build("mixtral")[0])[1].kinds == ("routed_experts",)


def plant(model: nn.Module, dim: int, layers: range) -> None:
    """Make one dimension huge wherever attention and experts read it."""
    for n in layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = model.layers[n][name]
            norm.weight = norm.weight.at[dim].multiply(500.0)


def test_probing_changes_no_bit_and_leaves_no_trace() -> None:
    for family in ("glm4_moe", "olmo2", "gpt_oss"):
        model, _ = build(family)
        classes = [type(module) for module in model.modules()]
        weights = list(parameters(model))
        ids = mx.array(tokens(70))  # so many that experts are sorted
        before = np.array(model(ids))
        options = Options(residual=True, per_expert=True)
        assert measure(model, tokens(70), options).perplexity > 1
        counts = Accumulator(find_probes(model), residual=True, per_expert=True)
        with watched(model, counts.probes, counts.see, counts.see_routing):
            during = np.array(model(ids))
            assert list(parameters(model)) == weights
        assert counts.finish_sequence()["all"].positions == 70
        np.testing.assert_array_equal(before, during)
        np.testing.assert_array_equal(before, np.array(model(ids)))
        assert [type(module) for module in model.modules()] == classes


def test_the_model_is_itself_again_after_an_exception() -> None:
    model, _ = build("qwen3_moe")
    classes = [type(module) for module in model.modules()]
    model.layers[1].post_attention_layernorm.weight = mx.full((32,), mx.nan)
    with pytest.raises(OutlierError, match=r"layer_1\.ffn: not all values are finite"):
        measure(model, tokens(8), Options(per_expert=True))
    assert [type(module) for module in model.modules()] == classes

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(model, find_probes(model), stop):
        model(mx.array(tokens(8)))
    assert [type(module) for module in model.modules()] == classes


def peak(layers: int, sequences: int) -> tuple[int, int]:
    """Bytes that measuring takes in MLX at most, beyond the model, and those of the counters."""
    model, _ = build("llama", num_hidden_layers=layers, hidden_size=64, head_dim=16)
    windows = tokens(256, sequences)
    measure(model, windows[:1])
    start = at_rest()
    counts = measure(model, windows).counts
    arrays = [value for value in vars(counts).values() if isinstance(value, np.ndarray)]
    return mx.get_peak_memory() - start, sum(array.nbytes for array in arrays)


@pytest.mark.slow
def test_memory_grows_with_neither_layers_nor_sequences() -> None:
    """What 16 probes see in 4 sequences would be 4 MB; one sequence of 2 layers takes 2.4 MB."""
    small, large = peak(2, 1), peak(8, 4)
    assert large[0] < 1.5 * small[0]
    assert large[1] < 16 * 64 * 40  # bytes for each probe and dimension, whatever the sequences


def test_a_planted_dimension_of_a_tier_is_found(tmp_path: Path) -> None:
    overlay = write_overlay(tmp_path / "overlay", expert_intermediate=64)
    folder = outlier_mlx.convert(overlay.path, out=tmp_path / "tier", tier="f32")
    model, config = load_model(folder)
    windows = [overlay.prompt(40), overlay.prompt(80)[40:]]
    assert listed(measure(model, windows))[0]["num_outliers"] == 0
    plant(model, 11, range(4))
    experts: list[list[int]] = []
    route = model.layers[3].mlp.route

    def noted(x: mx.array, alpha: mx.array) -> tuple[mx.array, mx.array]:
        indices, weights = route(x, alpha)
        experts.extend(np.array(indices[0]).tolist())
        return indices, weights

    object.__setattr__(model.layers[3].mlp, "route", noted)
    measured = measure(model, windows, Options(per_expert=True, residual=True))
    blog, pooled = listed(measured)
    assert blog["unique_dims"] == [11]
    assert blog["num_outliers"] == 2
    assert blog["layer_pct"] == 100
    assert [dim["dim"] for dim in pooled["dims"]] == [11]
    assert not pooled["dims"][0]["one_sided"]
    assert set(measured.sequences) == {
        *("all", "attention", "dense_ffn", "routed_experts", "shared_experts")
    }
    assert measured.counts.experts is not None
    layer = measured.counts.experts.as_json([11])[1]
    counts = np.bincount(np.ravel(experts), minlength=4)
    assert (layer["layer"], layer["tokens"]) == (3, counts.tolist())
    # All tokens but a few, whose value happens to be small, carry it.
    for tokens_of_one, share in zip(counts, layer["share"]["11"], strict=True):
        assert share is None if tokens_of_one == 0 else share > 0.8
    # The stream that enters the first layer knows nothing of what its norms make of it.
    assert measured.counts.residuals is not None
    assert measured.counts.residuals[0].largest.max() < 6 < measured.counts.largest[0, 11]
    assert count_parameters(model, config).active == inspect(folder).active_params
    assert count_parameters(model, config).total == inspect(folder).params


def test_residual_is_described_for_itself() -> None:
    model, _ = build("llama")
    model.model.embed_tokens.weight = mx.zeros((64, 32)).at[:, 7].add(900.0)
    measured = measure(model, [[1, 2, 3, 4]] * 2, Options(residual=True))
    assert measured.counts.residuals is not None
    first = measured.counts.residuals[0].as_json(0)
    assert first == {
        "layer": 0,
        "mean_magnitude": 900 / 32,
        "max_magnitude": 900,
        "dim": 7,
        "max_magnitude_without_first": 900,
        "dim_without_first": 7,
    }
    # RMS norm leaves sqrt(32) of it, which is below 6.
    assert listed(measured)[0]["num_outliers"] == 0
    assert measured.counts.largest[0, 7] == pytest.approx(math.sqrt(32), rel=1e-5)


def test_perplexity_is_of_the_same_tokens() -> None:
    model, _ = build("qwen2")
    windows = tokens(300, 2)  # longer than the rows that are widened at a time
    measured = measure(model, windows)
    losses = []
    for window in windows:
        logits = np.array(model(mx.array([window])))[0].astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses += [-log_probs[n, window[n + 1]] for n in range(len(window) - 1)]
    assert measured.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("cohere", {}, "cohere: .* its norms are input_layernorm; known are"),
        ("exaone4", {"sliding_window": None, "sliding_window_pattern": None, "rope_scaling": None},
         "exaone4: .* its norms are post_attention_layernorm and post_feedforward_layernorm"),
        ("nanbeige", {"num_loops": 2}, "layer_0.attn: called out of order"),
    ],
)  # fmt: skip
def test_unknown_layers_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    model, _ = build(family, **changes)
    with pytest.raises(OutlierError, match=message) as refused:
        measure(model, tokens(8))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("family", "dimensions", "total", "active"),
    [
        # (hidden, layers, FFN width, heads, KV heads, head size, vocabulary) of the models' cards.
        (
            "olmoe",
            (2048, 16, 1024, 16, 16, 128, 50304),
            6.9e9,
            1.3e9,
        ),
        ("qwen3_moe", (2048, 48, 6144, 32, 4, 128, 151936), 30.5e9, 3.3e9),
        ("mixtral", (4096, 32, 14336, 32, 8, 128, 32000), 46.7e9, 12.9e9),
    ],
)
def test_active_parameters_are_those_published(
    family: str, dimensions: tuple[int, ...], total: float, active: float
) -> None:
    names = "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"
    more = "num_key_value_heads", "head_dim", "vocab_size"
    sizes = dict(zip((*names, *more), dimensions, strict=True))
    experts = {
        "olmoe": {"num_experts": 64, "num_experts_per_tok": 8},
        "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    }[family]
    # Its weights are never computed: MLX is lazy.
    model, config = build(family, **sizes, **experts)
    found = count_parameters(model, config)
    assert found.total == pytest.approx(total, rel=0.01)
    assert found.active == pytest.approx(active, rel=0.02)


def test_parameters_are_counted_whatever_they_are_stored_in(tmp_path: Path) -> None:
    model, config = build("qwen2_moe", hidden_size=64, intermediate_size=64,
                          moe_intermediate_size=64, shared_expert_intermediate_size=64)  # fmt: skip
    plain = count_parameters(model, config)
    # 2 of 4 experts idle, in 2 layers of 3 matrices of 64 x 64.
    assert plain.total - plain.active == 2 * 2 * 3 * 64 * 64
    assert plain.total == sum(value.size for value in parameters(model).values())
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    assert weights_bits(tmp_path, 2, plain.total) == 32
    first = sum(v.nbytes for n, v in parameters(model).items() if ".layers.1." not in n)
    assert weights_bits(tmp_path, 1, plain.total) == pytest.approx(8 * first / plain.total)
    nn.quantize(model, 32, 4)
    assert count_parameters(model, config) == plain
    with pytest.raises(OutlierError, match="does not say how many experts"):
        count_parameters(model, {})


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (950, "950"),
        (1290, "1.3K"),
        (999_600, "1.0M"),
        (460e6, "460M"),
        (1.28e9, "1.3B"),
        (12.2e9, "12B"),
        (2e12, "2000B"),
    ],
)
def test_short_counts(number: float, shown: str) -> None:
    assert short_count(number) == shown
