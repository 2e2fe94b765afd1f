"""Which tensors of a GGUF model are ternary matrices, and how they are rotated."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from outlier_mlx.engine.skeleton import skeleton
from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.imports.gguf_names import AnyRows, Names
from outlier_mlx.imports.gguf_qwen35 import OUT_PROJ, Qwen35Names
from outlier_mlx.imports.rotation import EMBEDDING, PREFIX, Hadamard, Rotations, read_hadamard
from outlier_mlx.models.modules import Module
from outlier_mlx.models.summary import kind_of
from outlier_mlx.models.ternary_fields import TernaryFields, TernaryModule
from outlier_mlx.storage.gguf import GgufTensor
from outlier_mlx.storage.gguf_model import GgufModel
from outlier_mlx.storage.ternary_blocks import TYPES, BlockSource
from outlier_mlx.storage.ternary_matrix import NotTernary, TernaryMatrix, settled
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.parts import ahead, reading_pool

# Tensors whose products llama.cpp rotates the input of.
_ROTATED = re.compile(
    r"output\.weight|blk\.[0-9]+\.(attn_(q|k|v|qkv|gate|output)|ffn_(gate|up|down)|ssm_out)\.weight"
)
_ROTATED_ARCHITECTURES = ("llama", "qwen3", "qwen35")
_HEAD = "output.weight"
_SSM_OUT = re.compile(r"blk\.[0-9]+\.ssm_out\.weight")


@dataclass(frozen=True)
class Candidate:
    """A module that may be a ternary matrix.

    Attributes:
        module: the module.
        rows: the rows of its weight; none for a bias.
        factor: the tensor with the number that the weight is multiplied by, if there is one.
    """

    module: Module
    rows: Sequence[AnyRows]
    factor: GgufTensor | None = None


@dataclass
class Matrices:
    """The ternary matrices of a model.

    Attributes:
        found: by path of the module.
        rotated: the number of the rotation of each rotated one, by path.
        rotations: the rotations.
    """

    found: dict[str, TernaryMatrix] = field(default_factory=dict)
    rotated: dict[str, int] = field(default_factory=dict)
    rotations: Rotations = field(default_factory=Rotations)

    def fields(self) -> TernaryFields:
        """The field `ternary` of the config."""
        modules = {
            path: TernaryModule(matrix.shape[1], matrix.scales.group, self.rotated.get(path))
            for path, matrix in self.found.items()
        }
        return TernaryFields(modules, self.rotations.rotations)


def modules_of(config: dict[str, Any], tensors: int) -> list[Module]:
    """The modules of mlx-lm's model that store weights, for models that are in no family.

    Args:
        config: a config.json.
        tensors: number of tensors of the file, which bounds the number of layers.
    """
    modules = []
    for name, shape in skeleton(config, tensors).shapes.items():
        path, _, leaf = name.rpartition(".")
        modules.append(Module(path, kind_of(name), shape, leaf=leaf))
    return modules


def rotation_of(model: GgufModel, kind: str) -> Hadamard | None:
    """What metadata says of a rotation; None if there is none.

    Raises:
        CheckpointError: it is not sound, or no rotated models of this architecture are known.
    """
    found = read_hadamard(model.fields, model.where)
    if found is not None and kind not in _ROTATED_ARCHITECTURES:
        raise CheckpointError(f"{model.where}: {PREFIX}*: a rotated {kind} model is not supported")
    return found


def check_rotated(hadamard: Hadamard, model: GgufModel, names: Names | Qwen35Names) -> None:
    """Check the tensors that metadata says are rotated.

    Raises:
        CheckpointError: names a tensor that is not there, or that is never rotated.
    """
    where = f"{model.where}: {PREFIX}"
    for name in hadamard.weights:
        if not _ROTATED.fullmatch(name):
            raise CheckpointError(f"{where}weight_names: {name[:80]}: no matrix that is rotated")
        if name not in model.tensors:
            raise CheckpointError(f"{where}weight_names: {name[:80]}: not in the file")
        hadamard.signs_of(name, model.tensors[name].shape[-1])
    for name in hadamard.inverse:
        if name != EMBEDDING:
            raise CheckpointError(
                f"{where}inverse_weight_names: {name[:80]}, expected only {EMBEDDING}"
            )
        hadamard.signs_of(name, model.tensors[name].shape[-1])
    if hadamard.tied and _HEAD in model.tensors:
        raise CheckpointError(f"{where}tied_output, but the file has {_HEAD}")
    if hadamard.tied and not hadamard.inverse:
        raise CheckpointError(f"{where}tied_output, but {EMBEDDING} is not rotated")
    if hadamard.inverse and _HEAD not in model.tensors and not hadamard.tied:
        raise CheckpointError(
            f"{where}version 1 with a rotated {EMBEDDING} and no {_HEAD}: the head would be rotated"
            " as well, which needs version 2"
        )
    repeats = isinstance(names, Qwen35Names) and names.repeats > 1
    if repeats and not hadamard.grouped and any(map(_SSM_OUT.fullmatch, hadamard.weights)):
        raise CheckpointError(
            f"{where}gdn_v_grouped is missing or false, but ssm_out is rotated and there are more"
            " value heads than key heads"
        )


def ternary_matrices(
    candidates: Iterable[Candidate],
    names: Names | Qwen35Names,
    hadamard: Hadamard | None,
    *,
    strict: bool,
    quick: bool = False,
    progress: Progress = no_progress,
) -> Matrices:
    """Examine all matrices in ternary blocks.

    Args:
        candidates: the model's modules.
        names: what found their tensors.
        hadamard: what metadata says of rotations.
        strict: refuse quantized matrices of other types.
        quick: as for `settled`.
        progress: called with bytes examined so far, and None.

    Raises:
        CheckpointError: a matrix has a code that is no trit, or a scale that is not finite; or a
            matrix is rotated, or multiplied by a number, and not ternary.
    """
    made = Matrices()
    turned = {*hadamard.weights, *hadamard.inverse} if hadamard is not None else set()
    wrong: dict[str, str] = {}
    examined = 0
    with reading_pool() as pool:
        for candidate in candidates:
            module, rows, factor = candidate.module, candidate.rows, candidate.factor
            if len(rows) != 1:
                continue
            tensor = rows[0].tensor
            if tensor.kind not in TYPES or len(module.shape) != 2:
                _refuse_other(tensor, factor, tensor.name in turned, strict=strict)
                if module.path.endswith(OUT_PROJ):
                    _refuse_tiled(tensor, names)
                continue
            source = _source(module, rows[0], factor, names, tensor.name in turned)
            try:
                made.found[module.path] = settled(source, partial(ahead, pool), quick=quick)
            except NotTernary as error:
                wrong[tensor.name] = str(error)
                continue
            examined += source.nbytes
            progress(examined, None)
            if hadamard is not None and tensor.name in turned:
                width = tensor.shape[-1]
                signs = hadamard.signs_of(tensor.name, width)
                number = made.rotations.number(width, hadamard.block, signs)
                made.rotated[module.path] = number
    if wrong:
        first, *others = wrong
        more = f"; so have {listed(others, 4)}" if others else ""
        raise CheckpointError(f"{wrong[first]}{more}")
    return made


def _source(
    module: Module,
    rows: AnyRows,
    factor: GgufTensor | None,
    names: Names | Qwen35Names,
    rotated: bool,
) -> BlockSource:
    number = None
    if factor is not None:
        number = factor.read().view("<f4")[0, 0]
        if factor.kind != "F32" or not np.isfinite(number):
            raise CheckpointError(f"{factor.where}: expected a finite float32, got {number}")
    if not isinstance(names, Qwen35Names) or not module.path.endswith(OUT_PROJ) or rotated:
        return BlockSource(rows, number)
    if not names.is_tiled:
        return BlockSource(rows, number)
    head = module.shape[1] // len(names.order)
    if head % 64:
        raise CheckpointError(
            f"{rows.tensor.where}: value heads of {head}, which is not a multiple of 64, are in"
            " another order than MLX's: groups of weights would be torn apart"
        )
    return BlockSource(rows, number, head, names.order)


def _refuse_other(
    tensor: GgufTensor, factor: GgufTensor | None, rotated: bool, *, strict: bool
) -> None:
    types = listed(TYPES, last="or")
    if rotated:
        raise CheckpointError(f"{tensor.where}: rotated, but {tensor.kind}; expected {types}")
    if factor is not None:
        raise CheckpointError(f"{factor.where}: beside a matrix in {tensor.kind}; expected {types}")
    if strict and tensor.block > 1:
        raise CheckpointError(f"--strict: {tensor.where}: {tensor.kind} is not ternary")


def _refuse_tiled(tensor: GgufTensor, names: Names | Qwen35Names) -> None:
    if isinstance(names, Qwen35Names) and names.is_tiled:
        raise CheckpointError(
            f"{tensor.where}: {tensor.kind}: its columns are in another order than MLX's, which is"
            " changed only in ternary matrices"
        )
