"""Reading early what the next MoE layer's router is likely to choose.

A layer's experts get x = n · w, where n is the normalised residual and w the weight of the layer's
norm. The residual changes little until the next MoE layer, whose router R' gets n' · w'. Applied to
n it is R' diag(w' / w) x: one product with a matrix that is made once, and whose result comes to
the host together with the layer's own routing. A wrong guess costs a read and a slot, never a
result.
"""

import weakref
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from outlier_mlx.models.config import describe_args
from outlier_mlx.runtime.routing import Router, route

# Passes with reading early and passes without follow each other in blocks; the first pass of a
# block is not counted, because slots are still as the block before left them.
_BLOCK = 4
# Counted passes of each kind, after which it is decided.
_ENOUGH = 30
# Seconds waited with reading early, in those waited without, from which it does not pay.
_PAYS_BELOW = 0.95


class Probe:
    """Whether reading early pays, by the seconds that passes wait for experts.

    Attributes:
        on: whether to read early in the present pass.
        decided: whether that stays so.
        waited: mean seconds of a pass without reading early, and with it; None: not known yet.
    """

    def __init__(self) -> None:
        """Begin without reading early."""
        self.on = self.decided = False
        self._passes, self._read = 0, False
        self._seconds: tuple[list[float], list[float]] = [], []

    @property
    def waited(self) -> tuple[float, float] | None:
        """Mean seconds that a pass waited without and with reading early."""
        without, early = self._seconds
        return (fmean(without), fmean(early)) if without and early else None

    def end_pass(self, seconds: float, *, read: bool) -> None:
        """Note that a pass is over.

        Args:
            seconds: how long it waited for experts.
            read: whether any expert was read.
        """
        if self.decided:
            return
        self._read |= read
        if self._passes % _BLOCK:
            self._seconds[self.on].append(seconds)
        self._passes += 1
        if self._passes % _BLOCK:
            return
        self.on = not self.on
        without, early = self._seconds
        if min(len(without), len(early)) < _ENOUGH:
            return
        if self._read:
            self.decide(fmean(early) < _PAYS_BELOW * fmean(without))
        else:  # there was nothing to learn
            without.clear()
            early.clear()

    def decide(self, on: bool) -> None:
        """Read early from now on, or never again."""
        self.on, self.decided = on, True


class Lookahead:
    """Guesses experts of the next MoE layer, while that pays.

    Attributes:
        probe: whether to read early.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], top_k: int) -> None:
        """Nothing is computed before the first guess, when the model's weights are loaded.

        Args:
            model: the model.
            layers: numbers of its MoE layers, in order.
            top_k: experts of a token.
        """
        self.probe = Probe()
        self._model = weakref.ref(model)
        self._layers, self._top_k = layers, top_k
        # A rank of a pipeline keeps some of its layers alone, and they move down.
        self._decoders = {number: weakref.ref(model.layers[number]) for number in layers}
        self._routers: dict[int, Router] | None = None
        self._guesses: dict[int, set[int]] = {}  # of the present pass, by layer
        self._decodes, self._read, self._seconds = False, 0, 0.0

    @property
    def possible(self) -> bool:
        """Whether this model has routers that can be asked beforehand."""
        return bool(self._made_routers())

    def begin(self, layer: int, read: int, *, decodes: bool) -> None:
        """Note that a layer is in hand.

        Args:
            layer: its number.
            read: bytes of experts that were read so far.
            decodes: whether the pass decodes tokens, rather than reads a prompt.
        """
        if layer != self._layers[0]:
            return
        if self._decodes:
            self.probe.end_pass(self._seconds, read=read != self._read)
        self._decodes, self._read, self._seconds = decodes, read, 0.0
        self._guesses.clear()

    def guess(self, layer: int, x: mx.array) -> mx.array | None:
        """The experts that the next MoE layer will probably choose; None: not to be guessed.

        Args:
            layer: the layer in hand.
            x: (..., hidden), the input of its experts.

        Returns:
            (..., k) uint32, the likeliest first.
        """
        if not self.probe.on or (router := self._made_routers().get(layer)) is None:
            return None
        return route(x, router, self._top_k)[0]

    def note_guess(self, layer: int, guess: mx.array) -> tuple[int, list[int]]:
        """The next layer, and its experts in a guess that is computed, the likeliest first."""
        columns = np.array(guess).reshape(-1, guess.shape[-1]).T
        experts = list(dict.fromkeys(columns.flatten().tolist()))
        later = self._layers[self._layers.index(layer) + 1]
        self._guesses[later] = set(experts)
        return later, experts

    def note_waited(self, seconds: float) -> None:
        """Note that a layer waited for experts."""
        self._seconds += seconds

    def foreseen(self, layer: int, experts: set[int]) -> int | None:
        """How many of a layer's experts were guessed in this pass; None: there was no guess."""
        guess = self._guesses.get(layer)
        return None if guess is None else len(experts & guess)

    def _made_routers(self) -> Mapping[int, Router]:
        if self._routers is None:
            self._routers = {}
            model = self._model()
            if model is not None and _is_known(model):
                for below, above in pairwise(self._layers):
                    router = next_router(*(self._decoders[number]() for number in (below, above)))
                    if router is not None:
                        self._routers[below] = router
        return self._routers


def next_router(below: Any, above: Any) -> Router | None:
    """The router of a layer, for the input of the experts of a layer below it.

    Args:
        below: a decoder layer with a MoE block.
        above: a later one.

    Returns:
        The router with the weights R' diag(w' / w), float32; where w is 0, or too small to divide
        by, the columns are 0. None, if a layer has no such norm or router.
    """
    norms: list[Any] = [
        getattr(layer, "post_attention_layernorm", None) for layer in (below, above)
    ]
    gate = next((b.gate for b in above.children().values() if "switch_mlp" in b), None)
    weight = getattr(gate, "weight", None)
    plain = all(type(norm) is nn.RMSNorm for norm in norms) and norms[0].eps == norms[1].eps
    if not plain or weight is None or not mx.issubdtype(weight.dtype, mx.floating):
        return None
    old, new = (norm.weight.astype(mx.float32) for norm in norms)
    matrix = weight.astype(mx.float32) * (new / old)
    router = Router(weight.shape[1], weight.shape[0])
    router.weight = mx.where(mx.isfinite(matrix), matrix, 0.0)
    mx.eval(router.weight)
    return router


def _is_known(model: nn.Module) -> bool:
    """Whether a model's layers are known to normalise the residual just before the MoE block."""
    return describe_args(getattr(model, "args", None)).family is not None
