"""The Outlier model in plain NumPy, written from its description alone.

It shares no code with the package, so that agreement between the two means something. It is for
small models: every position is computed again for every new token.
Shapes: T tokens, H hidden, Ie expert width, E experts, K experts a token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Ternary:
    """One expert projection: trits (out, in) int8; scale of shape (1, 1) or (out, 1)."""

    trits: Array
    scale: Array

    def dense(self, dtype: Any = np.float32) -> Array:
        """scale · trits, (out, in)."""
        return self.scale.astype(dtype) * self.trits.astype(dtype)


@dataclass(frozen=True)
class Experts:
    """The routed half of a MoE layer."""

    router: Array  # (E, H)
    alpha: Array  # (E,)
    gate: list[Ternary]  # each (Ie, H)
    up: list[Ternary]  # each (Ie, H)
    down: list[Ternary]  # each (H, Ie)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `weights` is keyed as in the base's checkpoint, such as
    "self_attn.q_proj.bias" or "self_attn.q_norm.weight", which not every base has; in a MoE layer
    "mlp.*_proj.weight" is the shared FFN."""

    weights: dict[str, Array]
    experts: Experts | None = None


@dataclass(frozen=True)
class Yarn:
    """Fields of a YaRN `rope_scaling`."""

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class Linear:
    """Every angle divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Fields of a `rope_scaling` of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


Scaling = Yarn | Linear | Llama3


@dataclass(frozen=True)
class ReferenceModel:
    """Configuration and weights; `lm_head` is None when the embedding is the head as well."""

    heads: int
    kv_heads: int
    head_dim: int
    top_k: int
    eps: float
    rope_theta: float
    scaling: Scaling | None
    embedding: Array  # (V, H)
    norm: Array  # (H,)
    lm_head: Array | None  # (V, H)
    layers: list[Layer]


@dataclass(frozen=True)
class Routing:
    """What the router of one layer decided, largest probability first."""

    probs: Array  # (T, E)
    indices: Array  # (T, K)
    weights: Array  # (T, K), sum 1, before alpha


@dataclass
class Trace:
    """Everything a forward pass can be compared by."""

    logits: Array  # (T, V)
    hidden: Array  # (layers + 1, T, H): the embeddings, then the residual stream after each layer
    routing: dict[int, Routing] = field(default_factory=dict)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + x.dtype.type(eps)) * weight.astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: Scaling | None) -> tuple[Array, float]:
    """Angle per position of each pair, (head_dim / 2,) float64, and the factor on cos and sin.

    After transformers' `modeling_rope_utils.py`: `_compute_yarn_parameters` (but YaRN's factor on
    cos and sin is that of its authors, also below 1), `_compute_linear_scaling_rope_parameters`,
    `_compute_llama3_parameters`.
    """
    plain = theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    if scaling is None:
        return plain, 1.0
    if isinstance(scaling, Linear):
        return plain / scaling.factor, 1.0
    if isinstance(scaling, Llama3):
        return llama3_frequencies(plain, scaling), 1.0
    return yarn_frequencies(plain, theta, scaling)


def llama3_frequencies(plain: Array, scaling: Llama3) -> Array:
    """Long waves divided by the factor, short ones kept, those between blended."""
    turns = scaling.original_positions * plain / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def yarn_frequencies(plain: Array, theta: float, yarn: Yarn) -> tuple[Array, float]:
    """See `rope_frequencies`."""
    head_dim = 2 * len(plain)

    def correction(rotations: float) -> float:
        span = yarn.original_positions / (2 * math.pi * rotations)
        return head_dim * math.log(span) / (2 * math.log(theta))

    low = max(math.floor(correction(yarn.beta_fast)), 0)
    high: float = min(math.ceil(correction(yarn.beta_slow)), head_dim - 1)
    if high == low:
        high += 0.001
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low), 0, 1)
    factor = yarn.attention_factor
    if factor is None:
        factor = 0.1 * math.log(yarn.factor) + 1
    return plain * (1 - ramp) + plain / yarn.factor * ramp, factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE on half-split pairs: x (heads, T, d), cos and sin (T, d / 2)."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def linear(weights: dict[str, Array], name: str, x: Array) -> Array:
    """x (..., in) times the weight of a module, plus its bias if it has one."""
    y = x @ weights[f"{name}.weight"].astype(x.dtype).T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias.astype(x.dtype)


def attention(model: ReferenceModel, weights: dict[str, Array], x: Array) -> Array:
    """Causal attention of x (T, H); heads are normalised first where the layer has such norms,
    as in transformers' `Qwen3Attention`."""
    tokens = len(x)

    def project(name: str, heads: int) -> Array:  # (heads, T, d)
        y = linear(weights, f"self_attn.{name}_proj", x).reshape(tokens, heads, model.head_dim)
        norm = weights.get(f"self_attn.{name}_norm.weight")
        if norm is not None:
            y = rms_norm(y, norm, model.eps)
        return y.transpose(1, 0, 2)

    frequencies, factor = rope_frequencies(model.head_dim, model.rope_theta, model.scaling)
    angles = np.arange(tokens)[:, None] * frequencies
    cos, sin = ((factor * f(angles)).astype(x.dtype) for f in (np.cos, np.sin))
    q = rotate(project("q", model.heads), cos, sin)
    k = rotate(project("k", model.kv_heads), cos, sin)
    v = project("v", model.kv_heads)
    group = model.heads // model.kv_heads
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    scores = q @ k.transpose(0, 2, 1) * x.dtype.type(model.head_dim**-0.5)
    scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    mixed = (softmax(scores) @ v).transpose(1, 0, 2).reshape(tokens, -1)
    return linear(weights, "self_attn.o_proj", mixed)


