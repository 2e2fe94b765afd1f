"""Whether tokens with an outlier feature are routed to particular experts."""

from typing import Any

import numpy as np

from outlier_mlx.errors import OutlierError


class ExpertHits:
    """Counts the tokens of each expert, and those of them with a hit in each dimension.

    Only dimensions with a hit in a layer take memory: 8 bytes per expert each.
    """

    def __init__(self) -> None:
        #: By layer, (experts,): number of tokens routed to each.
        self.tokens: dict[int, np.ndarray] = {}
        #: By layer and dimension, (experts,): number of those tokens with a hit.
        self.carrying: dict[int, dict[int, np.ndarray]] = {}
        self._hit: tuple[np.ndarray, np.ndarray] = np.zeros(0, int), np.zeros((0, 0), bool)

    def see_hits(self, dims: np.ndarray, hit: np.ndarray) -> None:
        """Keep the hits in the input of a layer's experts until its routing is known.

        Args:
            dims: (n,), the dimensions with a hit.
            hit: (positions, n), whether there is a hit.
        """
        self._hit = dims, hit

    def see_routing(self, layer: int, indices: np.ndarray, experts: int) -> None:
        """Count one layer's tokens.

        Args:
            layer: number of the layer.
            indices: (positions, k), the experts of each token.
            experts: number of experts in the layer.

        Raises:
            OutlierError: the numbers of routed tokens and of tokens in the input differ.
        """
        dims, hit = self._hit
        if len(indices) != len(hit):
            raise OutlierError(
                f"layer_{layer}: {len(indices)} tokens are routed, but the input has {len(hit)}"
            )
        chosen = np.zeros((experts, len(indices)), np.int64)
        chosen[indices.T, np.arange(len(indices))] = 1
        none = np.zeros(experts, np.int64)
        self.tokens[layer] = self.tokens.get(layer, none) + chosen.sum(axis=1)
        carrying = self.carrying.setdefault(layer, {})
        for dim, counts in zip(dims.tolist(), (chosen @ hit).T, strict=True):
            carrying[dim] = carrying.get(dim, none) + counts

    def as_json(self, dims: list[int]) -> list[dict[str, Any]]:
        """For each layer, the tokens of each expert, and the share with a hit in each dimension.

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
