"""Open folders of safetensors whose weights are ternary, for writing them as packed rows.

Four forms: MLX packs of 2-bit codes, tensor by tensor; the rotated packs of PrismML; BitNet and
Falcon, packed or as master weights; unpacked floats that are ternary. Everything is examined before
anything is written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from outlier_mlx.engine.model_tensors import Modules, by_module, check_rest
from outlier_mlx.engine.skeleton import Skeleton, skeleton
from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.imports import bitnet, prism
from outlier_mlx.imports.opened import Opened
from outlier_mlx.imports.rotation import Rotations
from outlier_mlx.imports.ternary_tensors import kept_parts
from outlier_mlx.models import prism_pack
from outlier_mlx.models.fields import short
from outlier_mlx.models.quantization import Quantization, check_quantization, read_quantization
from outlier_mlx.models.spelling import normalised, without_nulls
from outlier_mlx.models.summary import kind_of
from outlier_mlx.models.ternary_fields import TernaryFields, TernaryModule
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.ternary_affine import HALVES, AffineSource
from outlier_mlx.storage.ternary_bitnet import FloatSource, MasterWeights, NearHalf
from outlier_mlx.storage.ternary_matrix import (
    GROUPS,
    NotTernary,
    TernaryMatrix,
    TernarySource,
    settled,
    slabs,
)
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.assets import copy_assets
from outlier_mlx.writing.parts import Part, ahead, reading_pool
from outlier_mlx.writing.ternary_parts import TernaryPart

_BITS = 2
# Fields of a config that say how weights were stored, or name code.
_DROPPED = ("quantization", "quantization_config", "auto_map", "model_file")
# Formats of other packers, by names that stand in their configs.
_OTHER_PACKERS = ("ternary_packed_26b", "jang", "gbx", "pq2_0", "ptq1_0", "kquant")


@dataclass
class Found:
    """What is in a folder.

    Attributes:
        form: what it is called.
        matrices: its ternary matrices, by path.
        rotated: the number of the rotation of each rotated matrix, by path.
        rotations: the rotations.
        kept: why quantized matrices are not ternary, by path.
        near_half: of master weights, see `NearHalf`.
        schema: of a rotated pack, its schema.
    """

    form: str = ""
    matrices: dict[str, TernaryMatrix] = field(default_factory=dict)
    rotated: dict[str, int] = field(default_factory=dict)
    rotations: Rotations = field(default_factory=Rotations)
    kept: dict[str, str] = field(default_factory=dict)
    near_half: NearHalf | None = None
    schema: int | None = None


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
        how is not None and how.bits == _BITS for how in (said.default, *said.by_path.values())
    )


def holds_ternary_floats(folder: Path, raw: Mapping[str, Any]) -> bool:
    """Whether a model that is not quantized has ternary weights, by the first matrix of a layer.

    Raises:
        CheckpointError: the files are damaged; or it is a Falcon whose weights were rounded.
    """
    if "quantization" in raw or "quantization_config" in raw:
        return False
    for name, tensor in read_shards(folder).items():
        source = _float_source(tensor) if ".layers." in name and "weight" in name else None
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


def _float_source(tensor: TensorRef) -> FloatSource | None:
    """A matrix of 16-bit floats in the largest groups that fit; None if it is no such matrix."""
    if tensor.dtype not in HALVES or len(tensor.shape) != 2 or not tensor.shape[1]:
        return None
    group = next((size for size in reversed(GROUPS) if tensor.shape[1] % size == 0), None)
    return None if group is None else FloatSource(tensor, group, HALVES[tensor.dtype])


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
    folder: Path, raw: dict, *, strict: bool = False, progress: Progress = no_progress
) -> Opened:
    """Open a folder for which `is_ternary_source` or `holds_ternary_floats` holds.

    Args:
        folder: with config.json and safetensors.
        raw: the config.
        strict: refuse quantized matrices that are not ternary, rather than keep them.
        progress: called with bytes examined so far, and None.

    Raises:
        CheckpointError: nothing is ternary, or a tensor or field is not as it should be.
    """
    files = read_shards(folder)
    config, reader = raw, _READERS["mlx"]
    if raw.get("model_type") == prism_pack.MODEL_TYPE:
        prism.read_modules(raw)  # before a model is made of it
        config = {k: v for k, v in raw.items() if k not in prism.OWN_FIELDS}
        config["model_type"], reader = prism_pack.BASE_TYPE, _READERS["prism"]
    elif bitnet.is_bitnet(raw):
        bitnet.read_settings(raw)
        reader = _READERS["bitnet"]
    elif read_quantization(raw) is None:
        reader = _READERS["floats"]
    config = without_nulls(normalised({k: v for k, v in config.items() if k not in _DROPPED}))
    bones = skeleton(config, len(files))
    modules, ignored = by_module(files, bones)
    with reading_pool() as pool:
        found = reader(folder, raw, modules, bones, partial(ahead, pool), progress).read()
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


@dataclass
class _Reader:
    """Finds the ternary matrices of a form.

    Attributes:
        folder: the source.
        raw: its config.
        modules: its tensors; those that no other model needs are removed.
        bones: mlx-lm's model.
        in_order: computes calls in several threads.
        progress: called with `examined`, the bytes examined so far, and None.
        found: what is found.
    """

    folder: Path
    raw: dict
    modules: Modules
    bones: Skeleton
    in_order: Callable
    progress: Progress
    found: Found = field(default_factory=Found)
    examined: int = 0

    def read(self) -> Found:
        """All of it."""
        raise NotImplementedError

    def affine(self, path: str, group: int) -> TernaryMatrix:
        """A matrix of 2-bit codes, examined.

        Raises:
            NotTernary: it holds other values.
            CheckpointError: a tensor is missing, has another shape, or is not finite.
        """
        tensors = self.modules.get(path, {})
        leaves = ("weight", "scales", "biases")
        missing = [leaf for leaf in leaves if leaf not in tensors]
        if missing:
            raise CheckpointError(f"{self.folder.name}: {path}.{missing[0]} is missing")
        weight, scales, biases = (tensors[leaf] for leaf in leaves)
        source = AffineSource.of(weight, scales, biases, group)
        self.check_shape(tensors["weight"], path, source.shape)
        return self.settled(source)

    def settled(self, source: TernarySource) -> TernaryMatrix:
        """A matrix, examined; raises like `ternary_matrix.settled`."""
        matrix = settled(source, self.in_order)
        self.examined += source.nbytes
        self.progress(self.examined, None)
        return matrix

    def check_shape(self, tensor: TensorRef, path: str, shape: tuple[int, ...]) -> None:
        """Refuse a matrix of another shape than the model's."""
        if shape != (expected := self.bones.matrices[path].shape):
            raise CheckpointError(f"{tensor.where}: holds {shape} weights, expected {expected}")


