"""Whether tokens that carry an outlier feature go to particular experts."""

from typing import Any

import numpy as np

from outlier_mlx.errors import OutlierError


class ExpertHits:
    """Counts, for each expert, its tokens and those among them that are hit in a dimension.

    Only dimensions that are hit somewhere in a layer take memory: 8 bytes an expert each.
    """

    def __init__(self) -> None:
        #: By layer, (experts,) tokens that were routed there.
        self.tokens: dict[int, np.ndarray] = {}
        #: By layer and dimension, (experts,) those of them that are hit.
        self.carrying: dict[int, dict[int, np.ndarray]] = {}
        self._hit: tuple[np.ndarray, np.ndarray] = np.zeros(0, int), np.zeros((0, 0), bool)

    def see_hits(self, dims: np.ndarray, hit: np.ndarray) -> None:
        """Note the hits in what enters a layer's experts, before its routing is seen.

        Args:
            dims: (n,) the dimensions that are hit anywhere.
            hit: (positions, n) where.
        """
        self._hit = dims, hit

    def see_routing(self, layer: int, indices: np.ndarray, experts: int) -> None:
        """Count one layer's tokens.

        Args:
            layer: its number.
            indices: (positions, k) the experts of each token.
            experts: how many the layer has.

        Raises:
            OutlierError: not as many tokens are routed as were seen to enter.
        """
        dims, hit = self._hit
        if len(indices) != len(hit):
            raise OutlierError(
                f"layer_{layer}: {len(indices)} tokens are routed, but {len(hit)} entered"
            )
        chosen = np.zeros((experts, len(indices)), np.int64)
        chosen[indices.T, np.arange(len(indices))] = 1
        none = np.zeros(experts, np.int64)
        self.tokens[layer] = self.tokens.get(layer, none) + chosen.sum(axis=1)
        carrying = self.carrying.setdefault(layer, {})
        for dim, counts in zip(dims.tolist(), (chosen @ hit).T, strict=True):
            carrying[dim] = carrying.get(dim, none) + counts

    def as_json(self, dims: list[int]) -> list[dict[str, Any]]:
        """By layer: the tokens of each expert, and the share of them that each dimension hits.

        The share is None for an expert without tokens.
        """
        return [
            {
                "layer": layer,
                "tokens": tokens.tolist(),
                "share": {str(dim): self._shares(layer, dim) for dim in dims},
            }
            for layer, tokens in self.tokens.items()
        ]

    def _shares(self, layer: int, dim: int) -> list[float | None]:
        tokens = self.tokens[layer]
        counts = self.carrying[layer].get(dim, np.zeros_like(tokens))
        return [
            part / whole if whole else None
            for part, whole in zip(counts.tolist(), tokens.tolist(), strict=True)
        ]
