"""A rank that cannot read its experts: it stays in step with the others, and then tells them why.

In the middle of a pass of the model, ranks wait for each other's sums, and hear nothing else. So
one that fails goes on without its experts to the end of the pass, where all ask one another.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.distributed.classes import extend
from outlier_mlx.engine.distributed.ranks import settle
from outlier_mlx.errors import OutlierError
from outlier_mlx.runtime.switch import TernarySwitchGLU


class _Failures:
    """Why this rank cannot go on; empty: it can."""

    def __init__(self) -> None:
        self.reason = ""


def stay_in_step(model: Any) -> None:
    """Let no rank fail alone in the middle of a pass of a model whose experts are paged.

    The last norm then raises `PeerError` on all ranks. Ranks of which one alone is out of step need
    to be started again, so no rank forgets that it failed.
    """
    failures = _Failures()
    for module in model.modules():
        if isinstance(module, TernarySwitchGLU):
            extend(module, _Reading)
            module._failures = failures
    extend(model.model.norm, _Asking)
    model.model.norm._failures = failures


class _Reading:
    """Routed experts that may fail to be read; what is computed from then on is not used."""

    _failures: _Failures

    def mix(self, x: mx.array, indices: mx.array, weights: mx.array, shared: mx.array) -> mx.array:
        if not self._failures.reason:
            try:
                experts: Any = super()
                y: mx.array = experts.mix(x, indices, weights, shared)
                return y
            except (OutlierError, OSError, MemoryError) as error:
                self._failures.reason = str(error) or type(error).__name__
        return shared + 0


class _Asking(nn.Module):
    """The last norm; what ranks send in a pass is sent before they ask."""

    _failures: _Failures

    def __call__(self, x: mx.array) -> mx.array:
        norm: Any = super()
        y: mx.array = norm.__call__(x)
        settle(y, self._failures.reason)
        return y
