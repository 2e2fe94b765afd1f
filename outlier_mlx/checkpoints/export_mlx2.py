"""Ternary models as packs of MLX's affine 2-bit codes, which stock mlx-lm loads: equal weights."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.checkpoints.ternary_model import RowsSource, TernaryModel
from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.models import prism_pack
from outlier_mlx.models.config import is_ternary_model
from outlier_mlx.models.quantization import largest_group, read_quantization
from outlier_mlx.models.summary import kind_of
from outlier_mlx.storage.rounding import is_rounded
from outlier_mlx.storage.ternary_matrix import TernaryMatrix
from outlier_mlx.writing.parts import Part
from outlier_mlx.writing.ternary_parts import AffinePart, Signs, Verbatim

_BITS = 2
# Fields of ternary models; a pack has its own, or none.
_OWN = ("ternary", "quantization", "model_file")


def check_mlx2(raw: Mapping[str, Any], folder: Path) -> None:
    """Check from its config that a model could be a pack.

    Raises:
        CheckpointError: it is not ternary, or mlx-lm's model of its type takes no such weights.
    """
    if not is_ternary_model(raw):
        raise CheckpointError(
            f"{folder}: not a ternary model, as `import` writes it; only those are exported as mlx2"
        )
    if raw.get("model_type") == "bitnet":
        raise CheckpointError(f"{folder}: mlx-lm's bitnet has no layers with affine codes")


def mlx2_pack(model: TernaryModel, raw: Mapping[str, Any], name: str) -> tuple[list[Part], dict]:
    """The tensors and the config.json of a pack.

    Args:
        model: the ternary model.
        raw: its config.json.
        name: what messages call it.

    Raises:
        CheckpointError: mlx-lm has no model that could hold these weights.
    """
    config = {key: value for key, value in raw.items() if key not in _OWN}
    root = prism_pack.ROOT if model.fields.schema == 1 else ""
    parts = [_affine(path, matrix, root, name) for path, matrix in model.matrices.items()]
    if model.fields.rotations or model.fields.schema is not None:
        config = _rotated_config(model, config, parts, root, name)
    else:
        config |= _quantization(model, parts, raw)
    return [*parts, *_signs(model, root), *_rest(model, raw, root)], config


def _affine(path: str, matrix: TernaryMatrix, root: str, name: str) -> AffinePart:
    own, width = matrix.scales, matrix.shape[1]
    group, dtype = own.group, own.dtype
    if not group:
        found = largest_group(width)
        if found is None:
            raise CheckpointError(f"{name}: {path}: no group size of MLX divides its width {width}")
        group, dtype = found, _smallest_dtype(matrix)
    path = path.removeprefix(root)
    return AffinePart(path, kind_of(f"{path}.weight"), matrix, group, dtype)


def _smallest_dtype(matrix: TernaryMatrix) -> str:
    """The smallest dtype that holds the scales of all rows."""
    assert isinstance(matrix.source, RowsSource)
    scales = matrix.source.stored_scales.read()
    halves = ("bfloat16", "float16")
    return next((half for half in halves if not is_rounded(scales, half).any()), "float32")


def _rest(model: TernaryModel, raw: Mapping[str, Any], root: str) -> list[Part]:
    """All other tensors, as they are."""
    said = read_quantization(raw)
    parts: list[Part] = []
    for key, tensor in model.rest.items():
        path, _, leaf = key.rpartition(".")
        quantized = f"{path}.scales" in model.rest
        weights = prod(tensor.shape)
        if quantized:
            how = said.of(path) if said is not None else None
            weights = weights * 32 // how.bits if leaf == "weight" and how is not None else 0
        parts.append(Verbatim(path, kind_of(key), tensor, key.removeprefix(root), weights))
    return parts


def _quantization(
    model: TernaryModel, parts: list[AffinePart], raw: Mapping[str, Any]
) -> dict[str, Any]:
    """How matrices are stored, under both names that mlx-lm writes."""
    groups = [part.group for part in parts]
    usual = max(set(groups), key=groups.count)
    said: dict[str, Any] = {"group_size": usual, "bits": _BITS, "mode": "affine"}
    for part in parts:
        if part.group != usual:
            said[part.path] = {"group_size": part.group, "bits": _BITS, "mode": "affine"}
    kept = raw.get("quantization") or {}
    default = {key: value for key, value in kept.items() if not isinstance(value, dict | bool)}
    for key in model.rest:
        path = key.removesuffix(".scales")
        if path != key:
            said[path] = kept.get(path, default)
    return {"quantization": said, "quantization_config": said}


def _signs(model: TernaryModel, root: str) -> list[Part]:
    """The signs of each rotated module, in float32, as mlx-lm has them."""
    parts: list[Part] = []
    for path, module in model.fields.modules.items():
        if module.rotation is None:
            continue
        signs = model.signs[module.rotation]
        path = path.removeprefix(root)
        values = np.ones(module.width, np.int8) if signs is None else signs
        parts.append(Signs(path, kind_of(f"{path}.weight"), f"{path}.signs", values, "F32"))
    return parts


def _rotated_config(
    model: TernaryModel, config: dict, parts: list[AffinePart], root: str, name: str
) -> dict:
    """The config of a `prism_hadamard_qwen35` pack."""
    kind = config.get("model_type")
    if kind != prism_pack.BASE_TYPE:
        raise CheckpointError(
            f"{name}: a rotated {kind}: mlx-lm has rotated packs of {prism_pack.BASE_TYPE} only"
        )
    modules = []
    for part, module in zip(parts, model.fields.modules.values(), strict=True):
        rotation = None if module.rotation is None else model.fields.rotations[module.rotation]
        block = 0 if rotation is None else rotation.block
        if block not in prism_pack.BLOCKS or (part.group, part.dtype) != (128, "float16"):
            raise CheckpointError(
                f"{name}: {part.path}: blocks of {block} and {part.dtype} scales of {part.group}"
                f" weights; mlx-lm's packs have blocks of {listed(prism_pack.BLOCKS, last='or')}"
                " and float16 scales of 128 weights"
            )
        modules.append(
            {
                "path": part.path.removeprefix(prism_pack.ROOT),
                "block": block,
                "embedding": part.path.endswith(prism_pack.EMBEDDING),
                "dtype": "float16",
            }
        )
    schema = model.fields.schema or 2
    return config | {
        "model_type": prism_pack.MODEL_TYPE,
        "base_model_type": prism_pack.BASE_TYPE,
        "schema_version": schema,
        "tensor_namespace": prism_pack.NAMESPACES[schema],
        "gdn_activation_layout": "grouped",
        "quantization": prism_pack.QUANTIZATION,
        "modules": modules,
    }
