"""The merged model run layer by layer, before it is written: how tokens are routed in it.

Several routers run side by side, each with a residual stream of its own, so that every weight is
read once for all of them. That is also where routers are trained: a layer's router is fitted to
what it will see, which depends on the routers before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from outlier_mlx.merge.gates import Gates
from outlier_mlx.merge.layers import AttentionLayer, FeedForward, embed
from outlier_mlx.merge.model import Expert, Mixture
from outlier_mlx.merge.texts import Sequences, batches, flat, unflat
from outlier_mlx.merge.trained import Fitted, fit_router
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.terminal import Progress


@dataclass(frozen=True)
class LayerShares:
    """How a layer routes the measured tokens.

    Attributes:
        first: for each expert, the share of tokens for which it has the largest weight.
        served: for each expert, the share of tokens that it serves; they add up to the top k.
        weight: for each expert, its mean routing weight; they add up to 1.
        largest: mean of a token's largest weight; 1 / k where the router hardly decides.
        right: share of tokens for which the right expert has the largest weight.
    """

    first: list[float]
    served: list[float]
    weight: list[float]
    largest: float
    right: float


@dataclass(frozen=True)
class Routing:
    """How one mode routes the measured prompts in the merged model.

    The first token is left out where it is BOS: it is the same in every prompt.

    Attributes:
        mode: the gate mode.
        tokens: tokens that were measured.
        right: share of (token, layer) for which the right expert has the largest weight.
        weight: mean routing weight of the right expert.
        prompts: prompts that were measured.
        prompts_right: those whose right expert has the largest mean weight over tokens and layers.
        layers: layer by layer.
    """

    mode: str
    tokens: int
    right: float
    weight: float
    prompts: int
    prompts_right: int
    layers: list[LayerShares]


@dataclass
class Stream:
    """Tokens on their way through the merged model under one router.

    Attributes:
        mode: its gate mode.
        gates: of all layers; None to train them on the way.
        shared: (layers, hidden), the shared expert's gate.
        measured: sequences to measure on.
        trained: sequences to train on, if `gates` is None.
        skip: tokens at the beginning of each sequence that do not count.
    """

    mode: str
    gates: np.ndarray | None
    shared: np.ndarray | None
    measured: Sequences
    trained: Sequences = field(default_factory=lambda: Sequences((), ()))
    skip: int = 0

    def __post_init__(self) -> None:
        """Lay the tokens out."""
        both = self.measured + self.trained
        self.groups = batches(both.ids)
        members = [np.repeat(g.members[:, None], g.tokens.shape[1], 1)[g.true] for g in self.groups]
        places = [np.broadcast_to(np.arange(g.tokens.shape[1]), g.true.shape)[g.true]
                  for g in self.groups]  # fmt: skip
        self.sequence = np.concatenate(members)  # (tokens,)
        self.owner = np.array(both.owners)[self.sequence]
        lengths = np.array([len(ids) for ids in both.ids])[self.sequence]
        counts = np.concatenate(places) >= np.minimum(self.skip, lengths - 1)
        self.is_measured = counts & (self.sequence < len(self.measured.ids))
        self.is_trained = counts & (self.sequence >= len(self.measured.ids))
        self.residual: list[mx.array] = []
        self.fitted: list[Fitted] = []
        self.weights: list[np.ndarray] = []  # a layer: (measured tokens, experts)

    def router(self, layer: int, x: mx.array, experts: int) -> mx.array:
        """The layer's router (experts, hidden); x (tokens, hidden) is what it sees."""
        if self.gates is not None:
            return mx.array(self.gates[layer])
        places = np.flatnonzero(self.is_trained)
        fitted = fit_router(x[mx.array(places)], self.owner[places], experts)
        self.fitted.append(fitted)
        return mx.array(fitted.rows)

    def all_gates(self) -> Gates:
        """The routers, trained ones included."""
        routed = self.gates
        if routed is None:
            routed = np.stack([fitted.rows for fitted in self.fitted])
        return Gates(routed, self.shared)

    def routing(self) -> Routing:
        """What was measured."""
        owner, sequence = self.owner[self.is_measured], self.sequence[self.is_measured]
        layers = [_shares(weights, owner) for weights in self.weights]
        mean = np.mean(self.weights, axis=0)  # (measured tokens, experts)
        prompts = len(self.measured.ids)
        by_prompt = np.zeros((prompts, mean.shape[1]))
        np.add.at(by_prompt, sequence, mean)
        right = by_prompt.argmax(axis=1) == np.array(self.measured.owners)
        return Routing(
            mode=self.mode,
            tokens=len(owner),
            right=float(np.mean([layer.right for layer in layers])),
            weight=float(mean[np.arange(len(owner)), owner].mean()),
            prompts=prompts,
            prompts_right=int(right.sum()),
            layers=layers,
        )


