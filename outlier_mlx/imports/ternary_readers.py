"""How each form of ternary models in folders of safetensors is read: which matrices are ternary."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from outlier_mlx.engine.model_tensors import Modules
from outlier_mlx.engine.skeleton import Skeleton
from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.imports import prism
from outlier_mlx.imports.rotation import Rotations
from outlier_mlx.models import bitnet, prism_pack
from outlier_mlx.models.quantization import read_quantization
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef
from outlier_mlx.storage.ternary_affine import AffineSource
from outlier_mlx.storage.ternary_bitnet import (
    FloatSource,
    MasterWeights,
    NearHalf,
    PackedBitnet,
)
from outlier_mlx.storage.ternary_matrix import (
    GROUPS,
    NotTernary,
    TernaryMatrix,
    TernarySource,
    settled,
)
from outlier_mlx.terminal import Progress

#: Bits of MLX's codes that may be ternary.
BITS = 2


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


@dataclass
class Reader(ABC):
    """Finds the ternary matrices of a form.

    Attributes:
        folder: the source.
        raw: its config.
        modules: its tensors; those that no other model needs are removed.
        bones: mlx-lm's model.
        in_order: computes calls in several threads.
        quick: as for `ternary_matrix.settled`.
        progress: called with `examined`, the bytes examined so far, and None.
        found: what is found.
    """

    folder: Path
    raw: dict
    modules: Modules
    bones: Skeleton
    in_order: Callable
    quick: bool
    progress: Progress
    found: Found = field(default_factory=Found)
    examined: int = 0

    @abstractmethod
    def read(self) -> Found:
        """All of it."""

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
        matrix = settled(source, self.in_order, quick=self.quick)
        self.examined += source.nbytes
        self.progress(self.examined, None)
        return matrix

    def check_shape(self, tensor: TensorRef, path: str, shape: tuple[int, ...]) -> None:
        """Refuse a matrix of another shape than the model's."""
        if shape != (expected := self.bones.matrices[path].shape):
            raise CheckpointError(f"{tensor.where}: holds {shape} weights, expected {expected}")


class _Mlx(Reader):
    """MLX's affine format: each 2-bit matrix with groups of 64 or 128 is tested."""

    def read(self) -> Found:
        said, found, groups = read_quantization(self.raw), self.found, set[int]()
        for path, tensors in self.modules.items():
            weight = tensors.get("weight")
            if said is None or weight is None or weight.dtype != "U32":
                continue
            how = said.of(path)
            if how is None or how.bits != BITS:
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


class _Prism(Reader):
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


class _Bitnet(Reader):
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
            source = PackedBitnet.of(tensors["weight"], scale, shape, settings.divides)
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


class _Floats(Reader):
    """Floats that are ternary: unpacked models."""

    def read(self) -> Found:
        found = self.found
        for path in self.bones.matrices:
            weight = self.modules.get(path, {}).get("weight")
            source = FloatSource.of(weight) if weight is not None else None
            if weight is None or source is None:
                continue
            self.check_shape(weight, path, weight.shape)
            try:
                found.matrices[path] = self.settled(source)
            except NotTernary as error:
                found.kept[path] = str(error)
        found.form = "ternary weights as floats"
        return found


#: The reader of each form.
READERS: dict[str, type[Reader]] = {
    "mlx": _Mlx,
    "prism": _Prism,
    "bitnet": _Bitnet,
    "floats": _Floats,
}
