"""How the scales of a model are written: with as few numbers and bits as keep them exact."""

from dataclasses import dataclass

import numpy as np

from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.storage.tensors import ExpertMatrix


@dataclass(frozen=True)
class ScaleForms:
    """What all scales of a model have in common.

    Attributes:
        whole: projections whose matrices all have one scale for the whole matrix.
        wide: the first scale that is not exact in float16, for messages; None if there is none.
    """

    whole: frozenset[str]
    wide: str | None

    def shape(self, projection: str, matrix: ExpertMatrix) -> tuple[int, ...]:
        """The shape of a matrix' stored scale: (1,) or (out, 1)."""
        return (1,) if projection in self.whole else (matrix.trits.shape[0], 1)

    def values(self, projection: str, matrix: ExpertMatrix) -> np.ndarray:
        """The scale in that shape, float32."""
        values = matrix.row_scales()
        return values[:1] if projection in self.whole else values[:, None]

    def require_float16(self, what: str) -> None:
        """Refuse to write what float16 would round: `what` have float16 scales.

        Raises:
            OutlierError: names the scale, and what to do instead.
        """
        if self.wide is not None:
            raise OutlierError(
                f"{self.wide}, which no float16 holds; {what} hold float16 scales. --format overlay"
                " keeps them in float32."
            )


def find_scale_forms(overlay: Overlay) -> ScaleForms:
    """Read all scales of an overlay, one matrix at a time, and find how to write them."""
    whole = set(PROJECTIONS)
    wide = None
    for experts in overlay.experts.values():
        for expert in experts:
            for projection, matrix in expert:
                values = matrix.row_scales()
                if (values != values[:1]).any():
                    whole.discard(projection)
                with np.errstate(over="ignore"):
                    rounded = values.astype(np.float16).astype(np.float32) != values
                if wide is None and rounded.any():
                    wide = f"{matrix.scale.where}: a scale of {float(values[rounded][0])!r}"
    return ScaleForms(frozenset(whole), wide)