def _shares(weights: np.ndarray, owner: np.ndarray) -> LayerShares:
    """How a layer routes tokens of these owners; weights (tokens, experts)."""
    first = weights.argmax(axis=1)
    return LayerShares(
        first=(np.bincount(first, minlength=weights.shape[1]) / len(first)).tolist(),
        served=(weights > 0).mean(axis=0).tolist(),
        weight=weights.mean(axis=0).tolist(),
        largest=float(weights.max(axis=1).mean()),
        right=float((first == owner).mean()),
    )


def run_streams(
    mixture: Mixture, streams: Sequence[Stream], progress: Progress | None = None
) -> None:
    """Send streams through the merged model; they keep what is measured and trained.

    In memory are the weights of one layer's attention, or of one expert's FFN in it, and the
    tokens' states.

    Args:
        mixture: the merged model.
        streams: as they were made.
        progress: called with experts run and in all.
    """
    total = mixture.base.layers * len(mixture.all_experts)
    for stream in streams:
        stream.residual = [embed(mixture.base, batch) for batch in stream.groups]
    for layer in range(mixture.base.layers):
        attention = AttentionLayer(mixture.base, layer)
        passes = [_Pass(mixture, stream, layer, attention) for stream in streams]
        del attention
        if layer + 1 == mixture.base.layers:
            break
        for expert in mixture.all_experts:
            ffn = FeedForward([expert.matrix(layer, projection) for projection in PROJECTIONS])
            for each in passes:
                each.add(expert, ffn)
            del ffn
            if progress is not None:
                progress(layer * len(mixture.all_experts) + expert.number + 1, total)
        for each in passes:
            each.finish()
    if progress is not None:
        progress(total, total)


class _Pass:
    """A stream in one layer: attention and routing first, then expert after expert."""

    def __init__(
        self, mixture: Mixture, stream: Stream, layer: int, attention: AttentionLayer
    ) -> None:
        self.stream, self.shared = stream, mixture.shared
        pairs = [attention(x) for x in stream.residual]
        groups = stream.groups
        self.after = [h for h, _ in pairs]
        self.x = mx.concatenate([flat(g, x) for g, (_, x) in zip(groups, pairs, strict=True)])
        stream.residual = []
        router = stream.router(layer, self.x, len(mixture.experts))
        self.weights = routing_weights(np.array(self.x @ router.T), mixture.top_k)
        stream.weights.append(self.weights[stream.is_measured])
        if stream.shared is not None:
            gate = mx.sigmoid(self.x @ mx.array(stream.shared[layer])[:, None])
            self.shared_gate = gate
        self.y = mx.zeros(self.x.shape)
        mx.eval(self.x, self.y)

    def add(self, expert: Expert, ffn: FeedForward) -> None:
        """Add what an expert makes of the tokens that it serves."""
        if expert is self.shared:
            self.y = self.y + self.shared_gate * ffn(self.x)
            mx.eval(self.y)
            return
        weights = self.weights[:, expert.number]
        served = np.flatnonzero(weights)
        if not len(served):
            return
        places = mx.array(served)
        self.y[places] += mx.array(weights[served])[:, None] * ffn(self.x[places])
        mx.eval(self.y)

    def finish(self) -> None:
        """Add the result to the residual stream."""
        start = 0
        for batch, h in zip(self.stream.groups, self.after, strict=True):
            count = int(batch.lengths.sum())
            self.stream.residual.append(h + unflat(batch, self.y[start : start + count]))
            start += count
        mx.eval(self.stream.residual)


def routing_weights(logits: np.ndarray, k: int) -> np.ndarray:
    """Softmax over the k largest of each row, zero elsewhere; ties go to the lower number.

    Args:
        logits: (tokens, experts) float32.
        k: experts that serve a token.

    Returns:
        (tokens, experts) float32.
    """
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    picked = np.take_along_axis(logits, chosen, axis=1)
    picked = np.exp(picked - picked[:, :1])
    weights = np.zeros_like(logits)
    np.put_along_axis(weights, chosen, picked / picked.sum(axis=1, keepdims=True), axis=1)
    return weights
