"""What an outlier feature is, by the two definitions in use. NumPy on counts; no model is needed.

A *hit* is a value of magnitude >= `Thresholds.magnitude` in the input of attention or of the
feed-forward block; each such input of each layer is a *probe*. A hidden dimension is an outlier
feature when it is hit in enough layers and at enough positions. The numbers 6.0, 25 % and 6 % are
from Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 4.

`blog` is what was computed for mixture-of-experts models by arb8020 ("outlier features in mixture
of experts models", code in arb8020/research): probes are the units of layer coverage, and every
sequence is judged by itself. `pooled` keeps to the paper's wording: layers are the units, the
positions of all sequences are pooled, and a dimension counts once.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Thresholds:
    """Least values of a hit and of an outlier feature.

    Attributes:
        magnitude: magnitude of a hit.
        layers: share of probes (`blog`) or layers (`pooled`) with a hit.
        positions: share of positions with a hit in any probe.
    """

    magnitude: float = 6.0
    layers: float = 0.25
    positions: float = 0.06

    def met(self, units: int, hit: np.ndarray, positions: int, at: np.ndarray) -> np.ndarray:
        """The dimensions whose coverages both reach the thresholds.

        Args:
            units: number of layers or probes.
            hit: (hidden,) how many of them have a hit.
            positions: number of positions.
            at: (hidden,) how many of them have a hit.

        Returns:
            Their numbers, ascending.
        """
        enough = (hit / units >= self.layers) & (at / positions >= self.positions)
        # Thresholds of 0 do not make outliers of dimensions that are never hit.
        return np.flatnonzero(enough & (hit > 0))


@dataclass(frozen=True)
class SequenceHits:
    """The hits of one sequence in a set of probes.

    Attributes:
        probes: number of probes.
        positions: number of positions.
        probe_hits: (hidden,) probes with a hit at any position.
        position_hits: (hidden,) positions with a hit in any probe.
        occurrences: (hidden,) all hits.
        max_magnitude: (hidden,) the largest magnitude, whether a hit or not.
    """

    probes: int
    positions: int
    probe_hits: np.ndarray
    position_hits: np.ndarray
    occurrences: np.ndarray
    max_magnitude: np.ndarray


@dataclass(frozen=True)
class Feature:
    """A dimension that is an outlier feature in one sequence; coverages in percent."""

    dim: int
    probe_hits: int
    seq_hits: int
    layer_pct: float
    seq_pct: float
    max_magnitude: float
    occurrences: int


def sequence_features(hits: SequenceHits, thresholds: Thresholds) -> list[Feature]:
    """The outlier features of one sequence, in the order of dimensions."""
    dims = thresholds.met(hits.probes, hits.probe_hits, hits.positions, hits.position_hits)
    return [
        Feature(
            dim=int(dim),
            probe_hits=int(hits.probe_hits[dim]),
            seq_hits=int(hits.position_hits[dim]),
            layer_pct=_percent(hits.probe_hits[dim], hits.probes),
            seq_pct=_percent(hits.position_hits[dim], hits.positions),
            max_magnitude=float(hits.max_magnitude[dim]),
            occurrences=int(hits.occurrences[dim]),
        )
        for dim in dims
    ]


def blog_summary(sequences: list[list[Feature]]) -> dict[str, Any]:
    """Means and medians over the features of all sequences, in percent; 0 without features.

    A dimension counts once for every sequence in which it is an outlier feature.
    """
    features = [feature for sequence in sequences for feature in sequence]
    layer = [feature.layer_pct for feature in features] or [0.0]
    positions = [feature.seq_pct for feature in features] or [0.0]
    return {
        "layer_pct": float(np.mean(layer)),
        "seq_pct": float(np.mean(positions)),
        "median_layer_pct": float(np.median(layer)),
        "median_seq_pct": float(np.median(positions)),
        "num_outliers": len(features),
        "unique_dims": sorted({feature.dim for feature in features}),
        "per_sequence": [[asdict(feature) for feature in sequence] for sequence in sequences],
    }


@dataclass(frozen=True)
class PooledHits:
    """The hits of all sequences together.

    Attributes:
        layers: number of layers.
        positions: number of positions in all sequences.
        layer_hits: (hidden,) layers with a hit, in either of their probes.
        probe_hits: (hidden,) probes with a hit.
        position_hits: (hidden,) positions with a hit in any probe.
        positive: (hidden,) hits above zero.
        negative: (hidden,) hits below zero.
        max_magnitude: (hidden,) the largest magnitude.
        max_magnitude_without_first: (hidden,) the same without the first position of each sequence.
    """

    layers: int
    positions: int
    layer_hits: np.ndarray
    probe_hits: np.ndarray
    position_hits: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    max_magnitude: np.ndarray
    max_magnitude_without_first: np.ndarray

    def describe(self, dim: int) -> dict[str, Any]:
        """All figures of one dimension; `one_sided` if all its hits have the same sign."""
        return {
            "dim": dim,
            "layer_hits": int(self.layer_hits[dim]),
            "probe_hits": int(self.probe_hits[dim]),
            "position_hits": int(self.position_hits[dim]),
            "layer_pct": _percent(self.layer_hits[dim], self.layers),
            "seq_pct": _percent(self.position_hits[dim], self.positions),
            "occurrences": int(self.positive[dim] + self.negative[dim]),
            "max_magnitude": float(self.max_magnitude[dim]),
            "max_magnitude_without_first": float(self.max_magnitude_without_first[dim]),
            "one_sided": not (self.positive[dim] and self.negative[dim]),
        }


def pooled_summary(hits: PooledHits, thresholds: Thresholds) -> dict[str, Any]:
    """The outlier features of all sequences together, and their mean coverages in percent."""
    found = thresholds.met(hits.layers, hits.layer_hits, hits.positions, hits.position_hits)
    dims = [hits.describe(int(dim)) for dim in found]
    return {
        "layer_pct": float(np.mean([dim["layer_pct"] for dim in dims] or [0.0])),
        "seq_pct": float(np.mean([dim["seq_pct"] for dim in dims] or [0.0])),
        "num_outliers": len(dims),
        "dims": dims,
    }


def _percent(part: int, whole: int) -> float:
    return 100 * (int(part) / whole)
