"""What counts as an outlier feature, against loops that spell the definitions out."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.outlier_counts import Accumulator, Hold
from outlier_mlx.measure.outlier_definitions import (
    Thresholds,
    blog_summary,
    pooled_summary,
    sequence_features,
)
from outlier_mlx.measure.outlier_experts import ExpertHits
from outlier_mlx.measure.outlier_probes import PRE_NORM, Kind, Probe
from tests.goldens import require_shared
from tests.tensor_file import from_bfloat16, read_arrays, to_bfloat16

BLOG_KEYS = ("layer_pct", "seq_pct", "median_layer_pct", "median_seq_pct", "num_outliers")


def probes(layers: int, ffn: tuple[Kind, ...] = ("dense_ffn",)) -> list[Probe]:
    attention, block = PRE_NORM
    return [
        probe
        for n in range(layers)
        for probe in (
            Probe(n, f"layer_{n}.attn", attention, ("attention",)),
            Probe(n, f"layer_{n}.ffn", block, ffn),
        )
    ]


def count(
    values: np.ndarray, thresholds: Thresholds, hold: Hold | None = None
) -> tuple[dict[str, Any], dict[str, Any], Accumulator]:
    """`blog`, `pooled` and the counts of values (sequences, probes, positions, hidden)."""
    counts = Accumulator(probes(values.shape[1] // 2), thresholds.magnitude, hold)
    sequences = []
    for sequence in values:
        for number, array in enumerate(sequence):
            counts.see(number, mx.array(array[None]), mx.array(array[None]))
        sequences.append(sequence_features(counts.finish_sequence()["all"], thresholds))
    return blog_summary(sequences), pooled_summary(counts.pooled(), thresholds), counts


def spelled_out(
    values: np.ndarray, magnitude: float, min_layers: Fraction, min_positions: Fraction
) -> tuple[list[list[tuple]], list[tuple]]:
    """The definitions in loops and fractions.

    Returns:
        For each sequence (dim, probes hit, positions hit, largest, hits), and for all together
        (dim, layers hit, positions hit, largest, largest without first positions, one-sided).
    """
    many, units, length, hidden = values.shape
    sequences: list[list[tuple]] = [[] for _ in range(many)]
    pooled = []
    for d in range(hidden):
        layers, places, signs, largest, later = set(), set(), set(), [], [0.0]
        for b in range(many):
            hit = [
                (p, t)
                for p in range(units)
                for t in range(length)
                if abs(float(values[b, p, t, d])) >= magnitude
            ]
            at_probes, at_positions = {p for p, _ in hit}, {t for _, t in hit}
            largest.append(float(np.abs(values[b, :, :, d]).max()))
            later += [abs(float(v)) for v in values[b, :, 1:, d].ravel()]
            enough = Fraction(len(at_probes), units) >= min_layers
            if hit and enough and Fraction(len(at_positions), length) >= min_positions:
                found = d, len(at_probes), len(at_positions), largest[-1], len(hit)
                sequences[b].append(found)
            layers |= {p // 2 for p in at_probes}
            places |= {(b, t) for t in at_positions}
            signs |= {values[b, p, t, d] > 0 for p, t in hit}
        enough = Fraction(len(layers), units // 2) >= min_layers
        if layers and enough and Fraction(len(places), many * length) >= min_positions:
            pooled.append((d, len(layers), len(places), max(largest), max(later), len(signs) == 1))
    return sequences, pooled


def as_tuples(blog: dict, pooled: dict) -> tuple[list[list[tuple]], list[tuple]]:
    names = "dim", "probe_hits", "seq_hits", "max_magnitude", "occurrences"
    pooled_names = "dim", "layer_hits", "position_hits", "max_magnitude"
    more = "max_magnitude_without_first", "one_sided"
    sequences = [[tuple(f[n] for n in names) for f in s] for s in blog["per_sequence"]]
    return sequences, [tuple(f[n] for n in (*pooled_names, *more)) for f in pooled["dims"]]


# Around the threshold, and around what bfloat16 rounds up to it: 5.984375 is half a step below.
VALUES = (0.0, 1.5, 5.9, 5.984374523162842, 5.984375, 5.99, 6.0, -6.0, -5.984375, 7.25, -300.0)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 16, 17, 25]),
    st.integers(0, 2**32),
    st.sampled_from([Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(1)]),
    st.sampled_from([Fraction(0), Fraction(6, 100), Fraction(1, 3), Fraction(1)]),
    st.booleans(),
)
def test_counts_are_those_of_the_definitions(
    many: int,
    layers: int,
    length: int,
    seed: int,
    min_layers: Fraction,
    min_positions: Fraction,
    in_bfloat16: bool,
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice(np.array(VALUES, np.float32), (many, 2 * layers, length, 5))
    values *= rng.random(values.shape) < rng.choice([0.03, 0.2, 1.0])
    held = from_bfloat16(to_bfloat16(values)) if in_bfloat16 else values
    thresholds = Thresholds(6.0, float(min_layers), float(min_positions))
    blog, pooled, _ = count(values, thresholds, "bfloat16" if in_bfloat16 else None)
    expected = spelled_out(held, 6.0, min_layers, min_positions)
    assert as_tuples(blog, pooled) == expected
    features = [feature for sequence in expected[0] for feature in sequence]
    assert blog["num_outliers"] == len(features)
    assert blog["unique_dims"] == sorted({feature[0] for feature in features})
    shares = [100 * Fraction(f[1], 2 * layers) for f in features]
    mean = sum(shares) / len(shares) if shares else 0
    assert blog["layer_pct"] == pytest.approx(float(mean), abs=1e-12)
    shares = [100 * Fraction(f[2], length) for f in features]
    assert blog["seq_pct"] == pytest.approx(float(sum(shares) / max(1, len(shares))), abs=1e-12)


@pytest.mark.parametrize(
    ("value", "hold", "counts"),
    [
        (6.0, None, True),
        (-6.0, "bfloat16", True),
        (5.984375, None, False),
        (5.984375, "bfloat16", True),  # a tie: to the even one, 6.0
        (5.98437, "bfloat16", False),
        (5.99, "float16", False),
        (5.999, "float16", True),
    ],
)
def test_the_threshold_and_the_dtype_values_are_held_in(
    value: float, hold: Hold | None, counts: bool
) -> None:
    values = np.zeros((1, 2, 3, 2), np.float32)
    values[..., 1] = value
    blog, _, _ = count(values, Thresholds(), hold)
    assert blog["unique_dims"] == ([1] if counts else [])


@pytest.mark.parametrize(("layers", "length"), [(2, 50), (10, 100), (50, 150), (4, 17)])
def test_exactly_the_least_coverage_suffices(layers: int, length: int) -> None:
    """In dimension 0 both limits are just reached, in 1 a probe is missing, in 2 a position."""
    units, positions = -(-2 * layers // 4), -(-6 * length // 100)
    values = np.zeros((1, 2 * layers, length, 3), np.float32)
    for dim, (p, t) in enumerate([(0, 0), (1, 0), (0, 1)]):
        values[:, : units - p, : positions - t, dim] = 6
    blog, _, _ = count(values, Thresholds())
    assert blog["unique_dims"] == [0]
    assert blog["layer_pct"] == pytest.approx(100 * units / (2 * layers))
    assert blog["seq_pct"] == pytest.approx(100 * positions / length)


def test_nothing_found_is_zero() -> None:
    blog, pooled, counts = count(np.ones((2, 4, 8, 3), np.float32), Thresholds())
    assert [blog[key] for key in BLOG_KEYS] == [0, 0, 0, 0, 0]
    assert (pooled["layer_pct"], pooled["seq_pct"], pooled["dims"]) == (0, 0, [])
    assert counts.largest.tolist() == np.ones((4, 3)).tolist()


@pytest.mark.parametrize(("name", "hold"), [("fp32", None), ("bf16", "bfloat16")])
def test_planted_arrays(name: str, hold: Hold | None) -> None:
    """All planted cases of the golden arrays: both limits, ties, one sequence, a moving place."""
    folder = require_shared() / "goldens" / "frankenmoe" / "outlier_arrays"
    expected = json.loads((folder / "expected.json").read_text())[name]
    arrays = read_arrays(folder / "activations.safetensors")
    layers = range(expected["num_layers"])
    names = [f"layer_{n}.{kind}" for n in layers for kind in ("attn", "ffn")]
    values = np.stack([arrays[name] for name in names], axis=1)
    blog, pooled, counts = count(values, Thresholds(), hold)
    assert blog == expected["blog"]
    assert {key: pooled[key] for key in ("layer_pct", "seq_pct", "num_outliers")} == {
        key: expected["pooled"][key] for key in ("layer_pct", "seq_pct", "num_outliers")
    }
    for found, wanted in zip(pooled["dims"], expected["pooled"]["dims"], strict=True):
        assert found == found | wanted
    hits = counts.pooled()
    assert {str(d): (hits.probe_hits[d], hits.position_hits[d]) for d in range(24)} == {
        str(d): (0, 0) for d in range(24)
    } | {d: (h["probe_hits"], h["position_hits"]) for d, h in expected["any_hit_dims"].items()}


def test_kinds_of_inputs_are_counted_apart() -> None:
    """What routed and shared experts read is one vector: they share their counts."""
    values = np.zeros((4, 10, 3), np.float32)
    values[0::2, :5, 0] = 9  # in attention only
    values[1::2, 5:, 1] = -9  # in the feed-forward block only
    counts = Accumulator(probes(2, ("routed_experts", "shared_experts")))
    for number, array in enumerate(values):
        counts.see(number, mx.array(array[None]), mx.array(array[None]))
    groups = counts.finish_sequence()
    assert set(groups) == {"all", "attention", "routed_experts", "shared_experts"}
    coverage = {
        name: (g.probes, g.probe_hits.tolist(), g.position_hits.tolist())
        for name, g in groups.items()
    }
    assert coverage["all"] == (4, [2, 2, 0], [5, 5, 0])
    assert coverage["attention"] == (2, [2, 0, 0], [5, 0, 0])
    assert coverage["routed_experts"] == (2, [0, 2, 0], [0, 5, 0])
    assert coverage["shared_experts"] == coverage["routed_experts"]


def test_hits_by_expert() -> None:
    rng = np.random.default_rng(0)
    hits = ExpertHits()
    served = np.zeros((2, 5), int)
    carried = np.zeros((2, 5), int)
    for dims in ([4, 7], [7]):  # two sequences; dimension 4 is hit in the first alone
        for layer in range(2):
            hit = rng.random((30, len(dims))) < 0.5
            indices = np.array([rng.permutation(4)[:2] for _ in range(30)])  # expert 4 is idle
            hits.see_hits(np.array(dims), hit)
            hits.see_routing(layer, indices, 5)
            for t, experts in enumerate(indices):
                served[layer, experts] += 1
                carried[layer, experts] += hit[t, dims.index(7)]
    found = hits.as_json([4, 7, 9])
    assert [layer["tokens"] for layer in found] == served.tolist()
    for layer, (shares, counts) in enumerate(
        zip(found, carried / np.maximum(1, served), strict=True)
    ):
        assert shares["layer"] == layer
        assert shares["share"]["7"] == [*counts[:4].tolist(), None]
        assert shares["share"]["9"] == [0, 0, 0, 0, None]
        assert 0 < shares["share"]["4"][0] < 1


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([(1, np.zeros((1, 4, 3)))], "layer_0.ffn: called out of order"),
        ([(0, np.zeros((1, 4, 3))), (0, np.zeros((1, 4, 3)))], "layer_0.attn: called out of order"),
        ([(0, np.zeros((2, 4, 3)))], "layer_0.attn: shape"),
        ([(0, np.zeros((1, 4, 3))), (1, np.zeros((1, 4, 2)))], "layer_0.ffn: shape"),
        ([(0, np.full((1, 4, 3), np.nan))], "not all values are finite"),
        ([(0, np.full((1, 4, 3), 7e4))], "not all values are finite in float16"),
        ([(0, np.zeros((1, 4, 3)))], "layer_0.ffn: not called"),
    ],
)
def test_refusals(calls: list[tuple[int, np.ndarray]], message: str) -> None:
    counts = Accumulator(probes(1), hold="float16" if "float16" in message else None)
    with pytest.raises(OutlierError, match=message):
        for number, array in calls:
            counts.see(number, mx.array(array, mx.float32), mx.array(array, mx.float32))
        counts.finish_sequence()
