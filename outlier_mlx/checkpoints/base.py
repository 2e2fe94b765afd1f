"""The base model: an ordinary folder of Qwen2 in Hugging Face's names."""

import re
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

from outlier_mlx.checkpoints.keys import BaseKey, parse_key
from outlier_mlx.checkpoints.overlay import Overlay, check_base, check_layers
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import POSITIONS, ModelConfig, parse_config, read_config
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import read_shards

# `base_model: OWNER/NAME` in a card's metadata, or a list of one.
_CARD_BASE = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?([\w./-]+)", re.MULTILINE)
_CARD_CHARACTERS = 20_000


@dataclass(frozen=True)
class BaseModel:
    """A base folder: its description and the places of its tensors."""

    path: Path
    config: ModelConfig
    tensors: dict[str, TensorRef]


@dataclass(frozen=True)
class WholeModel:
    """An overlay together with the base it stands on.

    Attributes:
        config: what both say of the model.
        base: every base tensor, by mlx-lm's Qwen2 name.
        twins: for base tensors that both hold, the base's own; they must turn out equal.
        overlay: the rest.
    """

    config: ModelConfig
    base: dict[str, TensorRef]
    twins: dict[str, TensorRef]
    overlay: Overlay


def open_base(folder: Path) -> BaseModel:
    """Open a base model; only headers are read.

    Raises:
        CheckpointError: no such folder, a config that is not Qwen2's, or damaged files.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = read_config(folder)
    if "ternary" in config.raw:
        raise CheckpointError(f"{folder}: this is a tier; a base model was expected")
    tensors: dict[str, TensorRef] = {}
    for key, tensor in read_shards(folder).items():
        parsed = parse_key(key)
        if not isinstance(parsed, BaseKey):
            continue
        if parsed.name in tensors:
            first = tensors[parsed.name].where
            raise CheckpointError(f"{folder.name}: {tensor.where}: the same weight as {first}")
        tensors[parsed.name] = tensor
    check_layers(tensors, config, folder.name)
    return BaseModel(folder, config, tensors)


def join(overlay: Overlay, base: BaseModel | None) -> WholeModel:
    """Put an overlay on its base.

    Args:
        overlay: the overlay.
        base: the base, or None where the overlay contains it.

    Raises:
        CheckpointError: they describe different models, or base tensors are missing.
    """
    if base is None:
        if not overlay.base:
            raise CheckpointError(
                f"{overlay.path}: holds no base model; give one with --base{_likely_base(overlay)}"
            )
        config = _untied(overlay.config, overlay.base)
        tensors = check_base(overlay.base, config, overlay.path.name)
        return WholeModel(config, tensors, {}, overlay)
    both = {**base.tensors, **overlay.base}
    config = _untied(_agree(overlay.config, base.config), both)
    tensors = check_base(both, config, base.path.name)
    twins = {
        name: base.tensors[name]
        for name in tensors
        if name in overlay.base and name in base.tensors
    }
    return WholeModel(config, tensors, twins, overlay)


def _likely_base(overlay: Overlay) -> str:
    """What the config or the model card calls the base: to be told, not to be believed."""
    named = overlay.config.raw.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        return f" (its config names {named.rsplit('/', 1)[-1][:80]!r})"
    card = overlay.path / "README.md"
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as file:
            match = _CARD_BASE.search(file.read(_CARD_CHARACTERS))
        if match:
            return f" (its card names {match[1][:80]!r})"
    return ""


def _untied(config: ModelConfig, tensors: Container[str]) -> ModelConfig:
    """A head that is stored is the head, whatever the config says of tying."""
    return replace(config, tied=False) if "lm_head.weight" in tensors else config


def _agree(overlay: ModelConfig, base: ModelConfig) -> ModelConfig:
    for name in ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocab", "tied"):
        ours, theirs = getattr(overlay, name), getattr(base, name)
        stated = name != "tied" or "tie_word_embeddings" in overlay.raw
        if stated and ours != theirs:
            raise CheckpointError(
                f"overlay and base are for different models: {name} {ours} and {theirs}"
            )
    # What the overlay leaves unsaid is as in the base. The number of positions may differ, and
    # each may have its own name for it.
    raw = dict(base.raw)
    if any(overlay.raw.get(name) is not None for name in POSITIONS):
        raw = {key: value for key, value in raw.items() if key not in POSITIONS}
    return parse_config({**raw, **overlay.raw}, overlay.defaults)
