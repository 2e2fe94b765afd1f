"""Overlays read into the reference model: real (V1/V2), V3.2 and per-file forms, good files only.

As independent of the package as tests/reference.py, and for the same reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference import (
    Array,
    Experts,
    Layer,
    Linear,
    Llama3,
    ReferenceModel,
    Scaling,
    Ternary,
    Yarn,
)
from tests.tensor_file import read_arrays


def _first(config: dict[str, Any], *names: str, default: Any = None) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), default)


def read_scaling(config: dict[str, Any]) -> Scaling | None:
    """How positions are scaled, from `rope_parameters` or `rope_scaling`; None where not."""
    rope = _first(config, "rope_parameters", "rope_scaling", default={})
    kind = _first(rope, "rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(rope["factor"])
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        return Llama3(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    assert kind == "yarn", kind
    return Yarn(
        rope["factor"],
        original,
        rope.get("beta_fast", 32.0),
        rope.get("beta_slow", 1.0),
        rope.get("attention_factor"),
    )


def read_tensors(folder: Path) -> dict[str, Array]:
    """Every tensor of a folder under V3.2's names, whatever the form's own names are."""
    tensors: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_arrays(path)
    for path in sorted(folder.glob("experts/*.safetensors")):
        layer, expert = (int(digits) for digits in re.findall(r"\d+", path.stem))
        prefix = f"model.layers.{layer}.mlp.experts.{expert}."
        tensors |= {prefix + key: value for key, value in read_arrays(path).items()}
    renames = (
        (r"^base\.", ""),
        (r"\.shared_expert\.(\w+)_W$", r".\1_proj.weight"),
        (r"(\.experts\.\d+\.\w+)_proj\.weight$", r"\1_ternary"),
        (r"(\.experts\.\d+\.\w+)_proj\.scale$", r"\1_scale"),
    )
    named = {}
    for key, value in tensors.items():
        for pattern, new in renames:
            key = re.sub(pattern, new, key)
        assert key not in named, key
        named[key] = value
    return named


_WRAPPERS = re.compile(
    "alphas?|expert_alphas?|experts|layer_alphas?|layers|per_expert|per_layer|values"
)


def walk_alphas(
    node: Any, layer: int | None = None, expert: int | None = None
) -> Iterator[tuple[int, int, float]]:
    """(layer, expert, alpha) of every number in an alpha.json that names both, in file order."""
    if isinstance(node, int | float):
        if layer is not None and expert is not None:
            yield layer, expert, float(node)
    elif isinstance(node, list):
        for i, item in enumerate(node):
            if layer is None:
                yield from walk_alphas(item, i, expert)
            elif expert is None:
                yield from walk_alphas(item, layer, i)
    elif isinstance(node, dict):
        for key, item in node.items():
            key, at_layer, at_expert = key.lower(), layer, expert
            if key.isdigit() and layer is None:
                at_layer = int(key)
            elif key.isdigit() and expert is None:
                at_expert = int(key)
            elif not _WRAPPERS.fullmatch(key):
                if found := re.search(r"(?:^|[._])layers?[._](\d+)", key):
                    at_layer = int(found[1])
                if found := re.search(r"(?:^|[._])experts?[._](\d+)", key):
                    at_expert = int(found[1])
            yield from walk_alphas(item, at_layer, at_expert)


def read_alphas(
    folder: Path, tensors: dict[str, Array], layers: int, experts: int
) -> dict[int, Array]:
    """Alpha (E,) of every layer: alpha.json first, tensors over it, 0 or 1 where neither speaks."""
    files = sorted(folder.rglob("alpha.json"))
    alphas = np.full((layers, experts), 0.0 if files else 1.0, np.float32)
    for path in files:
        for layer, expert, value in walk_alphas(json.loads(path.read_text())):
            if layer < layers and expert < experts:
                alphas[layer, expert] = value
    for key, values in tensors.items():
        if "alpha" in key:
            alphas[int(re.search(r"layers\.(\d+)\.", key)[1])] = values  # type: ignore[index]
    return dict(enumerate(alphas))


def read_overlay(path: str | Path, base: str | Path | None = None) -> ReferenceModel:
    """Read a V1/V2, V3.2 or per-file checkpoint, with its base inside or in the folder `base`.

    Of alphas it knows alpha.json and tensors; an alpha_overlay.pt is left alone.
    """
    path = Path(path)
    config = json.loads((path / "config.json").read_text())
    overlay = read_tensors(path)
    tensors = (read_tensors(Path(base)) if base else {}) | overlay
    heads = _first(config, "n_heads", "num_attention_heads")
    hidden = _first(config, "hidden_dim", "hidden_size")
    count = _first(config, "n_layers", "num_hidden_layers")
    n_experts = _first(config, "n_experts", "outlier_num_experts", default=0)
    every = list(range(count))
    moe = _first(config, "moe_layer_indices", "v3_2_moe_layers", "moe_layers", default=every)
    alphas = read_alphas(path, overlay, count, n_experts)

    def projections(layer: int, part: str) -> list[Ternary]:
        read = []
        for e in range(n_experts):
            key = f"model.layers.{layer}.mlp.experts.{e}.{part}"
            trits, scale = tensors[f"{key}_ternary"], tensors[f"{key}_scale"]
            read.append(Ternary(trits, scale.astype(np.float32).reshape(-1, 1)))
        return read

    layers = []
    for n in every:
        prefix = f"model.layers.{n}."
        weights = {
            key.removeprefix(prefix): value.astype(np.float32)
            for key, value in tensors.items()
            if key.startswith(prefix) and not re.search(r"\.experts\.|\.router\.|alpha", key)
        }
        experts = None
        if n in moe and n_experts:
            router = tensors[prefix + "mlp.router.weight"].astype(np.float32)
            parts = [projections(n, part) for part in ("gate", "up", "down")]
            experts = Experts(router, alphas[n], *parts)
        layers.append(Layer(weights, experts))

    head = None
    if "lm_head.weight" in tensors:
        head = tensors["lm_head.weight"].astype(np.float32)
    rope = config.get("rope_parameters") or config
    return ReferenceModel(
        heads=heads,
        kv_heads=_first(config, "n_kv_heads", "num_key_value_heads", default=heads),
        head_dim=_first(config, "head_dim", default=hidden // heads),
        top_k=min(_first(config, "top_k", "outlier_num_experts_per_tok", default=2), n_experts),
        eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", 1e6),
        scaling=read_scaling(config),
        embedding=tensors["model.embed_tokens.weight"].astype(np.float32),
        norm=tensors["model.norm.weight"].astype(np.float32),
        lm_head=head,
        layers=layers,
    )
