"""The base model: an ordinary folder of Qwen2 in Hugging Face's names."""

from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.checkpoints.config import Defaults, ModelConfig, parse_config, read_config
from outlier_mlx.checkpoints.keys import BaseKey, parse_key
from outlier_mlx.checkpoints.overlay import Overlay, check_base
from outlier_mlx.checkpoints.shards import read_shards
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.safetensors import TensorRef


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
    tensors: dict[str, TensorRef] = {}
    for key, tensor in read_shards(folder).items():
        parsed = parse_key(key)
        if isinstance(parsed, BaseKey):
            tensors[parsed.name] = tensor
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
            likely = overlay.config.raw.get("base_model_name_or_path")
            hint = f" (its config names {str(likely).rsplit('/', 1)[-1]!r})" if likely else ""
            raise CheckpointError(
                f"{overlay.path}: holds no base model; give one with --base{hint}"
            )
        tensors = check_base(overlay.base, overlay.config, overlay.path.name)
        return WholeModel(overlay.config, tensors, {}, overlay)
    config = _agree(overlay.config, base.config)
    tensors = check_base({**base.tensors, **overlay.base}, config, base.path.name)
    twins = {name: base.tensors[name] for name in tensors if name in overlay.base}
    return WholeModel(config, tensors, twins, overlay)


def _agree(overlay: ModelConfig, base: ModelConfig) -> ModelConfig:
    for name in ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocab", "tied"):
        ours, theirs = getattr(overlay, name), getattr(base, name)
        stated = name != "tied" or "tie_word_embeddings" in overlay.raw
        if stated and ours != theirs:
            raise CheckpointError(
                f"overlay and base are for different models: {name} {ours} and {theirs}"
            )
    # What the overlay leaves unsaid is as in the base.
    return parse_config({**base.raw, **overlay.raw}, Defaults())
