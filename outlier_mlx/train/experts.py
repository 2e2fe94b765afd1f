"""What stands in a layer's FFN during training: the base's FFN, a router and ternary experts.

Everything is plain MLX, so that it has gradients everywhere. With the trits and scales that will be
written, it computes what the tier's plain path computes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from outlier_mlx.engine.gradients import custom
from outlier_mlx.models.description import PROJECTIONS
from outlier_mlx.runtime.routing import top_experts
from outlier_mlx.train.trits import (
    Method,
    as_stored,
    latent_product,
    packed,
    ternarise,
    unpacked,
)
from outlier_mlx.upstream import swiglu

#: Trits (out, in) int8, and scales (out,) float16.
Stored = tuple[np.ndarray, np.ndarray]


class TernaryMatrix(nn.Module):
    """A projection of an expert: trits that stay, two bits each, and scales that can be trained."""

    def __init__(self, trits: np.ndarray, scales: np.ndarray) -> None:
        """Args: trits (out, in) int8; scales (out,), any float dtype."""
        super().__init__()
        self.codes = packed(trits)
        self.scales = mx.array(scales.astype(np.float32))

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply x (..., in): (..., out) float32."""
        product = (x @ unpacked(self.codes, x.dtype).T).astype(mx.float32)
        return product * as_stored(self.scales)

    def stored(self) -> Stored:
        """The trits and scales that it computes with."""
        trits = unpacked(self.codes, mx.float32).astype(mx.int8)
        return np.array(trits), np.array(as_stored(self.scales).astype(mx.float16))


class LatentMatrix(nn.Module):
    """A projection of an expert in training: float32 weights, rounded whenever they are used."""

    def __init__(self, latent: mx.array, method: Method) -> None:
        """Args: latent (out, in) float32; method as for `trits.row_scales`."""
        super().__init__()
        self.latent = latent
        self._method: Method = method

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply x (..., in): (..., out) float32."""
        return latent_product(x, self.latent, self._method)

    def stored(self) -> Stored:
        """The trits and scales that it computes with."""
        trits, scales = ternarise(self.latent, self._method)
        return np.array(trits.astype(mx.int8)), np.array(scales[:, 0].astype(mx.float16))


class Expert(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, matrices: dict[str, TernaryMatrix | LatentMatrix]) -> None:
        """Args: matrices, by the names of `PROJECTIONS`."""
        super().__init__()
        for name in PROJECTIONS:
            self[f"{name}_proj"] = matrices[name]

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., hidden) to (..., hidden) float32."""
        inner = swiglu(self.gate_proj(x), self.up_proj(x))
        y: mx.array = self.down_proj(inner.astype(x.dtype))
        return y

    def stored(self) -> dict[str, Stored]:
        """What each projection computes with, by the names of `PROJECTIONS`."""
        return {name: self[f"{name}_proj"].stored() for name in PROJECTIONS}

    def ternary(self) -> "Expert":
        """The same with trits that stay, and only scales that can be trained."""
        return Expert({name: TernaryMatrix(*of) for name, of in self.stored().items()})

    def dense(self) -> dict[str, mx.array]:
        """Trits times scales of each projection, float32, by the names of `PROJECTIONS`."""
        found = {}
        for name, (trits, scales) in self.stored().items():
            found[name] = mx.array(trits).astype(mx.float32) * mx.array(scales)[:, None]
        return found

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """Codes and scales by name, below `prefix`; no matrix is latent."""
        matrices = ((f"{prefix}.{p}_proj", self[f"{p}_proj"]) for p in PROJECTIONS)
        return {f"{at}.{leaf}": m[leaf] for at, m in matrices for leaf in ("codes", "scales")}


@dataclass(frozen=True)
class Mode:
    """What the model computes.

    Attributes:
        experts: numbers of those that take part; none: the base alone.
        top_k: experts of a token, at most.
        balance: weight of the loss for unequal use, for each layer.
        stickiness: weight of the loss for neighbouring tokens with different experts.
        rounded: whether the base is rounded to fewer bits.
        watch: called with a layer's number and the experts (batch, tokens, k) that it chose, as
            positions in `experts`.
    """

    experts: tuple[int, ...] = ()
    top_k: int = 2
    balance: float = 0.0
    stickiness: float = 0.0
    rounded: bool = False
    watch: Callable[[int, mx.array], None] | None = None


