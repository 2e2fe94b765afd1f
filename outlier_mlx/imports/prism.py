"""The manifest of `prism_hadamard_qwen35` packs: which modules are packed, and how rotated.

The rules are those of mlx-lm 0.32's `models/prism_hadamard_qwen35.py`, and stricter where mlx-lm
would run a module without its rotation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outlier_mlx.engine.skeleton import Matrix
from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.imports.rotation import PREFIX, sign_vectors
from outlier_mlx.models.fields import short
from outlier_mlx.models.prism_pack import BLOCKS, NAMESPACES, QUANTIZATION, ROOT
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.rounding import widened
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef
from outlier_mlx.storage.texts import read_json

#: Fields of a pack's config that its text model does not have.
OWN_FIELDS = (
    *("base_model_type", "schema_version", "tensor_namespace", "gdn_activation_layout"),
    *("hadamard_config", "modules"),
)
_WHERE = "config.json"


@dataclass(frozen=True)
class PackedModule:
    """A module of the manifest.

    Attributes:
        path: its path in the text model.
        block: columns that are transformed together; 0: it is not rotated.
        embedding: whether it is an embedding.
    """

    path: str
    block: int
    embedding: bool


def read_modules(raw: Mapping) -> list[PackedModule]:
    """Check a pack's config, and read its manifest.

    Raises:
        CheckpointError: names the field, or the module.
    """
    schema, namespace = raw.get("schema_version", 2), raw.get("tensor_namespace", "")
    if type(schema) is not int or schema not in NAMESPACES:
        raise CheckpointError(f"{_WHERE}: schema_version {short(schema)}, expected 1 or 2")
    if namespace != NAMESPACES[schema]:
        raise CheckpointError(
            f"{_WHERE}: tensor_namespace {short(namespace)}, expected {NAMESPACES[schema]!r} with"
            f" schema_version {schema}"
        )
    layout = raw.get("gdn_activation_layout", "grouped")
    if layout != "grouped":
        raise CheckpointError(
            f"{_WHERE}: gdn_activation_layout {short(layout)}, expected 'grouped'"
        )
    quantization = raw.get("quantization")
    if quantization != QUANTIZATION:
        raise CheckpointError(
            f"{_WHERE}: quantization {short(quantization)}: packs have bits 2, group_size 128 and"
            " mode affine"
        )
    inner = raw.get("text_config")
    if not isinstance(inner, dict):
        raise CheckpointError(f"{_WHERE}: text_config is missing")
    if inner.get("num_experts"):
        raise CheckpointError(
            f"{_WHERE}: text_config: num_experts {short(inner['num_experts'])}: packs with experts"
            " are not known"
        )
    modules = raw.get("modules")
    if not isinstance(modules, list) or not modules:
        raise CheckpointError(f"{_WHERE}: modules must list the packed modules")
    found: dict[str, PackedModule] = {}
    for item in modules:
        module = _module(item)
        if module.path in found:
            raise CheckpointError(f"{_WHERE}: modules: {module.path[:80]} is listed twice")
        found[module.path] = module
    return list(found.values())


def _module(item: object) -> PackedModule:
    values = item if isinstance(item, dict) else {}
    path, block, embedding = (values.get(name) for name in ("path", "block", "embedding"))
    if not isinstance(path, str) or not isinstance(embedding, bool):
        raise CheckpointError(f"{_WHERE}: modules: {short(item)}: path and embedding were expected")
    if type(block) is not int or block not in BLOCKS:
        raise CheckpointError(
            f"{_WHERE}: modules: {path[:80]}: block {short(block)}, expected"
            f" {listed(BLOCKS, last='or')}"
        )
    if values.get("dtype") != "float16":
        raise CheckpointError(
            f"{_WHERE}: modules: {path[:80]}: dtype {short(values.get('dtype'))}, expected"
            " 'float16'"
        )
    return PackedModule(path, block, embedding)


def check_module(module: PackedModule, matrices: Mapping[str, Matrix]) -> Matrix:
    """Check a module of the manifest against the model; returns its matrix there.

    Raises:
        CheckpointError: there is no such matrix, it is of another kind, or does not fit the block.
    """
    where = f"{_WHERE}: modules: {module.path[:80]}"
    matrix = matrices.get(f"{ROOT}{module.path}")
    if matrix is None:
        raise CheckpointError(f"{where}: the model has no linear layer or embedding of this name")
    if matrix.embedding != module.embedding:
        kind = "an embedding" if matrix.embedding else "a linear layer"
        raise CheckpointError(f"{where}: embedding is {module.embedding}, but it is {kind}")
    if matrix.bias:
        raise CheckpointError(f"{where}: a packed linear layer with a bias is not supported")
    width = matrix.shape[1]
    if width % 128:
        raise CheckpointError(f"{where}: its input width {width} is not a multiple of 128")
    if module.block and width % module.block:
        raise CheckpointError(f"{where}: block {module.block} does not divide the width {width}")
    return matrix


def read_signs(tensor: TensorRef, width: int) -> np.ndarray:
    """The signs of a module, (width,) int8.

    Raises:
        CheckpointError: another shape, or a value that is not 1 or -1.
    """
    if tensor.shape != (width,):
        raise CheckpointError(f"{tensor.where}: shape {tensor.shape}, expected {(width,)}")
    values = tensor.read()
    if tensor.dtype in FLOAT_DTYPES:
        values = widened(values, "bfloat16") if tensor.dtype == "BF16" else values
    wrong = (values != 1) & (values != -1)
    if wrong.any():
        at = int(wrong.argmax())
        raise CheckpointError(f"{tensor.where}: value {at} is {values[at]}, expected 1 or -1")
    return values.astype(np.int8)


def check_beside(folder: Path, raw: Mapping, signs: Mapping[str, np.ndarray]) -> None:
    """Check `hadamard.json`, which mlx-lm does not read, against the signs in the files.

    Args:
        folder: the pack.
        raw: its config.
        signs: the signs of rotated modules by path.

    Raises:
        CheckpointError: it has other signs for the width of a module.
    """
    name = raw.get("hadamard_config", "hadamard.json")
    if not isinstance(name, str) or not (folder / name).is_file():
        return
    fields = {k.removeprefix(PREFIX): v for k, v in read_json(inside(folder, name)).items()}
    said = sign_vectors(fields, f"{name}: {PREFIX}")
    for path, vector in signs.items():
        stated = said.get(len(vector)) if said is not None else np.ones_like(vector)
        if stated is None or not np.array_equal(stated, vector):
            raise CheckpointError(
                f"{name}: {PREFIX}sign_values: other signs for the width {len(vector)} than those"
                f" of {path}"
            )
