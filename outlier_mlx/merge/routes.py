"""Run the merged model layer by layer before it is written, to measure how tokens are routed.

Several gate modes run at the same time, each with its own hidden states, so that every weight is
read only once. Routers are trained here, too: a layer's router is fitted to its true input, which
depends on the routers of the layers before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from outlier_mlx.merge.gates import Gates
from outlier_mlx.merge.layers import AttentionLayer, FeedForward, embed
from outlier_mlx.merge.model import Expert, Mixture
from outlier_mlx.merge.texts import Sequences, batches, pad, unpad
from outlier_mlx.merge.trained import Fitted, fit_router
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.terminal import Progress, no_progress


@dataclass(frozen=True)
class LayerShares:
    """How a layer routes the measured tokens. Shares are between 0 and 1.

    Attributes:
        first: for each expert, the share of tokens for which it has the largest weight.
        served: for each expert, the share of tokens that are routed to it; the sum is the top k.
        weight: for each expert, its mean routing weight; the sum is 1.
        largest: mean over tokens of the largest weight; near 1 / k, the router hardly decides.
        right: share of tokens for which the right expert has the largest weight.
    """

    first: list[float]
    served: list[float]
    weight: list[float]
    largest: float
    right: float


@dataclass(frozen=True)
class Routing:
    """How one gate mode routes the measured prompts in the merged model.

    A BOS token at the beginning does not count: it is the same in every prompt.

    Attributes:
        mode: the gate mode.
        tokens: number of measured tokens.
        right: share of (token, layer) pairs in which the right expert has the largest weight.
        weight: mean routing weight of the right expert.
        prompts: number of measured prompts.
        prompts_right: number of prompts whose right expert has the largest mean weight over tokens
            and layers.
        layers: shares in each layer.
    """

    mode: str
    tokens: int
    right: float
    weight: float
    prompts: int
    prompts_right: int
    layers: list[LayerShares]


@dataclass
class RouterRun:
    """A run of the merged model with the routers of one gate mode.

    Attributes:
        mode: the gate mode.
        gates: (layers, experts, hidden); None to train the routers during the run.
        shared: (layers, hidden), the gate of the shared expert, or None.
        measured: sequences to measure routing on.
        trained: sequences to train on, if `gates` is None.
        skip: number of tokens at the beginning of each sequence that do not count.
    """

    mode: str
    gates: np.ndarray | None
    shared: np.ndarray | None
    measured: Sequences
    trained: Sequences = field(default_factory=lambda: Sequences((), ()))
    skip: int = 0

    def __post_init__(self) -> None:
        """Arrange the tokens in batches."""
        both = self.measured + self.trained
        self.groups = batches(both.ids)
        lengths = np.concatenate([group.lengths for group in self.groups])
        members = np.concatenate([group.members for group in self.groups])
        self.sequence = np.repeat(members, lengths)  # (tokens,)
        self.owner = np.array(both.owners)[self.sequence]
        places = np.concatenate([np.arange(length) for length in lengths])
        counts = places >= np.repeat(np.minimum(self.skip, lengths - 1), lengths)
        self.is_measured = counts & (self.sequence < len(self.measured.ids))
        self.is_trained = counts & (self.sequence >= len(self.measured.ids))
        self.residual: list[mx.array] = []
        self.fitted: list[Fitted] = []
        self.weights: list[np.ndarray] = []  # a layer: (measured tokens, experts)

    def router(self, layer: int, x: mx.array, experts: int) -> mx.array:
        """The layer's router (experts, hidden); x (tokens, hidden) is its input."""
        if self.gates is not None:
            return mx.array(self.gates[layer])
        places = np.flatnonzero(self.is_trained)
        fitted = fit_router(x[mx.array(places)], self.owner[places], experts)
        self.fitted.append(fitted)
        return mx.array(fitted.rows)

    def all_gates(self) -> Gates:
        """The routers of all layers, given or trained."""
        routed = self.gates
        if routed is None:
            routed = np.stack([fitted.rows for fitted in self.fitted])
        return Gates(routed, self.shared)

    def routing(self) -> Routing:
        """The measurements of the finished run."""
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
    """How a layer with these weights (tokens, experts) routes; owner (tokens,): right experts."""
    first = weights.argmax(axis=1)
    return LayerShares(
        first=(np.bincount(first, minlength=weights.shape[1]) / len(first)).tolist(),
        served=(weights > 0).mean(axis=0).tolist(),
        weight=weights.mean(axis=0).tolist(),
        largest=float(weights.max(axis=1).mean()),
        right=float((first == owner).mean()),
    )