class _Mlx(_Reader):
    """MLX's affine format: each 2-bit matrix with groups of 64 or 128 is tested."""

    def read(self) -> Found:
        said, found, groups = read_quantization(self.raw), self.found, set[int]()
        for path, tensors in self.modules.items():
            weight = tensors.get("weight")
            if said is None or weight is None or weight.dtype != "U32":
                continue
            how = said.of(path)
            if how is None or how.bits != _BITS:
                continue
            if how.group_size not in GROUPS or path not in self.bones.matrices:
                found.kept[path] = f"{weight.where}: 2-bit codes in groups of {how.group_size}"
                continue
            try:
                found.matrices[path] = self.affine(path, how.group_size)
                groups.add(how.group_size)
            except NotTernary as error:
                found.kept[path] = str(error)
        found.form = f"MLX 2-bit codes in groups of {listed(sorted(groups))}"
        return found


class _Prism(_Reader):
    """A rotated pack: what its manifest lists, all of it, must be ternary."""

    def read(self) -> Found:
        found, signs = self.found, {}
        for module in prism.read_modules(self.raw):
            matrix = prism.check_module(module, self.bones.matrices)
            path, width = f"{prism_pack.ROOT}{module.path}", matrix.shape[1]
            stored = self.modules.get(path, {}).pop("signs", None)
            if module.block:
                if stored is None:
                    raise CheckpointError(f"{self.folder.name}: {path}.signs is missing")
                signs[path] = prism.read_signs(stored, width)
                found.rotated[path] = found.rotations.number(width, module.block, signs[path])
            elif stored is not None:
                raise CheckpointError(f"{stored.where}: signs of a module that is not rotated")
            found.matrices[path] = self.affine(path, prism_pack.GROUP)
        for path, tensors in self.modules.items():
            weight = tensors.get("weight")
            if path not in found.matrices and weight is not None and weight.dtype == "U32":
                raise CheckpointError(
                    f"{weight.where}: packed, but config.json: modules does not list it"
                )
        prism.check_beside(self.folder, self.raw, signs)
        found.schema = self.raw.get("schema_version", 2)
        found.form = f"rotated MLX 2-bit codes (schema {found.schema})"
        return found


class _Bitnet(_Reader):
    """BitNet and Falcon: what is packed; or all linear layers but the head as master weights."""

    def read(self) -> Found:
        settings, found = bitnet.read_settings(self.raw), self.found
        packed = {
            path: tensors
            for path, tensors in self.modules.items()
            if "weight" in tensors and tensors["weight"].dtype == "U8"
        }
        if packed and settings.online:
            raise CheckpointError(
                "config.json: quantization_config: quantization_mode online is for master weights,"
                f" but {next(iter(packed.values()))['weight'].where} is packed"
            )
        for path, tensors in packed.items():
            if path not in self.bones.matrices or self.bones.matrices[path].embedding:
                raise CheckpointError(
                    f"{tensors['weight'].where}: not a linear layer of this model"
                )
            shape, scale = self.bones.matrices[path].shape, tensors.pop("weight_scale", None)
            source = bitnet.packed_source(tensors["weight"], scale, shape, settings.divides)
            found.matrices[path] = self.settled(source)
        found.form = "packed BitNet"
        if not packed:
            self._read_master(settings)
        return found

    def _read_master(self, settings: bitnet.BitnetSettings) -> None:
        found = self.found
        found.form, found.near_half = "BitNet master weights", NearHalf()
        for path, matrix in self.bones.matrices.items():
            skipped = path == "lm_head" or any(name in path for name in settings.unconverted)
            weight = self.modules.get(path, {}).get("weight")
            if matrix.embedding or skipped or weight is None:
                continue
            if weight.dtype not in FLOAT_DTYPES:
                raise CheckpointError(f"{weight.where}: {weight.dtype}, expected floats")
            self.check_shape(weight, path, weight.shape)
            source = MasterWeights.of(weight, found.near_half, self.in_order)
            found.matrices[path] = self.settled(source)


class _Floats(_Reader):
    """Floats that are ternary: unpacked models."""

    def read(self) -> Found:
        found = self.found
        for path in self.bones.matrices:
            weight = self.modules.get(path, {}).get("weight")
            source = _float_source(weight) if weight is not None else None
            if weight is None or source is None:
                continue
            self.check_shape(weight, path, weight.shape)
            try:
                found.matrices[path] = self.settled(source)
            except NotTernary as error:
                found.kept[path] = str(error)
        found.form = "ternary weights as floats"
        return found


_READERS: dict[str, type[_Reader]] = {
    "mlx": _Mlx,
    "prism": _Prism,
    "bitnet": _Bitnet,
    "floats": _Floats,
}
