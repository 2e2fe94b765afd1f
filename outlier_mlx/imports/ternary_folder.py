"""Open folders of safetensors whose weights are ternary, for writing them as packed rows.

Four forms: MLX packs of 2-bit codes, tensor by tensor; the rotated packs of PrismML; BitNet and
Falcon, packed or as master weights; unpacked floats that are ternary. What decides how matrices are
stored is examined before anything is written.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from outlier_mlx.engine.model_tensors import Modules, by_module, check_rest
from outlier_mlx.engine.skeleton import skeleton
from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.imports import prism
from outlier_mlx.imports.opened import Opened
from outlier_mlx.imports.ternary_readers import BITS, READERS, Found
from outlier_mlx.imports.ternary_tensors import kept_parts
from outlier_mlx.models import bitnet, prism_pack
from outlier_mlx.models.fields import short
from outlier_mlx.models.quantization import Quantization, check_quantization, read_quantization
from outlier_mlx.models.spelling import normalised, without_nulls
from outlier_mlx.models.summary import kind_of
from outlier_mlx.models.ternary_fields import TernaryFields, TernaryModule
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.ternary_bitnet import FloatSource
from outlier_mlx.storage.ternary_matrix import (
    NotTernary,
    slabs,
)
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.assets import copy_assets
from outlier_mlx.writing.parts import Part, ahead, reading_pool
from outlier_mlx.writing.ternary_parts import TernaryPart

# Fields of a config that say how weights were stored, or name code.
_DROPPED = ("quantization", "quantization_config", "auto_map", "model_file")
# Formats of other packers, by names that stand in their configs.
_OTHER_PACKERS = ("ternary_packed_26b", "jang", "gbx", "pq2_0", "ptq1_0", "kquant")


def is_ternary_source(raw: Mapping[str, Any]) -> bool:
    """Whether a config is that of one of the forms that this module opens.

    Raises:
        CheckpointError: it is that of a form that is known, and not supported.
    """
    _refuse_other_packers(raw)
    check_quantization(raw)
    said = read_quantization(raw)
    if raw.get("model_type") == prism_pack.MODEL_TYPE or bitnet.is_bitnet(raw):
        return True
    return said is not None and any(
        how is not None and how.bits == BITS for how in (said.default, *said.by_path.values())
    )


def holds_ternary_floats(folder: Path, raw: Mapping[str, Any]) -> bool:
    """Whether a model that is not quantized has ternary weights, by the first matrix of a layer.

    Raises:
        CheckpointError: the files are damaged; or it is a Falcon whose weights were rounded.
    """
    if "quantization" in raw or "quantization_config" in raw:
        return False
    for name, tensor in read_shards(folder).items():
        source = FloatSource.of(tensor) if ".layers." in name and "weight" in name else None
        if source is None:
            continue
        try:
            source.examine(*next(slabs(source)))
        except NotTernary:
            if raw.get("is_bitnet_config"):
                raise CheckpointError(
                    f"{tensor.where}: not ternary: the weights of this revision were rounded;"
                    " import the packed model, revision main"
                ) from None
            return False
        return True
    return False


def _refuse_other_packers(raw: Mapping[str, Any]) -> None:
    for name in ("quantization", "quantization_config", "format", "weight_format"):
        given = raw.get(name)
        values = given if isinstance(given, dict) else {name: given}
        for text in (*values, *values.values()):
            if isinstance(text, str) and any(sign in text.lower() for sign in _OTHER_PACKERS):
                raise CheckpointError(
                    f"config.json: {name}: {short(text)} is the format of another packer, which is"
                    " not supported"
                )


def open_ternary_folder(
    folder: Path,
    raw: dict,
    *,
    strict: bool = False,
    quick: bool = False,
    progress: Progress = no_progress,
) -> Opened:
    """Open a folder for which `is_ternary_source` or `holds_ternary_floats` holds.

    Args:
        folder: with config.json and safetensors.
        raw: the config.
        strict: refuse quantized matrices that are not ternary, rather than keep them.
        quick: see `Opened.glanced`.
        progress: called with bytes examined so far, and None.

    Raises:
        CheckpointError: nothing is ternary, or a tensor or field is not as it should be.
    """
    files = read_shards(folder)
    config, reader = raw, READERS["mlx"]
    if raw.get("model_type") == prism_pack.MODEL_TYPE:
        prism.read_modules(raw)  # before a model is made of it
        config = {k: v for k, v in raw.items() if k not in prism.OWN_FIELDS}
        config["model_type"], reader = prism_pack.BASE_TYPE, READERS["prism"]
    elif bitnet.is_bitnet(raw):
        bitnet.read_settings(raw)
        reader = READERS["bitnet"]
    elif read_quantization(raw) is None:
        reader = READERS["floats"]
    config = without_nulls(normalised({k: v for k, v in config.items() if k not in _DROPPED}))
    bones = skeleton(config, len(files))
    modules, ignored = by_module(files, bones)
    with TemporaryDirectory(prefix="outlier-mlx-") as scratch:
        copy_assets([folder], Path(scratch))  # what is wrong with them is said before long reading
    with reading_pool() as pool:
        found = reader(folder, raw, modules, bones, partial(ahead, pool), quick, progress).read()
    if not found.matrices:
        reason = next(iter(found.kept.values()), "it has no packed matrix")
        raise CheckpointError(f"{folder.name}: no matrix is ternary: {reason}")
    if strict and found.kept:
        raise CheckpointError(f"--strict: {next(iter(found.kept.values()))}")
    said = None if found.schema else read_quantization(raw)
    check_rest(modules, bones, said, found.matrices, ("scales", "biases"), folder.name)
    parts: list[Part] = list(found.rotations.parts())
    for path, tensors in modules.items():
        if path in found.matrices:
            matrix = found.matrices[path]
            parts.append(TernaryPart(path, kind_of(f"{path}.weight"), matrix))
            tensors = {leaf: tensor for leaf, tensor in tensors.items() if leaf == "bias"}
        parts += kept_parts(path, tensors, said)
    return Opened(
        source_format=found.form,
        parts=parts,
        config=config | _fields(found, raw, modules, said),
        assets=lambda target: copy_assets([folder], target),
        notes=lambda: _notes(found, ignored),
        details={"ternary": len(found.matrices), "kept": list(found.kept)},
        glanced=any(matrix.glanced for matrix in found.matrices.values()),
    )


def _fields(
    found: Found, raw: Mapping, modules: Modules, said: Quantization | None
) -> dict[str, Any]:
    """The fields `ternary` and `quantization` of the config."""
    ternary = {
        path: TernaryModule(matrix.shape[1], matrix.scales.group, found.rotated.get(path))
        for path, matrix in found.matrices.items()
    }
    fields = TernaryFields(ternary, found.rotations.rotations, found.schema)
    result = {"ternary": fields.spelled()}
    affine = {p for p, tensors in modules.items() if "scales" in tensors} - ternary.keys()
    if said is None or not affine:
        return result
    given = raw.get("quantization") or raw["quantization_config"]
    usual = {name: given[name] for name in ("group_size", "bits")}
    own = {path: given[path] for path in given if path in affine}
    return result | {"quantization": usual | {"mode": "affine"} | own}


def _notes(found: Found, ignored: list[str]) -> list[str]:
    notes = []
    if found.kept:
        notes.append(f"not ternary, and kept as they are: {listed(found.kept, 4)}")
    if ignored:
        notes.append(f"ignored: tensors for images or drafts: {listed(ignored, 3)}")
    if found.near_half is not None:
        notes.append(
            "rounded from master weights as the model does when it is loaded;"
            f" {found.near_half.count} of them lie so near to a half that another order of"
            " summation could change their trit"
        )
    return notes
