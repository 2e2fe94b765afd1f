"""Synthetic AutoAWQ checkpoints, packed by the format's formulas and by nothing of the project's.

weight[o, i] = (q[i, o] - z[i // g, o]) * s[i // g, o], and word c of a row holds columns 8c to
8c + 7, column 8c + j in nibble N[j], N = (0, 4, 1, 5, 2, 6, 3, 7); zeros are packed alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.builders import write_tokenizer
from tests.tensor_file import Stored, stored, write_shards

Array = np.ndarray
N = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Awq:
    """What to write: the model's dimensions, and how its checkpoint looks."""

    family: str = "mixtral"
    hidden: int = 64
    intermediate: int = 96
    vocab: int = 160
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    experts: int = 2
    group: int = 32
    zero_point: bool = True
    tied: bool = False
    old_config: bool = False  # quant_config.json instead of config.json's quantization_config
    shards: int = 1
    theta: float = 1e4
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Built:
    """What was written, and float32 values by the names that an unquantized model has."""

    path: Path
    weights: dict[str, Array]
    scales: dict[str, Array]  # (in / g, out) float16 by module
    zeros: dict[str, Array]  # (in / g, out)


def pack(values: Array) -> Array:
    """int32 (rows, out / 8) of values (rows, out) from 0 to 15."""
    rows, out = values.shape
    words = np.zeros((rows, out // 8), np.uint32)
    for c in range(out // 8):
        for j in range(8):
            words[:, c] |= values[:, 8 * c + j].astype(np.uint32) << np.uint32(4 * N[j])
    return words.view(np.int32)


def dequantized(q: Array, z: Array, s: Array) -> Array:
    """float32 (out, in); exact, since a product has at most 15 significant bits."""
    group = len(q) // len(s)
    z, s = np.repeat(z, group, 0), np.repeat(s.astype(np.float64), group, 0)
    return ((q.astype(np.float64) - z) * s).T.astype(np.float32)


def write_awq(path: Path, case: Awq | None = None) -> Built:
    """Write a checkpoint folder with a tokenizer."""
    case = case or Awq()
    path.mkdir(parents=True)
    random = np.random.default_rng(case.seed)
    built = Built(path, {}, {}, {})
    tensors: dict[str, Stored] = {}
    for name, shape in _linear(case).items():
        _add_quantized(tensors, built, case, random, name, shape)
    for name, value in _floats(case, random).items():
        tensors[name] = stored(value, "F16")
        built.weights[name] = tensors[name].array().astype(np.float32)
    for name in _biased(case):
        value = random.normal(0, 0.3, _linear(case)[name][0])
        tensors[f"{name}.bias"] = stored(value, "F16")
        built.weights[f"{name}.bias"] = tensors[f"{name}.bias"].array().astype(np.float32)
    write_shards(path, tensors, case.shards)
    _write_configs(path, case)
    write_tokenizer(path, case.vocab)
    return built


def _add_quantized(
    tensors: dict[str, Stored],
    built: Built,
    case: Awq,
    random: np.random.Generator,
    name: str,
    shape: tuple[int, int],
) -> None:
    out, width = shape
    groups = 1 if case.group == -1 else width // case.group
    q = random.integers(0, 16, (width, out))
    z = random.integers(0, 16, (groups, out)) if case.zero_point else np.full((groups, out), 8)
    # A spread that gives activations of about 1: q - z has a deviation of 6.5.
    s = (random.uniform(0.5, 1.5, (groups, out)) / (6.5 * width**0.5)).astype(np.float16)
    tensors[f"{name}.qweight"] = stored(pack(q))
    if case.zero_point:
        tensors[f"{name}.qzeros"] = stored(pack(z))
    tensors[f"{name}.scales"] = stored(s)
    built.weights[f"{name}.weight"] = dequantized(q, z, s)
    built.scales[name], built.zeros[name] = s, z


def _linear(case: Awq) -> dict[str, tuple[int, int]]:
    """Names and (out, in) of what AutoAWQ quantizes."""
    hidden, width = case.hidden, case.intermediate
    head = case.config.get("head_dim", hidden // case.heads)
    queries, keys = case.heads * head, case.kv_heads * head
    sizes: dict[str, tuple[int, int]] = {}
    for n in range(case.layers):
        prefix = f"model.layers.{n}"
        sizes |= {
            f"{prefix}.self_attn.q_proj": (queries, hidden),
            f"{prefix}.self_attn.k_proj": (keys, hidden),
            f"{prefix}.self_attn.v_proj": (keys, hidden),
            f"{prefix}.self_attn.o_proj": (hidden, queries),
        }
        if case.family != "mixtral":
            sizes |= {
                f"{prefix}.mlp.gate_proj": (width, hidden),
                f"{prefix}.mlp.up_proj": (width, hidden),
                f"{prefix}.mlp.down_proj": (hidden, width),
            }
            continue
        for e in range(case.experts):
            moe = f"{prefix}.block_sparse_moe.experts.{e}"
            sizes |= {
                f"{moe}.w1": (width, hidden),
                f"{moe}.w2": (hidden, width),
                f"{moe}.w3": (width, hidden),
            }
    return sizes


def _floats(case: Awq, random: np.random.Generator) -> dict[str, Array]:
    """What stays in float16: embeddings, head, norms, routers."""
    hidden = case.hidden
    values = {"model.embed_tokens.weight": random.normal(0, 1, (case.vocab, hidden))}
    for n in range(case.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            values[f"model.layers.{n}.{name}.weight"] = random.uniform(0.5, 1.5, hidden)
        if case.family == "qwen3":
            for name in ("q_norm", "k_norm"):
                norm = random.uniform(0.5, 1.5, case.config["head_dim"])
                values[f"model.layers.{n}.self_attn.{name}.weight"] = norm
        if case.family == "mixtral":
            gate = random.normal(0, hidden**-0.5, (case.experts, hidden))
            values[f"model.layers.{n}.block_sparse_moe.gate.weight"] = gate
    values["model.norm.weight"] = random.uniform(0.5, 1.5, hidden)
    if not case.tied:
        values["lm_head.weight"] = random.normal(0, hidden**-0.5, (case.vocab, hidden))
    return values


def _biased(case: Awq) -> list[str]:
    if case.family != "qwen2":
        return []
    return [f"model.layers.{n}.self_attn.{p}_proj" for n in range(case.layers) for p in "qkv"]


def model_config(case: Awq) -> dict[str, Any]:
    """The config of the unquantized model."""
    config = {
        "architectures": [f"{case.family.capitalize()}ForCausalLM"],
        "model_type": case.family,
        "hidden_size": case.hidden,
        "intermediate_size": case.intermediate,
        "vocab_size": case.vocab,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": case.theta,
        "max_position_embeddings": 256,
        "tie_word_embeddings": case.tied,
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "eos_token_id": 0,
    }
    if case.family == "mixtral":
        config |= {"num_local_experts": case.experts, "num_experts_per_tok": min(2, case.experts)}
    return config | case.config


def _write_configs(path: Path, case: Awq) -> None:
    config = model_config(case)
    settings: dict[str, Any] = {
        "zero_point": case.zero_point,
        "version": "GEMM" if case.old_config else "gemm",
    }
    if case.old_config:
        settings |= {"w_bit": 4, "q_group_size": case.group}
        (path / "quant_config.json").write_text(json.dumps(settings))
    else:
        more = {"bits": 4, "group_size": case.group, "quant_method": "awq"}
        skip = {"modules_to_not_convert": ["gate"] if case.family == "mixtral" else None}
        config["quantization_config"] = settings | more | skip
    (path / "config.json").write_text(json.dumps(config))