class Current:
    """The mode of a model now.

    A layer that is computed again for its gradient, when whoever called the model is gone, takes
    the mode that it had.
    """

    def __init__(self) -> None:
        self.mode = Mode()

    @contextmanager
    def running(self, mode: Mode) -> Iterator[None]:
        """Have another mode until the block ends."""
        former, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = former


class ExpertBlock(nn.Module):
    """y = FFN(x) + sum over the top k experts of w_e * alpha_e * FFN_e(x), as `runtime.moe`.

    Of the experts, those of `Mode.experts` take part. Each of them computes all tokens.
    """

    def __init__(self, layer: int, mlp: nn.Module, hidden: int, experts: int, now: Current) -> None:
        """Args: the layer's number; its FFN; hidden size; number of experts; the mode.

        `experts` and what they are made of is set later.
        """
        super().__init__()
        self.mlp = mlp
        self.router = mx.zeros((experts, hidden))
        self.alpha = mx.ones((experts,))
        self.experts: list[Any] = [None] * experts
        self._layer, self._now = layer, now

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (batch, tokens, hidden) to the same shape and dtype."""
        mode = self._now.mode
        y: mx.array = self.mlp(x)
        if not mode.experts:
            return y
        weights, loss = self._weights(x)
        total = y.astype(mx.float32)
        for at, number in enumerate(mode.experts):
            total = total + weights[..., at : at + 1] * self.experts[number](x)
        y = total.astype(x.dtype)
        return y if loss is None else _with_loss(y, loss)

    def set_alphas(self, experts: Sequence[int], value: float | mx.array) -> None:
        """Set the alphas of some experts, to a number or to those of an array for all experts."""
        own = mx.array([number in experts for number in range(self.alpha.shape[0])])
        self.alpha = mx.where(own, value, self.alpha)

    def _weights(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """The weight of each expert that takes part, (batch, tokens, experts); and losses."""
        mode = self._now.mode
        numbers = mx.array(mode.experts)
        alpha = self.alpha[numbers]
        if len(mode.experts) == 1:
            return mx.broadcast_to(alpha, (*x.shape[:-1], 1)), None
        logits = x.astype(mx.float32) @ self.router[numbers].T
        k = min(mode.top_k, len(mode.experts))
        chosen = top_experts(logits, k)
        if mode.watch is not None:
            mode.watch(self._layer, chosen)
        shares = mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1, precise=True)
        places = chosen[..., None] == mx.arange(len(mode.experts))  # (batch, tokens, k, experts)
        weights = (places * shares[..., None]).sum(axis=-2) * alpha
        if not mode.balance and not mode.stickiness:
            return weights, None
        probs = mx.softmax(logits, axis=-1, precise=True)
        loss = mode.balance * balance_loss(probs, places.any(axis=-2))
        if mode.stickiness:
            loss = loss + mode.stickiness * change_loss(probs)
        return weights, loss


def balance_loss(probs: mx.array, used: mx.array) -> mx.array:
    """1 if all experts are used equally, else more (Switch Transformer, equation 4).

    Args:
        probs: (batch, tokens, experts) float32, the router's softmax over all experts.
        used: (batch, tokens, experts), whether the token uses the expert.
    """
    share = used.astype(mx.float32).mean(axis=(0, 1))
    share = share / share.sum()
    return probs.shape[-1] * (mx.stop_gradient(share) * probs.mean(axis=(0, 1))).sum()


def change_loss(probs: mx.array) -> mx.array:
    """How likely two neighbouring tokens are to draw different experts, 0 to 1.

    Args:
        probs: (batch, tokens, experts) float32, the router's softmax over all experts.
    """
    return 1 - (probs[:, 1:] * probs[:, :-1]).sum(axis=-1).mean()


@custom
def _with_loss(y: mx.array, loss: mx.array) -> mx.array:
    """y; whatever is minimised, `loss` is minimised, too: its gradient is 1."""
    return y


@_with_loss.vjp
def _with_loss_vjp(
    given: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    return cotangent, mx.ones_like(given[1])


def latent_expert(weights: dict[str, mx.array], method: Method) -> Expert:
    """An expert in training; weights by the names of `PROJECTIONS`, method as `LatentMatrix`."""
    return Expert({name: LatentMatrix(weights[name], method) for name in PROJECTIONS})


def empty_expert(hidden: int, size: int) -> Expert:
    """An expert of a width whose arrays are put into it later."""
    shapes = {"gate": (size, hidden), "up": (size, hidden), "down": (hidden, size)}
    return Expert(
        {p: TernaryMatrix(np.zeros(s, np.int8), np.zeros(s[0])) for p, s in shapes.items()}
    )
