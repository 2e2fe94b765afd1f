"""Small ternary models in PyTorch, trained through their rounding: a Qwen3, and a rotated Qwen3.5.

Weights are dicts as in `demo_model`. Latent float weights are rounded to trits times scales
whenever they are used; gradients pass straight through.
"""

from dataclasses import dataclass
from functools import cache

import torch
from demo_model import Shape, Weights, init_base, straight_through
from torch.nn import functional as F

GROUP = 128  # weights of a row that share a scale
BLOCK = 512  # columns that are rotated together


def ternarise(latent: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Trits, and their scales: the mean magnitude of a group of columns, or of the whole matrix.

    Args:
        latent: (out, in).
        group: columns of a group; 0: one scale for the matrix.

    Returns:
        Trits (out, in / group, group) and scales (out, in / group, 1), which float16 holds
        exactly; or trits (out, in) and a scale (1, 1), which bfloat16 holds, too.
    """
    grouped = latent.unflatten(1, (-1, group)) if group else latent
    scales = grouped.abs().mean(dim=-1 if group else None, keepdim=True).clamp_min(1e-4)
    scales = (scales if group else scales.reshape(1, 1).bfloat16().float()).half().float()
    return (grouped / scales).round().clamp(-1, 1), scales


def is_ternary(name: str, weight: torch.Tensor, group: int) -> bool:
    """Whether a weight is stored as trits: with one scale a matrix, embeddings are not."""
    small = "in_proj_a" in name or "in_proj_b" in name
    return weight.ndim == 2 and not small and (group > 0 or "embed" not in name)


def rounded(weights: Weights, group: int) -> Weights:
    """``weights`` with trits times scales in place of the latent matrices."""
    done = dict(weights)
    for name, latent in weights.items():
        if is_ternary(name, latent, group):
            trits, scales = ternarise(latent.detach(), group)
            done[name] = straight_through(latent, (trits * scales).reshape(latent.shape))
    return done


def init_qwen3(shape: Shape, seed: int) -> Weights:
    """Random weights of a Qwen3, float32."""
    weights = init_base(shape, seed)
    for n in range(shape.layers):
        for part in "qk":
            weights[f"model.layers.{n}.self_attn.{part}_norm.weight"] = torch.ones(shape.head_dim)
    return weights


@cache
def hadamard(size: int) -> torch.Tensor:
    """The normalised Walsh-Hadamard matrix, (size, size)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


def unrotated(weights: Weights, signs: torch.Tensor) -> Weights:
    """``weights`` with W H diag(signs) in place of each rotated W."""
    turn = hadamard(BLOCK) * signs
    return {name: w @ turn if is_rotated(name, w) else w for name, w in weights.items()}


def is_rotated(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight is ternary after a rotation; narrow ones are not rotated."""
    return is_ternary(name, weight, GROUP) and weight.shape[1] == BLOCK


@dataclass(frozen=True)
class Hybrid:
    """Dimensions of a Qwen3.5: layers of linear attention, and a last one of full attention.

    ``heads``, ``kv_heads`` and ``head_dim`` are those of full attention. A linear layer has one
    head of queries and keys.
    """

    vocab: int
    hidden: int = 512
    width: int = 512
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    value_heads: int = 2  # of linear attention
    key_dim: int = 64
    value_dim: int = 64
    kernel: int = 4
    turned: float = 0.25  # share of a head that RoPE turns
    theta: float = 10000.0
    eps: float = 1e-6

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_heads * self.value_dim


def init_hybrid(shape: Hybrid, seed: int) -> Weights:
    """Random weights, float32."""
    rng = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=rng) * gain * columns**-0.5

    hidden, values = shape.hidden, shape.value_heads * shape.value_dim
    weights = {"model.embed_tokens.weight": normal(shape.vocab, hidden, 0.5)}
    for n in range(shape.layers):
        layer = f"model.layers.{n}."
        weights |= {
            layer + "input_layernorm.weight": torch.ones(hidden),
            layer + "post_attention_layernorm.weight": torch.ones(hidden),
            layer + "mlp.gate_proj.weight": normal(shape.width, hidden),
            layer + "mlp.up_proj.weight": normal(shape.width, hidden),
            layer + "mlp.down_proj.weight": normal(hidden, shape.width, 0.5),
        }
        if n == shape.layers - 1:
            attention, wide = layer + "self_attn.", shape.heads * shape.head_dim
            narrow = shape.kv_heads * shape.head_dim
            weights |= {
                attention + "q_proj.weight": normal(2 * wide, hidden),  # with the gates
                attention + "k_proj.weight": normal(narrow, hidden),
                attention + "v_proj.weight": normal(narrow, hidden),
                attention + "o_proj.weight": normal(hidden, wide, 0.5),
                attention + "q_norm.weight": torch.ones(shape.head_dim),
                attention + "k_norm.weight": torch.ones(shape.head_dim),
            }
            continue
        linear = layer + "linear_attn."
        weights |= {
            linear + "in_proj_qkv.weight": normal(shape.channels, hidden),
            linear + "in_proj_z.weight": normal(values, hidden),
            linear + "in_proj_a.weight": normal(shape.value_heads, hidden),
            linear + "in_proj_b.weight": normal(shape.value_heads, hidden),
            linear + "out_proj.weight": normal(hidden, values, 0.5),
            linear + "conv1d.weight": torch.randn(shape.channels, 4, 1, generator=rng) * 0.5,
            linear + "norm.weight": torch.ones(shape.value_dim),
            linear + "A_log": torch.linspace(-2.0, 1.0, shape.value_heads),
            linear + "dt_bias": torch.zeros(shape.value_heads) - 2,
        }
    return weights | {"model.norm.weight": torch.ones(hidden)}


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _full_attention(x: torch.Tensor, weights: Weights, prefix: str, s: Hybrid) -> torch.Tensor:
    batch, length, _ = x.shape
    size = int(s.head_dim * s.turned)
    powers = torch.arange(0, size, 2, dtype=torch.float32) / size
    angles = torch.outer(torch.arange(length, dtype=torch.float32), s.theta**-powers)
    cos, sin = angles.cos(), angles.sin()

    def project(name: str, width: int) -> torch.Tensor:
        return F.linear(x, weights[f"{prefix}{name}.weight"]).view(batch, length, -1, width)

    def turn(y: torch.Tensor, norm: str) -> torch.Tensor:
        y = _norm(y, weights[f"{prefix}{norm}.weight"], s.eps).transpose(1, 2)
        first, second, rest = y.split([size // 2, size // 2, s.head_dim - size], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    queries, gates = project("q_proj", 2 * s.head_dim).chunk(2, dim=-1)
    repeats = s.heads // s.kv_heads
    keys = turn(project("k_proj", s.head_dim), "k_norm").repeat_interleave(repeats, dim=1)
    values = project("v_proj", s.head_dim).transpose(1, 2).repeat_interleave(repeats, dim=1)
    y = F.scaled_dot_product_attention(
        turn(queries, "q_norm"), keys.to(queries.dtype), values.to(queries.dtype), is_causal=True
    )
    y = y.transpose(1, 2) * gates.sigmoid()
    return F.linear(y.reshape(batch, length, -1), weights[prefix + "o_proj.weight"])


def _linear_attention(x: torch.Tensor, weights: Weights, prefix: str, s: Hybrid) -> torch.Tensor:
    """The gated delta rule, one token after another."""
    batch, length, _ = x.shape
    mixed = F.linear(x, weights[prefix + "in_proj_qkv.weight"]).float().transpose(1, 2)
    kernels = weights[prefix + "conv1d.weight"].transpose(1, 2)
    mixed = F.conv1d(F.pad(mixed, (s.kernel - 1, 0)), kernels, groups=s.channels)
    sizes = [s.key_dim, s.key_dim, s.value_heads * s.value_dim]
    q, k, v = F.silu(mixed).transpose(1, 2).split(sizes, dim=-1)
    q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    q = q * s.key_dim**-0.5
    v = v.reshape(batch, length, s.value_heads, s.value_dim)
    a, b = (F.linear(x, weights[f"{prefix}in_proj_{part}.weight"]).float() for part in "ab")
    steps = F.softplus(a + weights[prefix + "dt_bias"])
    kept = torch.exp(-weights[prefix + "A_log"].exp() * steps)
    rates = b.sigmoid()
    state = torch.zeros(batch, s.value_heads, s.value_dim, s.key_dim)
    found = []
    for t in range(length):
        state = state * kept[:, t, :, None, None]
        key, query = k[:, t, None, :, None], q[:, t, None, :, None]
        missing = v[:, t, ..., None] - state @ key
        state = state + rates[:, t, :, None, None] * missing * key.mT
        found.append((state @ query).squeeze(-1))
    y = _norm(torch.stack(found, dim=1), weights[prefix + "norm.weight"], s.eps)
    z = F.linear(x, weights[prefix + "in_proj_z.weight"]).float().view_as(y)
    y = (y * F.silu(z)).reshape(batch, length, -1)
    return F.linear(y, weights[prefix + "out_proj.weight"])


def hybrid_logits(weights: Weights, shape: Hybrid, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (batch, length, vocab) of unrotated weights."""
    embedding = weights["model.embed_tokens.weight"]
    x = F.embedding(tokens, embedding)
    for n in range(shape.layers):
        layer = f"model.layers.{n}."
        h = _norm(x, weights[layer + "input_layernorm.weight"], shape.eps)
        if n == shape.layers - 1:
            x = x + _full_attention(h, weights, layer + "self_attn.", shape)
        else:
            x = x + _linear_attention(h, weights, layer + "linear_attn.", shape)
        h = _norm(x, weights[layer + "post_attention_layernorm.weight"], shape.eps)
        gate, up, down = (
            weights[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        x = x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
    return F.linear(_norm(x, weights["model.norm.weight"], shape.eps), embedding)
