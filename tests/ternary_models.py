"""Small models with ternary rows, written by the format's definition, and what they compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from outlier_mlx.writing.bundle import bundle
from tests import ternary_reference
from tests.builders import write_tokenizer
from tests.engine import pack_rows
from tests.plain_models import make_model
from tests.reference import Array
from tests.tensor_file import Stored, rounded, stored, write_stored

CODE = "outlier_ternary.py"
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 290,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
#: Widths that 5, 16, 80 and 128 do not divide, and biases.
QWEN2 = QWEN3 | {
    "model_type": "qwen2",
    "hidden_size": 198,
    "intermediate_size": 322,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
QWEN2.pop("head_dim")
LLAMA = QWEN3 | {"model_type": "llama", "tie_word_embeddings": False}
BITNET = QWEN3 | {"model_type": "bitnet", "hidden_act": "relu2"}
QWEN35: dict[str, Any] = {
    "model_type": "qwen3_5",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_5_text",
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "vocab_size": 290,
        "linear_num_value_heads": 6,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
        },
    },
}

#: What `write_ternary` makes a rotated model of.
ROTATED: dict[str, Any] = {"config": QWEN35, "group": 128, "block": 512}


@dataclass(frozen=True)
class Ternary:
    """A ternary model on disk.

    Attributes:
        folder: where it is.
        config: its config.json.
        weights: float64 weights by name, unrotated.
    """

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Array]

    def logits(self, tokens: Sequence[int]) -> Array:
        """What the reference computes, (T, V)."""
        return ternary_reference.logits(self.config, self.weights, tokens)

    def greedy(self, tokens: Sequence[int], n: int) -> list[int]:
        """The reference's continuation."""
        return ternary_reference.greedy(self.config, self.weights, tokens, n)


def write_ternary(
    folder: Path,
    config: dict[str, Any],
    *,
    group: int = 0,
    dtype: str = "F16",
    block: int = 0,
    signed: bool = True,
    plain: Sequence[str] = ("in_proj_a", "in_proj_b"),
    seed: int = 0,
) -> Ternary:
    """Write a model with random trits in every matrix that `plain` does not name.

    Args:
        folder: where to.
        config: config.json of mlx-lm's model.
        group: weights that share a scale; where it does not divide a width, half as many; 0: all.
        dtype: of scales of groups, and of everything that is not ternary.
        block: size of the rotated blocks of all inputs that it divides; 0: none is rotated.
        signed: whether rotations have signs.
        plain: last names of matrices that stay as they are.
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    flat: Any = tree_flatten(make_model(config, seed).parameters())
    tensors: dict[str, Stored] = {}
    weights: dict[str, Array] = {}
    modules: dict[str, dict[str, Any]] = {}
    rotations: list[dict[str, Any]] = []
    signs: dict[int, Array] = {}
    for name, value in _unpacked(flat, config):
        path, _, leaf = name.rpartition(".")
        last = path.rpartition(".")[2]
        if leaf != "weight" or value.ndim != 2 or last in plain:
            tensors[name] = stored(value, dtype)
            weights[name] = rounded(value, dtype).astype(np.float64)
            continue
        out, width = value.shape
        own = next((g for g in (group, group // 2) if g and width % g == 0), 0)
        kind = dtype if own else "F32"
        trits = rng.integers(-1, 2, value.shape, dtype=np.int8)
        scales = rounded(rng.uniform(0.8, 2.4, (out, width // (own or width))) / width**0.5, kind)
        weights[name] = trits * np.repeat(scales.astype(np.float64), own or width, axis=1)
        tensors[name] = stored(pack_rows(trits))
        tensors[f"{path}.scales"] = stored(tiled(scales) if own else scales[:, 0], kind)
        modules[path] = {"in_features": width, "group_size": own}
        if block and width % block == 0:
            if width not in signs:
                signs[width] = rng.choice([-1, 1], width) if signed else np.ones(width)
                rotations.append({"block": block, "width": width, "signed": signed})
            modules[path]["rotation"] = [each["width"] for each in rotations].index(width)
            weights[name] = ternary_reference.unrotated(weights[name], block, signs[width])
    for number, rotation in enumerate(rotations):
        if signed:
            vector = signs[rotation["width"]].astype(np.int8)
            tensors[f"rotations.{number}.signs"] = stored(vector)
    ternary = {"format": "tq1_0_strided", "version": 2, "modules": modules, "rotations": rotations}
    config = config | {"model_file": CODE, "ternary": ternary}
    folder.mkdir(parents=True)
    write_stored(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / CODE).write_text(bundle(CODE))
    write_tokenizer(folder, 290)
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": size}
        for path in sorted(folder.iterdir())
        if (size := path.stat().st_size)
    }
    (folder / "checksums.json").write_text(json.dumps({"files": files}))
    return Ternary(folder, config, weights)


def tiled(scales: Array) -> Array:
    """Scales (out, groups) in tiles of eight rows, (ceil(out / 8), groups, 8)."""
    missing = -len(scales) % 8
    padded = np.concatenate([scales, np.zeros((missing, scales.shape[1]), scales.dtype)])
    return np.ascontiguousarray(padded.reshape(-1, 8, scales.shape[1]).swapaxes(1, 2))


def _unpacked(flat: Any, config: dict[str, Any]) -> list[tuple[str, Array]]:
    """Names and values of a model's parameters; BitNet's layers have packed ones in mlx-lm."""
    found = []
    rng = np.random.default_rng(7)
    for name, value in flat:
        array = np.array(value.astype(mx.float32))
        if name.endswith("weight_scale"):
            continue
        if config["model_type"] == "bitnet" and "_proj." in name:
            array = np.zeros((4 * array.shape[0], array.shape[1]), np.float32)
        if name.endswith(("norm.weight", "norm.bias", "_proj.bias")):
            array = array + rng.normal(0, 0.2, array.shape)
        found.append((name, array))
    return found
