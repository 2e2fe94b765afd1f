"""Models with ternary weights in plain NumPy: Qwen2, Qwen3, Llama, BitNet and Qwen3.5.

Written from the models' descriptions; it shares no code with the package. Rotated layers are not
rotated here: their weights are multiplied out, W = (trits * scales) H diag(signs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.reference import Array, linear, rms_norm, rotate, silu, softmax

Weights = Mapping[str, Array]


def hadamard(size: int) -> Array:
    """The normalised Walsh-Hadamard matrix: (-1)^popcount(i & j) / sqrt(size)."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / size**0.5


def unrotated(weight: Array, block: int, signs: Array) -> Array:
    """The weights (out, in) whose product with x is that of rotated rows with the rotated x."""
    blocks = weight.reshape(len(weight), -1, block) @ hadamard(block)
    result: Array = blocks.reshape(weight.shape) * signs
    return result


def logits(config: Mapping[str, Any], weights: Weights, tokens: Sequence[int]) -> Array:
    """Logits (T, V) of tokens (T,), float64.

    Args:
        config: config.json, with the text model's fields under `text_config` if it has them.
        weights: by name in mlx-lm's model, float64, unrotated.
        tokens: numbers of tokens.
    """
    text = {**config, **config.get("text_config", {})}
    root = "language_model." if "text_config" in config else ""
    w = {name.removeprefix(root): value for name, value in weights.items()}
    eps = text["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][np.asarray(tokens)]
    for number in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        own = {n.removeprefix(prefix): value for n, value in w.items() if n.startswith(prefix)}
        h = rms_norm(x, own["input_layernorm.weight"], eps)
        if "linear_attn.A_log" in own:
            x = x + delta_net(text, own, h)
        else:
            x = x + full_attention(text, own, h)
        x = x + feed_forward(text, own, rms_norm(x, own["post_attention_layernorm.weight"], eps))
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


def greedy(config: Mapping[str, Any], weights: Weights, tokens: Sequence[int], n: int) -> list[int]:
    """The next n tokens by argmax."""
    sequence = list(tokens)
    for _ in range(n):
        sequence.append(int(logits(config, weights, sequence)[-1].argmax()))
    return sequence[len(tokens) :]


def feed_forward(text: Mapping[str, Any], w: dict[str, Array], h: Array) -> Array:
    """down(act(gate) * up); BitNet normalises before down, and squares ReLU."""
    gate, up = (linear(w, f"mlp.{part}_proj", h) for part in ("gate", "up"))
    squared = text["model_type"] == "bitnet" and text.get("hidden_act") != "silu"
    y = (np.maximum(gate, 0) ** 2 if squared else silu(gate)) * up
    if "mlp.ffn_sub_norm.weight" in w:
        y = rms_norm(y, w["mlp.ffn_sub_norm.weight"], text["rms_norm_eps"])
    return linear(w, "mlp.down_proj", y)


def full_attention(text: Mapping[str, Any], w: dict[str, Array], x: Array) -> Array:
    """Causal attention of x (T, H); in Qwen3.5, queries come with gates of the output."""
    tokens, eps = len(x), text["rms_norm_eps"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    width = text.get("head_dim") or text["hidden_size"] // heads
    gated = "linear_num_value_heads" in text
    q, k, v = (
        linear(w, f"self_attn.{name}_proj", x).reshape(tokens, -1, n)
        for name, n in zip("qkv", ((1 + gated) * width, width, width), strict=True)
    )
    q, gate = q[..., :width], q[..., width:]
    if "self_attn.q_norm.weight" in w:
        q, k = (rms_norm(a, w[f"self_attn.{n}_norm.weight"], eps) for a, n in ((q, "q"), (k, "k")))
    rope = text.get("rope_parameters") or {}
    turned = int(width * rope.get("partial_rotary_factor", 1.0))
    theta: float = rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"]
    angles = np.arange(tokens)[:, None] * theta ** (-2.0 * np.arange(turned // 2) / turned)
    q, k, v = (a.transpose(1, 0, 2) for a in (q, k, v))

    def with_positions(a: Array) -> Array:
        part = rotate(a[..., :turned], np.cos(angles), np.sin(angles))
        return np.concatenate([part, a[..., turned:]], axis=-1)

    q, k = with_positions(q), with_positions(k)
    k, v = (np.repeat(a, heads // kv_heads, axis=0) for a in (k, v))
    scores = np.where(np.tri(tokens, dtype=bool), q @ k.transpose(0, 2, 1) * width**-0.5, -np.inf)
    y = (softmax(scores) @ v).transpose(1, 0, 2).reshape(tokens, -1)
    if gated:
        y = y / (1 + np.exp(-gate.reshape(tokens, -1)))
    if "self_attn.attn_sub_norm.weight" in w:
        y = rms_norm(y, w["self_attn.attn_sub_norm.weight"], eps)
    return linear(w, "self_attn.o_proj", y)


def delta_net(text: Mapping[str, Any], w: dict[str, Array], x: Array) -> Array:
    """The gated delta net of Qwen3.5 on x (T, H), one token after the other."""
    tokens, eps = len(x), text["rms_norm_eps"]
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    dk, dv = text["linear_key_head_dim"], text["linear_value_head_dim"]
    kernel = w["linear_attn.conv1d.weight"][..., 0]  # (channels, taps)
    mixed = linear(w, "linear_attn.in_proj_qkv", x)
    padded = np.concatenate([np.zeros((kernel.shape[1] - 1, mixed.shape[1])), mixed])
    taps = np.stack([padded[n : n + tokens] for n in range(kernel.shape[1])], axis=-1)
    mixed = silu((taps * kernel).sum(axis=-1))
    q, k, v = np.split(mixed, [keys * dk, 2 * keys * dk], axis=-1)

    def unit(a: Array) -> Array:
        a = a.reshape(tokens, keys, dk)
        a = a / np.sqrt((a * a).sum(axis=-1, keepdims=True) + 1e-6)
        return np.repeat(a, values // keys, axis=1)  # a key head for several value heads

    q, k, v = unit(q) * dk**-0.5, unit(k), v.reshape(tokens, values, dv)
    step = np.log1p(np.exp(linear(w, "linear_attn.in_proj_a", x) + w["linear_attn.dt_bias"]))
    decay = np.exp(-np.exp(w["linear_attn.A_log"]) * step)
    beta = 1 / (1 + np.exp(-linear(w, "linear_attn.in_proj_b", x)))
    state, out = np.zeros((values, dv, dk)), np.zeros((tokens, values, dv))
    for t in range(tokens):
        state = decay[t][:, None, None] * state
        delta = beta[t][:, None] * (v[t] - np.einsum("hvk,hk->hv", state, k[t]))
        state = state + delta[..., None] * k[t][:, None, :]
        out[t] = np.einsum("hvk,hk->hv", state, q[t])
    z = linear(w, "linear_attn.in_proj_z", x).reshape(out.shape)
    y = rms_norm(out, w["linear_attn.norm.weight"], eps) * silu(z)
    return linear(w, "linear_attn.out_proj", y.reshape(tokens, -1))
