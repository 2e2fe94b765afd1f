"""Whether a model's quantized matrices are ternary, and what they would take as packed rows.

Headers say what a form can hold; the codes, which `deep` reads, what it does hold.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any

from outlier_mlx.checkpoints.ternary_model import TernaryModel
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.quantization import read_quantization
from outlier_mlx.models.ternary_fields import module_tensors
from outlier_mlx.storage.gguf_model import GgufModel
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, NUMPY_DTYPES, TensorRef
from outlier_mlx.storage.ternary_affine import HALVES, AffineSource
from outlier_mlx.storage.ternary_bitnet import PackedBitnet
from outlier_mlx.storage.ternary_blocks import TYPES, BlockSource, WholeTensor
from outlier_mlx.storage.ternary_matrix import (
    GROUPS,
    NotTernary,
    Scales,
    Seen,
    TernarySource,
    settled,
    with_scales,
)
from outlier_mlx.writing.parts import ahead, reading_pool

_MASTER = "master weights"


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix of a model.

    Attributes:
        name: path of its module, or name of its tensor in a GGUF file.
        shape: (out, in).
        form: how it is stored, such as "2-bit codes, groups of 128" or "TQ1_0".
        ternary: whether it is; None: headers do not say.
        reason: why it is not, if the codes were read.
        nbytes: bytes of all its tensors.
        group_size: as packed rows: weights that share a scale, 0 for one scale a row; None if it
            is not ternary.
        packed_nbytes: bytes as packed rows; None if it is not ternary.
    """

    name: str
    shape: tuple[int, ...]
    form: str
    ternary: bool | None
    reason: str | None
    nbytes: int
    group_size: int | None
    packed_nbytes: int | None


@dataclass(frozen=True)
class TernaryInfo:
    """What is known of a model's quantized matrices.

    Attributes:
        matrices: all of them, in the order of the files.
        deep: whether their codes were read.
    """

    matrices: list[QuantizedMatrix]
    deep: bool

    def of(self, ternary: bool | None) -> list[QuantizedMatrix]:
        """Those that are ternary, are not, or of which this is not known."""
        return [matrix for matrix in self.matrices if matrix.ternary is ternary]

    @property
    def possible(self) -> list[QuantizedMatrix]:
        """Those that are ternary or may be."""
        return [matrix for matrix in self.matrices if matrix.ternary is not False]

    def as_json(self) -> dict[str, Any]:
        """Everything, with sums of bytes of what is ternary or may be."""
        return asdict(self) | {
            "nbytes": sum(matrix.nbytes for matrix in self.possible),
            "packed_nbytes": sum(matrix.packed_nbytes or 0 for matrix in self.possible),
        }


@dataclass(frozen=True)
class _Candidate:
    name: str
    shape: tuple[int, ...]
    form: str
    nbytes: int
    source: Callable[[], TernarySource] | TernarySource | None = None


def survey_folder(
    raw: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
    rows: TernaryModel | None = None,
    *,
    deep: bool = False,
) -> TernaryInfo | None:
    """Look at a folder of safetensors; None if none of its matrices is quantized.

    Args:
        raw: its config.json.
        tensors: its tensors.
        rows: what it has in packed rows already.
        deep: whether to read the codes.

    Raises:
        CheckpointError: a scale is not finite, or a tensor of a matrix is missing.
    """
    packed = () if rows is None else _in_rows(rows)
    return _survey(_in_folder(raw, tensors), packed, deep=deep)


def survey_gguf(model: GgufModel, *, deep: bool = False) -> TernaryInfo | None:
    """Look at a GGUF model; see `survey_folder`."""
    found = []
    for tensor in model.tensors.values():
        if tensor.block == 1 or len(tensor.shape) < 2:
            continue
        shape = (tensor.rows, tensor.shape[-1])
        source = BlockSource(WholeTensor(tensor)) if tensor.kind in TYPES else None
        found.append(_Candidate(tensor.name, shape, tensor.kind, tensor.nbytes, source))
    return _survey(found, deep=deep)


def _in_rows(model: TernaryModel) -> Iterator[QuantizedMatrix]:
    for path, module in model.fields.modules.items():
        source = model.matrices[path].source
        form = f"packed rows, groups of {module.group}" if module.group else "packed rows"
        if module.rotation is not None:
            form += f", rotated in blocks of {model.fields.rotations[module.rotation].block}"
        nbytes = source.nbytes
        yield QuantizedMatrix(path, source.shape, form, True, None, nbytes, module.group, nbytes)