def feed_forward(weights: dict[str, Array], h: Array) -> Array:
    """The base's own FFN of h (T, H)."""
    gate, up = (linear(weights, f"mlp.{part}_proj", h) for part in ("gate", "up"))
    return linear(weights, "mlp.down_proj", silu(gate) * up)


def swiglu(h: Array, gate: Array, up: Array, down: Array) -> Array:
    gate, up, down = (w.astype(h.dtype) for w in (gate, up, down))
    return (silu(h @ gate.T) * (h @ up.T)) @ down.T


def route(logits: Array, top_k: int) -> Routing:
    """The k largest of each row of logits (T, E), ties to the lower index, NaN last; the weights
    are softmax over them."""
    indices = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(logits, indices, axis=-1)
    return Routing(softmax(logits), indices, softmax(chosen))


def routed(experts: Experts, h: Array, routing: Routing) -> Array:
    """Σ over the chosen experts of w · alpha · expert(h), (T, H)."""
    y = np.zeros_like(h)
    for e, alpha in enumerate(experts.alpha.astype(h.dtype)):
        rows, slots = np.nonzero(routing.indices == e)
        if len(rows):
            dense = (part[e].dense(h.dtype) for part in (experts.gate, experts.up, experts.down))
            y[rows] += routing.weights[rows, slots, None] * alpha * swiglu(h[rows], *dense)
    return y


def trace(model: ReferenceModel, tokens: Sequence[int], dtype: Any = np.float32) -> Trace:
    """Run tokens (T,) and keep every residual stream and routing decision, in `dtype`."""
    x = model.embedding[np.asarray(tokens)].astype(dtype)
    hidden, routing = [x], {}
    for n, layer in enumerate(model.layers):
        w = layer.weights
        x = x + attention(model, w, rms_norm(x, w["input_layernorm.weight"], model.eps))
        h = rms_norm(x, w["post_attention_layernorm.weight"], model.eps)
        y = feed_forward(w, h)
        if layer.experts is not None:
            routing[n] = route(h @ layer.experts.router.astype(dtype).T, model.top_k)
            y = y + routed(layer.experts, h, routing[n])
        x = x + y
        hidden.append(x)
    head = model.embedding if model.lm_head is None else model.lm_head
    logits = rms_norm(x, model.norm, model.eps) @ head.astype(dtype).T
    return Trace(logits, np.stack(hidden), routing)


def forward(model: ReferenceModel, tokens: Sequence[int], dtype: Any = np.float32) -> Array:
    """Logits (T, V) of tokens (T,)."""
    return trace(model, tokens, dtype).logits


def greedy(
    model: ReferenceModel, tokens: Sequence[int], n: int, dtype: Any = np.float32
) -> tuple[list[int], Array]:
    """The next n tokens by argmax, and the logits (n, V) that each was picked from."""
    sequence, picked = list(tokens), []
    for _ in range(n):
        picked.append(forward(model, sequence, dtype)[-1])
        sequence.append(int(picked[-1].argmax()))
    return sequence[len(tokens) :], np.stack(picked)


def with_alphas(model: ReferenceModel, change: Callable[[int, Array], Array]) -> ReferenceModel:
    """The model with `change(layer, alpha)` (E,) in the place of every MoE layer's alpha."""
    layers = [
        replace(x, experts=replace(x.experts, alpha=change(n, x.experts.alpha))) if x.experts else x
        for n, x in enumerate(model.layers)
    ]
    return replace(model, layers=layers)


def gaps(model: ReferenceModel, tokens: Sequence[int], n: int) -> tuple[float, float]:
    """The smallest lead of a greedy token in logits, and of a chosen expert in probability.

    What another implementation must be better than before it has to agree on tokens and experts.
    """
    continuation, logits = greedy(model, tokens, n)
    best = np.sort(logits, axis=-1)
    lead = np.inf
    for routing in trace(model, [*tokens, *continuation]).routing.values():
        probs = -np.sort(-routing.probs, axis=-1)
        if probs.shape[1] > model.top_k:
            lead = min(lead, float((probs[:, model.top_k - 1] - probs[:, model.top_k]).min()))
    return float((best[:, -1] - best[:, -2]).min()), lead
