"""The base that experts are trained over: a dense, unquantized model of a known family."""

from dataclasses import replace
from pathlib import Path

from outlier_mlx.checkpoints.base import BaseModel, open_base
from outlier_mlx.checkpoints.overlay import check_base
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import is_overlay, is_tier, raw_config
from outlier_mlx.writing.assets import has_tokenizer


def open_dense(folder: Path) -> BaseModel:
    """Open a base and check that it is whole; only headers are read.

    Args:
        folder: the model's.

    Raises:
        CheckpointError: it is a tier, an overlay, a ternary or quantized model, of a family that
            can be no base, a tensor is missing or has another shape, or there is no tokenizer.
    """
    raw = raw_config(folder)
    if is_tier(raw):
        raise CheckpointError(f"{folder}: a tier; experts are trained over a dense base")
    if is_overlay(raw):
        raise CheckpointError(f"{folder}: an overlay; experts are trained over its base alone")
    base = open_base(folder)
    config = base.config
    if "lm_head.weight" in base.tensors:  # a head that is stored is the head
        config = replace(config, tied=False)
    check_base(base.tensors, config, folder.name)
    if not has_tokenizer(folder):  # without files, transformers would make an empty one
        raise CheckpointError(f"{folder}: no tokenizer in it, so no text can be read")
    return base
