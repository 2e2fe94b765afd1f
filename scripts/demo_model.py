"""The demo's models in PyTorch: a Qwen2, Llama or Qwen3 decoder, ternary experts, and MLX's int4.

Weights are a dict from the checkpoint's tensor names to tensors, both for training and evaluation.
Experts of a layer are stacked: ``model.layers.N.mlp.experts.gate`` and ``up`` are
``(experts, expert_width, hidden)``, ``down`` is ``(experts, hidden, expert_width)``.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Dimensions of the pair."""

    vocab: int
    hidden: int = 256
    width: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    experts: int = 6
    top_k: int = 2
    expert_width: int = 256
    moe_layers: tuple[int, ...] = (1, 2, 3)
    theta: float = 10000.0
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


def init_base(shape: Shape, seed: int) -> Weights:
    """Random base weights, float32; without experts, they are a Llama's and have no biases."""
    rng = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=rng) * gain * columns**-0.5

    hidden, width, kv = shape.hidden, shape.width, shape.kv_heads * shape.head_dim
    depth_gain = (2 * shape.layers) ** -0.5
    weights = {"model.embed_tokens.weight": normal(shape.vocab, hidden, 0.5)}
    for n in range(shape.layers):
        layer = f"model.layers.{n}."
        weights |= {
            layer + "input_layernorm.weight": torch.ones(hidden),
            layer + "self_attn.q_proj.weight": normal(hidden, hidden),
            layer + "self_attn.q_proj.bias": torch.zeros(hidden),
            layer + "self_attn.k_proj.weight": normal(kv, hidden),
            layer + "self_attn.k_proj.bias": torch.zeros(kv),
            layer + "self_attn.v_proj.weight": normal(kv, hidden),
            layer + "self_attn.v_proj.bias": torch.zeros(kv),
            layer + "self_attn.o_proj.weight": normal(hidden, hidden, depth_gain),
            layer + "post_attention_layernorm.weight": torch.ones(hidden),
            layer + "mlp.gate_proj.weight": normal(width, hidden),
            layer + "mlp.up_proj.weight": normal(width, hidden),
            layer + "mlp.down_proj.weight": normal(hidden, width, depth_gain),
        }
    if not shape.moe_layers:
        weights = {name: weight for name, weight in weights.items() if not name.endswith("bias")}
    return weights | {"model.norm.weight": torch.ones(hidden)}