def run_routers(
    mixture: Mixture, runs: Sequence[RouterRun], progress: Progress = no_progress
) -> None:
    """Run the merged model for each gate mode; the runs store their measurements.

    Memory holds one layer's attention weights or one expert's FFN weights in that layer, and the
    hidden states of all tokens.

    Args:
        mixture: the merged model.
        runs: new runs.
        progress: called with experts done and experts in total, over all layers.
    """
    total = mixture.base.config.layers * len(mixture.all_experts)
    for run in runs:
        run.residual = [embed(mixture.base, batch) for batch in run.groups]
    for layer in range(mixture.base.config.layers):
        attention = AttentionLayer(mixture.base, layer)
        passes = [_LayerPass(mixture, run, layer, attention) for run in runs]
        del attention
        if layer + 1 == mixture.base.config.layers:
            break
        for expert in mixture.all_experts:
            ffn = FeedForward([expert.matrix(layer, projection) for projection in PROJECTIONS])
            for each in passes:
                each.add(expert, ffn)
            del ffn
            progress(layer * len(mixture.all_experts) + expert.number + 1, total)
        for each in passes:
            each.finish()
    progress(total, total)


class _LayerPass:
    """One layer of a run: attention and routing first, then one expert after another."""

    def __init__(
        self, mixture: Mixture, run: RouterRun, layer: int, attention: AttentionLayer
    ) -> None:
        self.run, self.shared = run, mixture.shared
        pairs = [attention(x) for x in run.residual]
        groups = run.groups
        self.after = [h for h, _ in pairs]
        self.x = mx.concatenate([unpad(g, x) for g, (_, x) in zip(groups, pairs, strict=True)])
        run.residual = []
        router = run.router(layer, self.x, len(mixture.experts))
        self.weights = routing_weights(np.array(self.x @ router.T), mixture.top_k)
        run.weights.append(self.weights[run.is_measured])
        if run.shared is not None:
            self.shared_gate = mx.sigmoid(self.x @ mx.array(run.shared[layer])[:, None])
        self.y = mx.zeros(self.x.shape)
        mx.eval(self.x, self.y)

    def add(self, expert: Expert, ffn: FeedForward) -> None:
        """Add the expert's weighted output for the tokens that are routed to it."""
        if expert is self.shared:
            self.y = self.y + self.shared_gate * ffn(self.x)
            mx.eval(self.y)
            return
        weights = self.weights[:, expert.number]
        routed = np.flatnonzero(weights)
        if not len(routed):
            return
        places = mx.array(routed)
        self.y[places] += mx.array(weights[routed])[:, None] * ffn(self.x[places])
        mx.eval(self.y)

    def finish(self) -> None:
        """Add the sum of all experts to the residual stream."""
        start = 0
        for batch, h in zip(self.run.groups, self.after, strict=True):
            count = int(batch.lengths.sum())
            self.run.residual.append(h + pad(batch, self.y[start : start + count]))
            start += count
        mx.eval(self.run.residual)


def routing_weights(logits: np.ndarray, k: int) -> np.ndarray:
    """Softmax over the k largest logits of each row; the other weights are 0.

    Of equal logits, the expert with the lower number wins.

    Args:
        logits: (tokens, experts) float32.
        k: number of experts that each token is routed to.

    Returns:
        (tokens, experts) float32.
    """
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    picked = np.take_along_axis(logits, chosen, axis=1)
    picked = np.exp(picked - picked[:, :1])
    weights = np.zeros_like(logits)
    np.put_along_axis(weights, chosen, picked / picked.sum(axis=1, keepdims=True), axis=1)
    return weights
