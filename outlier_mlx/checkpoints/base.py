"""The base model: an ordinary folder in Hugging Face's names, of a family that can be one."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from outlier_mlx.checkpoints.keys import BaseKey, parse_key
from outlier_mlx.checkpoints.overlay import Overlay, check_base, check_layers
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.models.config import (
    BASE_TYPE,
    DEFAULT_BASE,
    Defaults,
    ModelConfig,
    is_ternary_model,
    parse_config,
    raw_config,
    stated_base,
)
from outlier_mlx.models.config_values import POSITIONS
from outlier_mlx.models.families import family
from outlier_mlx.models.head import NOTE
from outlier_mlx.models.prism_pack import MODEL_TYPE as ROTATED_PACK
from outlier_mlx.storage.paths import no_folder
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.writing.licences import card_metadata

# Attributes of `ModelConfig` that must be equal in overlay and base, and the fields of a config
# that state them. An overlay may have none of these fields; where none are listed, it must state
# the value.
_DIMENSIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(["hidden", "intermediate", "layers", "heads", "vocab"], ()),
    "kv_heads": ("n_kv_heads", "num_key_value_heads"),
    "head_dim": ("head_dim",),
    "tied": ("tie_word_embeddings",),
}


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
        base: every base tensor, by mlx-lm's name.
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
        CheckpointError: no such folder, a config of another family, or damaged files.
    """
    if not folder.is_dir():
        raise CheckpointError(no_folder(folder))
    raw = raw_config(folder)
    if is_ternary_model(raw) or raw.get("model_type") == ROTATED_PACK:
        # Experts were trained on the base's own activations, in 16 bits and not rotated.
        raise CheckpointError(f"{folder}: a ternary model; no overlay can be put on it")
    config = parse_config(raw)
    if "ternary" in config.raw:
        raise CheckpointError(f"{folder}: this is a tier; a base model was expected")
    for name in ("quantization", "quantization_config"):
        if config.raw.get(name):
            place = quote(str(folder))
            undone = f"; mlx_lm.convert --hf-path {place} --mlx-path FOLDER -d writes it in floats"
            raise CheckpointError(
                f"{folder.name}: config.json: {name}: a quantized model; the base must not be"
                " quantized" + undone * (name == "quantization")
            )
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
        found, place, config = overlay.base, overlay.path.name, _alone(overlay)
    else:
        found, place = {**base.tensors, **overlay.base}, base.path.name
        config = _agree(overlay.config, base.config)
    if "lm_head.weight" in found:
        # A head that is stored is the head, whatever the config says of tying. Of a repository,
        # it may not be at hand yet to be compared with the embedding.
        if config.tied:
            warnings.warn(f"{place}: {NOTE}", CheckpointWarning, stacklevel=2)
        config = replace(config, tied=False)
    for note in family(config.family).notes(config, own=True):
        warnings.warn(f"{place}: {note}", CheckpointWarning, stacklevel=2)
    tensors = check_base(found, config, place)
    twins = {}
    if base is not None:
        both = overlay.base.keys() & base.tensors.keys()
        twins = {name: base.tensors[name] for name in tensors if name in both}
    return WholeModel(config, tensors, twins, overlay)


def _alone(overlay: Overlay) -> ModelConfig:
    """The config of an overlay that contains its base, which it need not name.

    Raises:
        CheckpointError: it contains none, or the config is not one of such a base.
    """
    if not overlay.base:
        raise CheckpointError(
            f"{overlay.path}: holds no base model; give one with --base{_likely_base(overlay)}"
        )
    raw = overlay.config.raw
    base = stated_base(raw) or DEFAULT_BASE
    return parse_config(raw | {BASE_TYPE: base}, overlay.config.defaults)


def _likely_base(overlay: Overlay) -> str:
    """The base that the config or the model card names: a hint for the error message only."""
    named = overlay.config.raw.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        return f" (its config names {named.rsplit('/', 1)[-1][:80]!r})"
    named = (card_metadata(overlay.path) or {}).get("base_model")
    if isinstance(named, list) and named:
        named = named[0]
    return f" (its card names {named[:80]!r})" if isinstance(named, str) else ""


def _agree(overlay: ModelConfig, base: ModelConfig) -> ModelConfig:
    """The config of both together; what the overlay does not state is taken from the base."""
    stated = stated_base(overlay.raw)
    if stated not in (None, base.family):
        raise CheckpointError(
            f"overlay and base are for different models: the overlay's base is {stated}, this one"
            f" is {base.family}"
        )
    for name, fields in _DIMENSIONS.items():
        ours, theirs = getattr(overlay, name), getattr(base, name)
        left_open = fields and all(overlay.raw.get(field) is None for field in fields)
        if ours != theirs and not left_open:
            raise CheckpointError(
                f"overlay and base are for different models: {name} {ours} and {theirs}"
            )
    # The number of positions may differ, and each may have its own name for it.
    raw = dict(base.raw)
    if any(overlay.raw.get(name) is not None for name in POSITIONS):
        raw = {key: value for key, value in raw.items() if key not in POSITIONS}
    defaults = Defaults(base.rope_theta, base.rms_norm_eps, base.max_positions)
    return parse_config({**raw, **overlay.raw, BASE_TYPE: base.family}, defaults)