def straight_through(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The value of ``rounded`` with the gradient of ``exact`` (straight-through estimation)."""
    return exact + (rounded - exact).detach()


def int4(matrix: torch.Tensor, group: int = 64) -> torch.Tensor:
    """``matrix`` ``(out, in)`` after MLX's affine quantization to 4 bits and dequantization.

    Like ``mx.quantize``: each group has 15 steps, which begin at its end of larger magnitude; the
    step is adjusted so that one code means zero.
    """
    groups = matrix.reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-7)
    from_low = low.abs() > high.abs()
    step = torch.where(from_low, step, -step)
    edge = torch.where(from_low, low, high)
    codes_to_zero = (edge / step).round()
    step = torch.where(codes_to_zero != 0, edge / codes_to_zero, step)
    bias = torch.where(codes_to_zero != 0, edge, torch.zeros_like(edge))
    codes = ((groups - bias) / step).round().clamp(0, 15)
    return (codes * step + bias).reshape(matrix.shape)


def int4_base(weights: Weights) -> Weights:
    """``weights`` with every base matrix, including the embedding, rounded to int4."""
    return {
        name: straight_through(weight, int4(weight.detach()))
        if weight.ndim == 2 and "router" not in name
        else weight
        for name, weight in weights.items()
    }


def _rope(shape: Shape, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), shape.theta**-half)
    return torch.cat([angles.cos()] * 2, dim=1), torch.cat([angles.sin()] * 2, dim=1)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _attention(x: torch.Tensor, weights: Weights, prefix: str, shape: Shape) -> torch.Tensor:
    batch, length, _ = x.shape
    cos, sin = _rope(shape, length)

    def project(name: str) -> torch.Tensor:
        y = F.linear(x, weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias"))
        y = y.view(batch, length, -1, shape.head_dim)
        norm = weights.get(f"{prefix}{name.removesuffix('_proj')}_norm.weight")  # in Qwen3
        return (y if norm is None else _norm(y, norm, shape.eps)).transpose(1, 2)

    def rotate(y: torch.Tensor) -> torch.Tensor:
        first, second = y.chunk(2, dim=-1)
        return y * cos + torch.cat((-second, first), dim=-1) * sin

    repeats = shape.heads // shape.kv_heads
    keys = rotate(project("k_proj")).repeat_interleave(repeats, dim=1)
    values = project("v_proj").repeat_interleave(repeats, dim=1)
    y = F.scaled_dot_product_attention(rotate(project("q_proj")), keys, values, is_causal=True)
    return F.linear(y.transpose(1, 2).reshape(x.shape), weights[f"{prefix}o_proj.weight"])


def _swiglu(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen experts and their renormalised weights, ``(tokens, top_k)`` each."""
    probs, chosen = logits.softmax(-1).topk(top_k, dim=-1)
    return chosen, probs / probs.sum(-1, keepdim=True)


def _routed(
    x: torch.Tensor, weights: Weights, mlp: str, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of the routed experts for ``x`` ``(tokens, hidden)``, and the router's logits."""
    logits = F.linear(x, weights[mlp + "router.weight"])
    chosen, shares = route(logits, shape.top_k)
    shares = shares * weights[mlp + "alpha_values"][chosen]
    y = torch.zeros_like(x)
    for expert in range(shape.experts):
        tokens, slots = torch.nonzero(chosen == expert, as_tuple=True)
        parts = (weights[f"{mlp}experts.{part}"][expert] for part in ("gate", "up", "down"))
        out = _swiglu(x[tokens], *parts) * shares[tokens, slots, None]
        y = y.index_add(0, tokens, out.to(y.dtype))
    return y, logits


def forward(
    weights: Weights, shape: Shape, tokens: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits ``(batch, length, vocab)`` and each MoE layer's router logits ``(tokens, experts)``.

    A layer is a MoE layer if ``weights`` has a router for it; so the base can run alone.
    """
    embedding = weights["model.embed_tokens.weight"]
    x = F.embedding(tokens, embedding)
    routers = []
    for n in range(shape.layers):
        layer = f"model.layers.{n}."
        h = _norm(x, weights[layer + "input_layernorm.weight"], shape.eps)
        x = x + _attention(h, weights, layer + "self_attn.", shape)
        h = _norm(x, weights[layer + "post_attention_layernorm.weight"], shape.eps)
        mlp = layer + "mlp."
        y = _swiglu(h, *(weights[f"{mlp}{part}_proj.weight"] for part in ("gate", "up", "down")))
        if mlp + "router.weight" in weights:
            routed, logits = _routed(h.reshape(-1, shape.hidden), weights, mlp, shape)
            y = y + routed.view_as(y)
            routers.append(logits)
        x = x + y
    return F.linear(_norm(x, weights["model.norm.weight"], shape.eps), embedding), routers


def generate(
    weights: Weights,
    shape: Shape,
    prompt: list[int],
    end: int,
    temperature: float = 0.0,
    limit: int = 160,
    seed: int = 0,
) -> list[int]:
    """``prompt`` and the generated tokens up to the token ``end``; greedy at temperature 0."""
    rng = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) < limit:
            logits = forward(weights, shape, torch.tensor([tokens]))[0][0, -1]
            if temperature:
                probs = (logits / temperature).softmax(-1)
                token = int(torch.multinomial(probs, 1, generator=rng))
            else:
                token = int(logits.argmax())
            if token == end:
                break
            tokens.append(token)
    return tokens
