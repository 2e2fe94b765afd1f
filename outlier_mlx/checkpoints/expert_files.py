"""Overlays with a file for each expert: `experts/layer_NN_expert_NN.safetensors`.

The base is elsewhere. Exports keep routers in `router_state.safetensors`, trainers in
`router/router_weights.safetensors`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from outlier_mlx.checkpoints.collect import Collected, collect
from outlier_mlx.checkpoints.keys import parse_expert_leaf, parse_key, parse_number
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.models.config import ModelConfig, read_config
from outlier_mlx.storage.paths import entries, inside
from outlier_mlx.storage.safetensors import TensorRef, read_header
from outlier_mlx.storage.shards import SHARDS

SIGN = "experts/layer_*_expert_*.safetensors"

_NAME = re.compile(r"layer_([0-9]+)_expert_([0-9]+)\.safetensors")
_TRAINER_ROUTERS = "router/router_weights.safetensors"


def open_expert_files(folder: Path, tensors: Mapping[str, TensorRef]) -> Overlay | None:
    """Open a per-file export or a trainer's output, or return None if this is neither.

    Raises:
        CheckpointError: it is one, but not a sound one.
    """
    names = [path.name for path in entries(folder / "experts", SHARDS)]
    if not names:
        return None
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: no config.json; take the base's and add n_experts, top_k and moe_layers"
        )
    config = read_config(folder)
    collected = collect(tensors)
    files = _expert_files(folder, names)
    for (layer, expert), file in files.items():
        for key, tensor in read_header(inside(folder, file)).items():
            parsed = parse_expert_leaf(key, layer, expert)
            if parsed is None:
                raise CheckpointError(f"{folder}: {file}: {key} is not a part of an expert")
            collected.add(parsed, tensor)
    trained = (folder / _TRAINER_ROUTERS).exists()
    router_keys = [key for key in tensors if "router" in key]
    if trained:
        for key, tensor in read_header(inside(folder, _TRAINER_ROUTERS)).items():
            router_keys.append(key)
            collected.add(parse_key(key), tensor)
    _check_complete(folder, config, set(files), collected, router_keys)
    return collected.overlay(folder, "trainer output" if trained else "per-file", config)


def _expert_files(folder: Path, names: list[str]) -> dict[tuple[int, int], str]:
    files: dict[tuple[int, int], str] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{folder}: experts/{name}: expected layer_N_expert_E.safetensors"
            )
        place = parse_number(match[1]), parse_number(match[2])
        if place in files:
            raise CheckpointError(f"{folder}: experts/{name}: the same expert as {files[place]}")
        files[place] = f"experts/{name}"
    return files


def _check_complete(
    folder: Path,
    config: ModelConfig,
    files: set[tuple[int, int]],
    collected: Collected,
    router_keys: list[str],
) -> None:
    for layer in config.moe_layers:
        for expert in range(config.experts):
            if (layer, expert) not in files and (layer, expert, "gate") not in collected.trits:
                raise CheckpointError(
                    f"{folder}: experts/layer_{layer:02}_expert_{expert:02}.safetensors is missing"
                )
        if layer not in collected.routers:
            raise CheckpointError(
                f"{folder}: no router for layer {layer}; keys found:"
                f" {listed(map(repr, router_keys), 8)}"
            )
