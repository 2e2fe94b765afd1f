"""Counting hits while a model runs. Only counters are kept, no activations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.environment import dtype_name
from outlier_mlx.measure.outlier_definitions import PooledHits, SequenceHits
from outlier_mlx.measure.outlier_experts import ExpertHits
from outlier_mlx.measure.outlier_probes import Kind, Probe

Hold = Literal["bfloat16", "float16", "float32"]
#: A kind of probe, or all of them.
Group = Kind | Literal["all"]


@dataclass
class Residual:
    """Statistics of the residual stream that enters a layer, over all sequences.

    Attributes:
        total: sum of magnitudes.
        values: number of values.
        largest: (hidden,), the largest magnitude of each dimension.
        largest_without_first: the same without the first position of each sequence.
    """

    total: float
    values: int
    largest: np.ndarray
    largest_without_first: np.ndarray

    def as_json(self, layer: int) -> dict[str, Any]:
        """All figures, for programs; of the dimensions only the largest."""
        return {
            "layer": layer,
            "mean_magnitude": self.total / self.values,
            "max_magnitude": float(self.largest.max()),
            "dim": int(self.largest.argmax()),
            "max_magnitude_without_first": float(self.largest_without_first.max()),
            "dim_without_first": int(self.largest_without_first.argmax()),
        }


class Accumulator:
    """Counts the hits of sequences, one sequence after another.

    It needs memory for the counters only: about probes x hidden numbers for all sequences
    together, and positions x hidden bits for each kind of probe while a sequence runs.

    Args:
        probes: the probes, in the order in which they are called, once per sequence.
        magnitude: the least magnitude of a hit.
        hold: the dtype to which values are rounded before they are compared; None: no rounding.
        residual: also collect statistics of the residual stream that enters each layer.
        per_expert: also count the hits in the tokens of each expert.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        magnitude: float = 6.0,
        hold: Hold | None = None,
        *,
        residual: bool = False,
        per_expert: bool = False,
    ) -> None:
        self.probes = probes
        self.layers = max(probe.layer for probe in probes) + 1
        self.magnitude = magnitude
        self.hold = hold
        self.dtypes: set[str] = set()
        #: Numbers of finished sequences, and of their positions.
        self.sequences = self.positions = 0
        self.residuals: dict[int, Residual] | None = {} if residual else None
        self.experts: ExpertHits | None = ExpertHits() if per_expert else None
        # The width is known from the first vectors on.
        self._allocate(0)

    def _allocate(self, hidden: int) -> None:
        shape = len(self.probes), hidden
        #: (probes, hidden): positions with a hit, the largest magnitude, and that without the
        #: first position of each sequence.
        self.hits = np.zeros(shape, np.int64)
        self.largest = np.zeros(shape, np.float32)
        self.largest_without_first = np.zeros(shape, np.float32)
        self._negative = np.zeros(hidden, np.int64)
        self._position_hits = np.zeros(hidden, np.int64)
        self._start()

    @property
    def hidden(self) -> int:
        """Width of the probed vectors; 0 before the first."""
        return self.hits.shape[1]

    def _start(self) -> None:
        self._seen = 0
        self._counts = np.zeros_like(self.hits)
        self._magnitudes = np.zeros_like(self.largest)
        # For each kind of probe, (positions, hidden): whether any probe has a hit there.
        self._unions: dict[tuple[Kind, ...], mx.array] = {}

    def see(self, number: int, entering: mx.array, values: mx.array) -> None:
        """Count the hits of one probe in the sequence that runs.

        Args:
            number: number of the probe.
            entering: (1, positions, hidden), what enters the probed module: for attention's probe,
                the residual stream that enters the layer.
            values: (1, positions, hidden), the probed vectors.

        Raises:
            OutlierError: the probe is called out of order, the shape is unexpected, or a value is
                not finite.
        """
        probe = self.probes[number]
        if number != self._seen:
            raise OutlierError(
                f"{probe.name}: called out of order; each layer must run exactly once"
            )
        if not self.hidden:
            self._allocate(values.shape[-1])
        self._seen += 1
        held = self._held(probe, values)
        magnitudes = mx.abs(held)
        hit = magnitudes >= self.magnitude  # (positions, hidden)
        union = self._unions.get(probe.kinds)
        union = hit if union is None else union | hit
        counts, negative = hit.sum(axis=0), (hit & (held < 0)).sum(axis=0)
        largest, later = magnitudes.max(axis=0), _largest_without_first(magnitudes)
        # Evaluated here, so that MLX can free the activations of earlier layers.
        self._evaluate(probe, held, union, counts, negative, largest, later)
        self._unions[probe.kinds] = union
        self._counts[number] = np.array(counts)
        self._negative += np.array(negative)
        self._magnitudes[number] = np.array(largest)
        row = self.largest_without_first[number]
        np.maximum(row, np.array(later), out=row)
        if self.residuals is not None and probe.kinds == ("attention",):
            self._see_residual(probe, entering)
        if self.experts is not None and "routed_experts" in probe.kinds:
            dims = np.flatnonzero(self._counts[number])
            self.experts.see_hits(dims, np.array(hit)[:, dims])

    def see_routing(self, layer: int, indices: mx.array) -> None:
        """Count the tokens of each expert; `indices` (..., k) are the experts of each position."""
        if self.experts is not None:
            experts = next(p.experts for p in self.probes if p.layer == layer and p.experts)
            chosen = np.array(indices).reshape(-1, indices.shape[-1])
            self.experts.see_routing(layer, chosen, experts)

    def _held(self, probe: Probe, values: mx.array) -> mx.array:
        """The values as (positions, hidden) float32, rounded to the dtype of `hold`."""
        if values.ndim != 3 or values.shape[0] != 1 or values.shape[2] != self.hidden:
            raise OutlierError(
                f"{probe.name}: shape {values.shape}, expected (1, positions, {self.hidden})"
            )
        self.dtypes.add(dtype_name(values.dtype))
        if self.hold is not None:
            values = values.astype(getattr(mx, self.hold))
        return values[0].astype(mx.float32)

    def _evaluate(self, probe: Probe, held: mx.array, *results: mx.array) -> None:
        finite = mx.isfinite(held).all()
        mx.eval(finite, *results)
        if not finite:
            as_what = f" in {self.hold}" if self.hold else ""
            raise OutlierError(f"{probe.name}: not all values are finite{as_what}")

    def _see_residual(self, probe: Probe, entering: mx.array) -> None:
        assert self.residuals is not None
        held = self._held(probe, entering)
        magnitudes = mx.abs(held)
        total, largest = magnitudes.sum(), magnitudes.max(axis=0)
        later = _largest_without_first(magnitudes)
        self._evaluate(probe, held, total, largest, later)
        zeros = np.zeros(self.hidden, np.float32)
        found = self.residuals.setdefault(probe.layer, Residual(0.0, 0, zeros, zeros))
        found.total += float(total)
        found.values += magnitudes.size
        found.largest = np.maximum(found.largest, np.array(largest))
        found.largest_without_first = np.maximum(found.largest_without_first, np.array(later))

    def finish_sequence(self) -> dict[Group, SequenceHits]:
        """Finish a sequence: add its counts to the totals.

        Returns:
            Its hits in all probes, and in those of each kind.

        Raises:
            OutlierError: not every probe was called.
        """
        if self._seen != len(self.probes):
            missing = self.probes[self._seen].name
            raise OutlierError(f"{missing}: not called; each layer must run exactly once")
        unions = {kinds: np.array(union) for kinds, union in self._unions.items()}
        positions = next(iter(unions.values())).shape[0]
        groups: dict[Group, SequenceHits] = {"all": self._group(None, unions)}
        for kind in sorted({kind for kinds in unions for kind in kinds}):
            groups[kind] = self._group(kind, unions)
        self.hits += self._counts
        np.maximum(self.largest, self._magnitudes, out=self.largest)
        self._position_hits += groups["all"].position_hits
        self.sequences += 1
        self.positions += positions
        self._start()
        return groups

    def _group(self, kind: Kind | None, unions: dict[tuple[Kind, ...], np.ndarray]) -> SequenceHits:
        rows = [n for n, probe in enumerate(self.probes) if kind is None or kind in probe.kinds]
        chosen = [union for kinds, union in unions.items() if kind is None or kind in kinds]
        union = chosen[0] if len(chosen) == 1 else np.logical_or.reduce(chosen)
        return SequenceHits(
            probes=len(rows),
            positions=len(union),
            probe_hits=(self._counts[rows] > 0).sum(axis=0),
            position_hits=union.sum(axis=0),
            occurrences=self._counts[rows].sum(axis=0),
            max_magnitude=self._magnitudes[rows].max(axis=0),
        )

    def pooled(self) -> PooledHits:
        """The hits of all finished sequences."""
        layers = np.array([probe.layer for probe in self.probes])
        hit = self.hits > 0  # (probes, hidden)
        return PooledHits(
            layers=self.layers,
            positions=self.positions,
            layer_hits=sum(hit[layers == n].any(axis=0).astype(int) for n in range(self.layers)),
            probe_hits=hit.sum(axis=0),
            position_hits=self._position_hits,
            positive=self.hits.sum(axis=0) - self._negative,
            negative=self._negative,
            max_magnitude=self.largest.max(axis=0),
            max_magnitude_without_first=self.largest_without_first.max(axis=0),
        )


def _largest_without_first(magnitudes: mx.array) -> mx.array:
    """(hidden,), the largest of (positions, hidden) without the first position, or zeros."""
    return magnitudes[1:].max(axis=0) if len(magnitudes) > 1 else mx.zeros(magnitudes.shape[1])
