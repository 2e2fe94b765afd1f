"""Whether a model's quantized matrices are ternary, and what they would take as packed rows.

Headers say what a form can hold; the codes, which `deep` reads, what it does hold.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from outlier_mlx.checkpoints.ternary_model import TernaryModel
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.quantization import read_quantization
from outlier_mlx.models.ternary_fields import module_tensors
from outlier_mlx.storage.gguf_model import GgufModel
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, NUMPY_DTYPES, TensorRef
from outlier_mlx.storage.ternary_affine import HALVES, AffineSource
from outlier_mlx.storage.ternary_bitnet import FloatSource, PackedBitnet
from outlier_mlx.storage.ternary_blocks import TYPES, BlockSource, WholeTensor
from outlier_mlx.storage.ternary_matrix import (
    GROUPS,
    SLAB_BYTES,
    NotTernary,
    Scales,
    Seen,
    T,
    TernarySource,
    settled,
    with_scales,
)
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.parts import ahead, reading_pool

#: Given how many bytes of codes will be read at most, shows the progress of reading them.
Reading = Callable[[int], AbstractContextManager[Progress]]
#: The form of matrices that are not quantized.
FLOATS = "16-bit floats"
_MASTER = "master weights"


def silently(nbytes: int) -> AbstractContextManager[Progress]:
    """A `Reading` that shows nothing."""
    return nullcontext(no_progress)


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
    source: TernarySource | None = None


def survey_folder(
    raw: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
    rows: TernaryModel | None = None,
    *,
    deep: bool = False,
    reading: Reading = silently,
) -> TernaryInfo | None:
    """Look at a folder of safetensors; None if none of its matrices may be ternary or is quantized.

    Args:
        raw: its config.json.
        tensors: its tensors.
        rows: what it has in packed rows already.
        deep: whether to read the codes.
        reading: shows the progress of this.

    Raises:
        CheckpointError: a scale is not finite, or a tensor of a matrix is missing.
    """
    packed = () if rows is None else _in_rows(rows)
    return _survey(_in_folder(raw, tensors, deep=deep), packed, reading if deep else None)


def survey_gguf(
    model: GgufModel, *, deep: bool = False, reading: Reading = silently
) -> TernaryInfo | None:
    """Look at a GGUF model; see `survey_folder`."""
    found = []
    for tensor in model.tensors.values():
        if tensor.block == 1 or len(tensor.shape) < 2:
            continue
        shape = (tensor.rows, tensor.shape[-1])
        source = BlockSource(WholeTensor(tensor)) if tensor.kind in TYPES else None
        found.append(_Candidate(tensor.name, shape, tensor.kind, tensor.nbytes, source))
    return _survey(found, (), reading if deep else None)


def _in_rows(model: TernaryModel) -> Iterator[QuantizedMatrix]:
    for path, module in model.fields.modules.items():
        source = model.matrices[path].source
        form = f"packed rows, groups of {module.group}" if module.group else "packed rows"
        if module.rotation is not None:
            form += f", rotated in blocks of {model.fields.rotations[module.rotation].block}"
        nbytes = source.nbytes
        yield QuantizedMatrix(path, source.shape, form, True, None, nbytes, module.group, nbytes)


def _in_folder(
    raw: Mapping[str, Any], tensors: Mapping[str, TensorRef], *, deep: bool
) -> Iterator[_Candidate]:
    said = read_quantization(raw)
    given = raw.get("quantization_config")
    settings = given if isinstance(given, dict) else {}
    masters = settings.get("quant_method") == "bitnet"
    divides = settings.get("linear_class") in (None, "bitlinear")
    quantized = any(key in raw for key in ("quantization", "quantization_config", "ternary"))
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
            source = PackedBitnet(weight, NUMPY_DTYPES["F32"].type(1))
            if deep:
                scale = tensors[f"{path}.weight_scale"]
                source = PackedBitnet.of(weight, scale, source.shape, divides)
            yield _Candidate(path, source.shape, "packed BitNet", weight.nbytes, source)
        elif masters and weight.dtype in FLOAT_DTYPES and _is_linear(path, weight):
            yield _Candidate(path, weight.shape, _MASTER, weight.nbytes)
        elif not quantized and (floats := FloatSource.of(weight)) is not None:
            yield _Candidate(path, weight.shape, FLOATS, weight.nbytes, floats)


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
    return replace(tensor, shape=(prod(lead), width))


def _awq_shape(weight: TensorRef) -> tuple[int, ...]:
    """(out, in) of an AWQ matrix: (in, out / 8) words."""
    return (8 * weight.shape[-1], weight.shape[0])


def _survey(
    candidates: Iterable[_Candidate], packed: Iterable[QuantizedMatrix], reading: Reading | None
) -> TernaryInfo | None:
    """Look at all candidates; `reading` is None if no codes are to be read."""
    sought, found = list(candidates), [*packed]
    if reading is None:
        found += [_matrix(one, None) for one in sought]
        return TernaryInfo(found, deep=False) if found else None
    sizes = [one.source.nbytes for one in sought if one.source is not None]
    with reading(sum(sizes)) as progress, reading_pool() as pool:
        reader = _Reader(pool, progress, sum(sizes))
        for one in sought:
            found.append(_matrix(one, reader))
            reader.finish(0 if one.source is None else one.source.nbytes)
    return TernaryInfo(found, deep=True) if found else None


@dataclass
class _Reader:
    """Goes through sources in several threads, and tells the progress.

    Attributes:
        pool: the threads.
        progress: called with bytes that were read or need not be, and `total`.
        total: bytes of all sources.
        done: bytes of the sources before the present one.
    """

    pool: ThreadPoolExecutor
    progress: Progress
    total: int
    done: int = 0

    def in_order(self, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
        """An `InOrder` for one source."""
        for number, result in enumerate(ahead(self.pool, calls), 1):
            self.progress(min(self.total, self.done + number * SLAB_BYTES), self.total)
            yield result

    def finish(self, nbytes: int) -> None:
        """A source of so many bytes is done."""
        self.done += nbytes
        self.progress(self.done, self.total)


def _matrix(one: _Candidate, reader: _Reader | None) -> QuantizedMatrix:
    common = (one.name, one.shape, one.form)
    if one.form == _MASTER:
        packed = _packed_bytes(one.shape, Scales(0, "float32"))
        return QuantizedMatrix(*common, True, None, one.nbytes, 0, packed)
    source = one.source
    if source is None:
        return QuantizedMatrix(*common, False, None, one.nbytes, None, None)
    try:
        if reader is not None:
            scales = settled(source, reader.in_order).scales
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
