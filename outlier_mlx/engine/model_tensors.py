"""Tensors held against mlx-lm's own model of a config, module by module."""

import re
from collections.abc import Collection, Mapping

from outlier_mlx.checkpoints.ternary_model import TernaryModel
from outlier_mlx.engine.skeleton import Skeleton, skeleton
from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.models.quantization import (
    AFFINE_BITS,
    GROUP_SIZES,
    Affine,
    Quantization,
    read_quantization,
)
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef

#: Tensors of modules: by path, then by the last part of their names.
Modules = dict[str, dict[str, TensorRef]]

# Images' towers, and draft heads: mlx-lm's text models drop them, too.
_IGNORED = re.compile(r"(vision_tower|model\.visual|visual)\..*|(.*\.)?mtp\..*")
_COMPUTED = re.compile(r".*rotary_emb\.inv_freq")
_NESTED = "model.language_model."
_ROOT = "language_model."


def by_module(files: Mapping[str, TensorRef], bones: Skeleton) -> tuple[Modules, list[str]]:
    """A folder's tensors by module of mlx-lm's model, and the names of those that are ignored.

    Some models are inside another model there (`language_model.`); some files leave that out.

    Raises:
        CheckpointError: two tensors have the same place.
    """
    nested = all(name.startswith(_ROOT) for name in bones.shapes)
    modules: Modules = {}
    ignored = []
    for name, tensor in files.items():
        if _COMPUTED.fullmatch(name):
            continue
        if _IGNORED.fullmatch(name):
            ignored.append(name)
            continue
        if nested and name.startswith(_NESTED):
            name = f"{_ROOT}model.{name.removeprefix(_NESTED)}"
        elif nested and not name.startswith(_ROOT):
            name = f"{_ROOT}{name}"
        path, _, leaf = name.rpartition(".")
        if modules.setdefault(path, {}).setdefault(leaf, tensor) is not tensor:
            raise CheckpointError(f"{tensor.where}: duplicate tensor {name}")
    return modules, ignored


def check_rest(
    modules: Modules,
    bones: Skeleton,
    said: Quantization | None,
    ternary: Collection[str],
    beside: Collection[str],
    where: str,
) -> None:
    """Check that no tensor is missing, unknown or of another shape, but for ternary weights.

    Args:
        modules: the tensors.
        bones: mlx-lm's model.
        said: how matrices are quantized.
        ternary: paths of the matrices that are ternary.
        beside: last names of the tensors beside the weights of these.
        where: name of the source in messages.

    Raises:
        CheckpointError: names the first tensor that is wrong.
    """
    expected: dict[str, set[str]] = {}
    convolutions: dict[bool, str] = {}
    for name, shape in bones.shapes.items():
        path, _, leaf = name.rpartition(".")
        expected.setdefault(path, set()).add(leaf)
        tensor = modules.get(path, {}).get(leaf)
        if tensor is None:
            raise CheckpointError(f"{where}: the tensor {name} {shape} is missing")
        if leaf == "weight" and path in ternary:
            expected[path].update(beside)
            continue
        if leaf == "weight" and "scales" in modules[path]:
            _check_quantized(modules[path], shape, said.of(path) if said else None)
            expected[path] |= {"scales", "biases"}
        elif path.endswith(".conv1d") and tensor.shape == (shape[0], shape[2], shape[1]):
            convolutions[True] = tensor.where
        elif tensor.shape != shape:
            raise CheckpointError(f"{tensor.where}: shape {tensor.shape}, expected {shape}")
        elif path.endswith(".conv1d"):
            convolutions[False] = tensor.where
        if leaf != "weight" and tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{tensor.where}: {tensor.dtype}, expected floats")
    if len(convolutions) > 1:
        # mlx-lm transposes the first kind, and then adds 1 to all norms.
        raise CheckpointError(
            f"{convolutions[True]} is in Hugging Face's layout, and {convolutions[False]} in MLX's:"
            " norms have different meanings in them"
        )
    for path, tensors in modules.items():
        for leaf, tensor in tensors.items():
            if leaf not in expected.get(path, ()):
                raise CheckpointError(f"{tensor.where}: not a tensor of this model")


def _check_quantized(
    tensors: Mapping[str, TensorRef], shape: tuple[int, ...], how: Affine | None
) -> None:
    """Check a matrix that stays in MLX's affine format."""
    weight, scales, biases = (tensors.get(leaf) for leaf in ("weight", "scales", "biases"))
    assert weight is not None and scales is not None
    if how is None or how.bits not in AFFINE_BITS or how.group_size not in GROUP_SIZES:
        raise CheckpointError(
            f"{weight.where}: quantized, but config.json does not say how: affine codes of"
            f" {listed(AFFINE_BITS, last='or')} bits in groups of {listed(GROUP_SIZES, last='or')}"
        )
    if biases is None:
        raise CheckpointError(f"{scales.where}: there are no biases beside it")
    *lead, width = shape
    packed = (*lead, width * how.bits // 32)
    groups = (*lead, width // how.group_size)
    weight.require(packed, "U32")
    for tensor in (scales, biases):
        if tensor.shape != groups or tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{tensor.where}: {tensor.dtype} {tensor.shape}, expected floats {groups}"
            )


def check_ternary(
    raw: dict, model: TernaryModel, tensors: Mapping[str, TensorRef], where: str
) -> None:
    """Check that a ternary model's files hold the tensors of mlx-lm's model, and no others.

    Args:
        raw: the model's config.
        model: its ternary matrices, checked against `raw`.
        tensors: all of its tensors.
        where: name of the model in messages.

    Raises:
        CheckpointError: mlx-lm has no such model; or a tensor is missing, unknown, or of another
            shape or dtype; names the first.
    """
    bones = skeleton(raw, len(tensors))
    for path, matrix in model.matrices.items():
        found = bones.matrices.get(path)
        if found is None:
            raise CheckpointError(f"config.json: ternary: {path[:80]}: not a matrix of this model")
        if found.shape != matrix.shape:
            raise CheckpointError(
                f"{matrix.source.where}: rows of trits {matrix.shape}, expected {found.shape}"
            )
    own = {f"{path}.{leaf}" for path in model.matrices for leaf in ("weight", "scales")}
    files = {name: tensors[name] for name in tensors if name in own or name in model.rest}
    modules, _ = by_module(files, bones)
    check_rest(modules, bones, read_quantization(raw), model.matrices, ("scales",), where)
