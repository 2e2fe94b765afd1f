"""A tier or MLX model on disk, checked from its config and headers before MLX sees a byte.

This is the one check that loading, verifying and exporting share.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlier_mlx.checkpoints.ternary_model import TernaryModel, open_ternary_model
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.models.config import (
    MADE,
    ModelConfig,
    describe,
    is_overlay,
    is_ternary_model,
    is_tier,
    parse_config,
    raw_config,
)
from outlier_mlx.models.families import families
from outlier_mlx.models.fields import short
from outlier_mlx.models.head import settle_head
from outlier_mlx.models.quantization import check_quantization
from outlier_mlx.models.spelling import lifted, normalised
from outlier_mlx.models.stored import check_tensors
from outlier_mlx.models.tier_fields import TERNARY_FILE, check_fields
from outlier_mlx.models.token_ids import check_tokenizer, end_ids
from outlier_mlx.runtime.affine2 import ROWS, check_experts
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.texts import read_json
from outlier_mlx.writing.manifest import FORMAT_VERSIONS

# mlx-lm would read the quantization of an unquantized model from here.
_OTHER_QUANTIZATION = "hf_quant_config.json"
_FORMAT = {"group_size", "bits", "mode"}


@dataclass(frozen=True)
class StoredModel:
    """A tier or MLX model on disk.

    Attributes:
        raw: its config.json; of a plain model, with the field names of `normalised`.
        config: what it is, if every tensor was held against it; None for models of others.
        tensors: where its tensors are.
        ternary: its ternary matrices, if it is a ternary model.
    """

    raw: dict
    config: ModelConfig | None
    tensors: Mapping[str, TensorRef]
    ternary: TernaryModel | None = None


def open_stored(folder: Path) -> StoredModel:
    """Check a model that is loaded or verified. Only its config and headers are read.

    Of tiers, and of other models that this project wrote, everything is checked that loading
    depends on. Of models of others, only what MLX does not check itself.

    Raises:
        CheckpointError: there is no model, it is an overlay, it needs code of its own, or its
            config, quantization, tensors or tokenizer are not valid; names the first that is not.
    """
    try:
        raw = open_config(folder)
        if is_ternary_model(raw):
            return _open_ternary(folder, raw)
        return (_open_tier if is_tier(raw) else _open_plain)(folder, raw)
    except CheckpointError as error:
        if str(error).startswith(
            (f"{folder}: ", f"{folder}/", f"{folder.name}: ", f"{folder.name}/")
        ):
            raise
        # Which of several models it is about.
        raise CheckpointError(f"{folder}: {error}") from None


def open_config(folder: Path) -> dict:
    """The config.json of a tier, or of a plain model with the field names of `normalised`.

    Raises:
        CheckpointError: there is no model, it is an overlay, or it needs code of its own.
    """
    raw = raw_config(folder)
    if is_tier(raw):
        return raw
    if is_overlay(raw):
        raise CheckpointError(f"{folder}: an overlay; `outlier-mlx convert` makes a tier from it")
    own = TERNARY_FILE if is_ternary_model(raw) else None
    if raw.get("model_file", own) != own:
        raise CheckpointError(f"{folder}: needs its own model code, which is never run here")
    if raw.get("model_type") == "mixtral" and not _is_mlx(raw):
        raise CheckpointError(
            f"{folder}: not in MLX's format; convert it with `outlier-mlx import`"
        )
    return normalised(raw, f"{folder.name}/config.json")


def _open_tier(folder: Path, raw: dict) -> StoredModel:
    config = parse_config(raw)
    _check_experts(raw["ternary"])
    check_fields(config)
    _check_quantization(raw)
    _check_no_other_quantization(folder, "a tier")
    return _open_checked(folder, config)


def _open_ternary(folder: Path, raw: dict) -> StoredModel:
    _check_quantization(raw)
    _check_no_other_quantization(folder, "a ternary model")
    tensors = read_shards(folder)
    _check_layer_count(folder, raw, tensors)
    ternary = open_ternary_model(folder, raw, tensors)
    vocab = describe(raw).vocab
    if vocab is not None:
        check_ends(folder, raw, vocab)
        check_tokenizer(folder, vocab)
    return StoredModel(raw, None, tensors, ternary)


def _open_plain(folder: Path, raw: dict) -> StoredModel:
    check_quantization(raw)
    tensors = read_shards(folder)
    _check_layer_count(folder, raw, tensors)
    if describe(raw).family is None:
        return StoredModel(raw, None, tensors)
    if any((folder / name).exists() for name in FORMAT_VERSIONS):
        return _open_made(folder, raw)
    tied, note = settle_head(raw.get("tie_word_embeddings"), tensors)
    if note is not None:
        warnings.warn(f"{folder.name}: {note}", CheckpointWarning, stacklevel=4)
    return StoredModel(raw | {"tie_word_embeddings": tied}, None, tensors)


def _open_made(folder: Path, raw: dict) -> StoredModel:
    """A model that was imported or merged."""
    config = parse_config(raw, role=MADE)
    switch = raw.get("ternary_switch")
    if raw["model_type"] not in families() or switch is not None:
        _check_experts(switch, (ROWS,))
        _check_layers(switch, config)
    _check_quantization(raw)
    return _open_checked(folder, config)


def _open_checked(folder: Path, config: ModelConfig) -> StoredModel:
    check_ends(folder, config.raw, config.vocab)
    tensors = read_shards(folder)
    check_tensors(config, tensors)
    check_tokenizer(folder, config.vocab)
    return StoredModel(config.raw, config, tensors)


def _check_layer_count(folder: Path, raw: dict, tensors: Mapping[str, TensorRef]) -> None:
    """Every layer has a tensor. MLX would build any number of layers, whatever the files hold."""
    layers = lifted(raw).get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(tensors):
        raise CheckpointError(
            f"{folder}: config.json: {layers} layers, but only {len(tensors)} tensors"
        )


def _check_no_other_quantization(folder: Path, what: str) -> None:
    if (folder / _OTHER_QUANTIZATION).exists():
        raise CheckpointError(f"{folder}: {_OTHER_QUANTIZATION}: not a file of {what}")


def _check_experts(stored: object, formats: tuple[str, ...] | None = None) -> None:
    if not isinstance(stored, dict):
        raise CheckpointError(f"config.json: {short(stored)} does not say how experts are stored")
    try:
        check_experts(stored, *(() if formats is None else (formats,)))
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None


def _check_layers(switch: Any, config: ModelConfig) -> None:
    layers = switch.get("layers")
    known = isinstance(layers, list) and all(
        type(number) is int and 0 <= number < config.layers for number in layers
    )
    if not known:
        raise CheckpointError("config.json: ternary_switch: layers must be a list of layer numbers")


def _check_quantization(raw: dict) -> None:
    """Check `quantization`, and that mlx-lm's other name for it says the same."""
    check_quantization(raw)
    given = raw.get("quantization")
    if raw.get("quantization_config") not in (None, given):
        raise CheckpointError("config.json: quantization_config differs from quantization")
    for name, how in ({"the default": given} | given if given else {}).items():
        if name in _FORMAT or how is False:
            continue
        # What is left out, this project and mlx-lm would complete differently.
        if not isinstance(how, dict) or how.get("mode") != "affine" or not how.keys() >= _FORMAT:
            raise CheckpointError(f"config.json: quantization: {name[:80]} is {short(how)}")


def check_ends(folder: Path, raw: dict, vocab: int) -> None:
    """Check the tokens that end a text: in config.json, and in generation_config.json.

    Raises:
        CheckpointError: one is not a number of a token below `vocab`.
    """
    said = {"config.json": raw}
    if (folder / "generation_config.json").exists():
        path = inside(folder, "generation_config.json")
        said[path.name] = read_json(path)
    for file, fields in said.items():
        value = fields.get("eos_token_id")
        if any(number >= vocab for number in end_ids(value, file)):
            raise CheckpointError(
                f"{file}: eos_token_id is {short(value)}, expected numbers of tokens below {vocab}"
            )


def _is_mlx(raw: dict) -> bool:
    """Whether the weights are in MLX's format; mlx-lm writes its quantization under both names."""
    return "quantization" in raw or "quantization_config" not in raw