def _in_folder(raw: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> Iterator[_Candidate]:
    said = read_quantization(raw)
    given = raw.get("quantization_config")
    masters = isinstance(given, dict) and given.get("quant_method") == "bitnet"
    for name, weight in tensors.items():
        path, _, leaf = name.rpartition(".")
        beside = {leaf: tensors.get(f"{path}.{leaf}") for leaf in ("scales", "biases", "qzeros")}
        nbytes = weight.nbytes + sum(t.nbytes for t in beside.values() if t is not None)
        if leaf == "qweight":
            yield _Candidate(path, _awq_shape(weight), "AWQ or GPTQ", nbytes)
        elif leaf != "weight" or len(weight.shape) < 2:
            continue
        elif weight.dtype == "U32" and beside["scales"] is not None:
            yield _affine(path, weight, beside, nbytes, said.of(path) if said else None)
        elif weight.dtype == "U8" and f"{path}.weight_scale" in tensors and len(weight.shape) == 2:
            shape = (4 * weight.shape[0], weight.shape[1])
            one = PackedBitnet(weight, NUMPY_DTYPES["F32"].type(1))
            yield _Candidate(path, shape, "packed BitNet", weight.nbytes, one)
        elif masters and weight.dtype in FLOAT_DTYPES and _is_linear(path, weight):
            yield _Candidate(path, weight.shape, _MASTER, weight.nbytes)


def _is_linear(path: str, weight: TensorRef) -> bool:
    """Whether master weights of a BitNet model are rounded: those of linear layers in layers."""
    return len(weight.shape) == 2 and ".layers." in path


def _affine(
    path: str, weight: TensorRef, beside: Mapping[str, TensorRef | None], nbytes: int, how: Any
) -> _Candidate:
    bits, group = (how.bits, how.group_size) if how is not None else (None, None)
    if bits is None:
        return _Candidate(path, weight.shape, "quantized in a form that is not known", nbytes)
    *lead, words = weight.shape
    shape = (prod(lead), words * 32 // bits)
    form = f"{bits}-bit codes, groups of {group}"
    scales, biases = beside["scales"], beside["biases"]
    if bits != 2 or group not in GROUPS or scales is None or scales.dtype not in HALVES:
        return _Candidate(path, shape, form, nbytes)
    if biases is None:
        raise CheckpointError(f"{weight.where}: there are no biases beside it")
    flat = [_as_matrix(tensor) for tensor in (weight, scales, biases)]
    return _Candidate(path, shape, form, nbytes, AffineSource.of(flat[0], flat[1], flat[2], group))


def _as_matrix(tensor: TensorRef) -> TensorRef:
    """A tensor (..., in) as (rows, in)."""
    *lead, width = tensor.shape
    return TensorRef(tensor.name, tensor.file, tensor.dtype, (prod(lead), width), tensor.offset)


def _awq_shape(weight: TensorRef) -> tuple[int, ...]:
    """(out, in) of an AWQ matrix: (in, out / 8) words."""
    return (8 * weight.shape[-1], weight.shape[0])


def _survey(
    candidates: Iterable[_Candidate], packed: Iterable[QuantizedMatrix] = (), *, deep: bool
) -> TernaryInfo | None:
    with reading_pool() as pool:
        found = [*packed]
        found += [_matrix(one, partial(ahead, pool) if deep else None) for one in candidates]
    return TernaryInfo(found, deep) if found else None


def _matrix(one: _Candidate, in_order: Any) -> QuantizedMatrix:
    common = (one.name, one.shape, one.form)
    if one.form == _MASTER:
        packed = _packed_bytes(one.shape, Scales(0, "float32"))
        return QuantizedMatrix(*common, True, None, one.nbytes, 0, packed)
    source = one.source
    if not isinstance(source, TernarySource):
        return QuantizedMatrix(*common, False, None, one.nbytes, None, None)
    try:
        if in_order is not None:
            scales = settled(source, in_order).scales
            ternary: bool | None = True
        else:
            # What headers say: groups as they are, and trits where nothing else has a code.
            scales = with_scales(source, Seen(one_a_row=False, pairs=False)).scales
            ternary = True if source.always else None
    except NotTernary as error:
        return QuantizedMatrix(*common, False, str(error), one.nbytes, None, None)
    packed = _packed_bytes(source.shape, scales)
    return QuantizedMatrix(*common, ternary, None, one.nbytes, scales.group, packed)


def _packed_bytes(shape: tuple[int, ...], scales: Scales) -> int:
    tensors = module_tensors("", shape, scales).values()
    return sum(prod(size) * NUMPY_DTYPES[dtype].itemsize for size, dtype in tensors)
