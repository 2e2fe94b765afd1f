"""Map tensor names of Hugging Face checkpoints to modules of mlx-lm's models."""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import ModelConfig
from outlier_mlx.models.modules import Module
from outlier_mlx.storage.paths import entries
from outlier_mlx.storage.safetensors import NUMPY_DTYPES, TensorRef
from outlier_mlx.storage.shards import SHARDS, read_shards

#: Path of a module, and number of the expert that a tensor belongs to (None: not of an expert).
Place = tuple[str, int | None]
#: Tensors of a place, by the last part of their names: "weight", "bias", "qweight" ...
Stored = dict[str, TensorRef]

# Names of Mixtral's projections in checkpoints.
_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LAYER = r"(model\.layers\.\d+)\."
_EXPERT = re.compile(_LAYER + r"(?:block_sparse_moe|mlp)\.experts\.(\d{1,5})\.(w[123])\.(\w+)")
_ROUTER = re.compile(_LAYER + r"(?:block_sparse_moe|mlp)\.gate\.(\w+)")
_MODEL = re.compile(r"model\.(?:embed_tokens|layers\.\d+)\.")
_FUSED = re.compile(_LAYER + r"mlp\.experts\.(gate_up_proj|down_proj)")


def holds_model(folder: Path) -> bool:
    """Whether a folder has safetensors with the tensor names of a model.

    Raises:
        CheckpointError: the safetensors are damaged.
    """
    if not entries(folder, SHARDS):
        return False
    return any(_MODEL.match(name) for name in read_shards(folder))


def by_place(tensors: Mapping[str, TensorRef], config: ModelConfig) -> dict[Place, Stored]:
    """Group a checkpoint's tensors by module of mlx-lm's model.

    Mixtral's experts may have either of two layouts: one tensor per matrix
    (`block_sparse_moe.experts.E` with w1 = gate, w2 = down, w3 = up); or, from transformers 5, all
    experts of a layer in one tensor (`mlp.experts` with `gate_up_proj` (experts, 2 * width,
    hidden), gate rows first, and `down_proj` (experts, hidden, width)). RoPE frequencies, which old
    files have, are ignored, and so is the head of a model with tied embeddings.

    Raises:
        CheckpointError: two tensors belong to the same place, or a fused tensor has a wrong shape.
    """
    mixture = config.family == "mixtral"
    found: dict[Place, Stored] = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
            continue
        if mixture and (match := _FUSED.fullmatch(name)):
            for place, part in _split_fused(tensor, match[1], match[2], config):
                _add(found, place, "weight", part)
            continue
        place, leaf = _place(name, mixture)
        _add(found, place, leaf, tensor)
    return found


def name_in_source(module: Module, expert: int | None) -> str:
    """The usual name of a module, or of one of its experts, in Hugging Face checkpoints."""
    if expert is None:
        return module.path
    prefix, _, projection = module.path.partition(".switch_mlp.")
    letter = next(letter for letter, name in _EXPERTS.items() if name == projection)
    return f"{prefix}.experts.{expert}.{letter}"


def _place(name: str, mixture: bool) -> tuple[Place, str]:
    if mixture and (match := _EXPERT.fullmatch(name)):
        layer, expert, letter, leaf = match.groups()
        path = f"{layer}.block_sparse_moe.switch_mlp.{_EXPERTS[letter]}"
        return (path, int(expert)), leaf
    if mixture and (match := _ROUTER.fullmatch(name)):
        return (f"{match[1]}.block_sparse_moe.gate", None), match[2]
    path, _, leaf = name.rpartition(".")
    return (path, None), leaf


def _add(found: dict[Place, Stored], place: Place, leaf: str, tensor: TensorRef) -> None:
    stored = found.setdefault(place, {})
    if leaf in stored:
        raise CheckpointError(
            f"{tensor.where}: duplicate tensor: {stored[leaf].name} under another name"
        )
    stored[leaf] = tensor


def _split_fused(
    tensor: TensorRef, layer: str, name: str, config: ModelConfig
) -> list[tuple[Place, TensorRef]]:
    """The matrices of a fused tensor, as ranges of the same file; nothing is read."""
    hidden, width, experts = config.hidden, config.intermediate, config.experts
    rows = {"down_proj": hidden} if name == "down_proj" else {"gate_proj": width, "up_proj": width}
    columns = width if name == "down_proj" else hidden
    shape = (experts, sum(rows.values()), columns)
    if tensor.shape != shape:
        raise CheckpointError(f"{tensor.where}: shape {tensor.shape}, expected {shape}")
    parts: list[tuple[Place, TensorRef]] = []
    offset = tensor.offset
    for expert in range(experts):
        for projection, count in rows.items():
            path = f"{layer}.block_sparse_moe.switch_mlp.{projection}"
            part = replace(
                tensor,
                name=f"{tensor.name}[{expert}].{projection}",
                shape=(count, columns),
                offset=offset,
            )
            parts.append(((path, expert), part))
            offset += prod(part.shape) * NUMPY_DTYPES[tensor.dtype].itemsize
    return parts
