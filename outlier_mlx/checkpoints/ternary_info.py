"""Whether a model's quantized matrices are ternary, and what they would take as packed rows.

Headers say what a form can hold; the codes, which `deep` reads, what it does hold.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from threading import Lock
from typing import Any

from outlier_mlx.checkpoints.ternary_model import TernaryModel
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.bitnet import BitnetSettings, is_bitnet, read_settings
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
    TernaryMatrix,
    TernarySource,
    settled,
    with_scales,
)
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.parts import ahead, reading_pool

#: Given how many bytes of codes will be read at most, and whether from the hub, shows the progress
#: of reading them.
Reading = Callable[[int, bool], AbstractContextManager[Progress]]
#: The form of matrices that are not quantized.
FLOATS = "16-bit floats"
_MASTER = "master weights"
# Matrices that are read from the hub at the same time.
_CONNECTIONS = 8


def silently(nbytes: int, remote: bool) -> AbstractContextManager[Progress]:
    """A `Reading` that shows nothing."""
    return nullcontext(no_progress)


@dataclass(frozen=True)
class Deep:
    """How codes are read.

    Attributes:
        reading: shows the progress.
        remote: whether they are on the hub.
    """

    reading: Reading = silently
    remote: bool = False


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
    #: Makes the source from more than headers.
    checked: Callable[[], TernarySource] | None = None

    def open(self) -> TernarySource:
        """The source, checked; not for candidates without one."""
        assert self.source is not None
        return self.source if self.checked is None else self.checked()


def survey_folder(
    raw: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
    rows: TernaryModel | None = None,
    deep: Deep | None = None,
) -> TernaryInfo | None:
    """Look at a folder of safetensors; None if none of its matrices may be ternary or is quantized.

    Args:
        raw: its config.json.
        tensors: its tensors.
        rows: what it has in packed rows already.
        deep: how to read the codes; None: they are not read.

    Raises:
        CheckpointError: a scale is not finite, or a tensor of a matrix is missing.
    """
    packed = () if rows is None else _in_rows(rows)
    return _survey(_in_folder(raw, tensors), packed, deep)


def survey_gguf(model: GgufModel, deep: Deep | None = None) -> TernaryInfo | None:
    """Look at a GGUF model; see `survey_folder`."""
    found = []
    for tensor in model.tensors.values():
        if tensor.block == 1 or len(tensor.shape) < 2:
            continue
        shape = (tensor.rows, tensor.shape[-1])
        source = BlockSource(WholeTensor(tensor)) if tensor.kind in TYPES else None
        found.append(_Candidate(tensor.name, shape, tensor.kind, tensor.nbytes, source))
    return _survey(found, (), deep)


def examine_rows(model: TernaryModel, deep: Deep) -> None:
    """Read all matrices of a model of packed rows.

    Raises:
        CheckpointError: one is damaged.
    """
    sources = [matrix.source for matrix in model.matrices.values()]
    for found in _examined([(one.nbytes, partial(_identity, one)) for one in sources], deep):
        if isinstance(found, NotTernary):
            raise found


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
    settings = _bitnet_settings(raw)
    masters = settings is not None and not any(name.endswith(".weight_scale") for name in tensors)
    known = ("quantization", "quantization_config", "ternary")
    quantized = is_bitnet(raw) or any(key in raw for key in known)
    for name, weight in tensors.items():
        path, _, leaf = name.rpartition(".")
        beside = {leaf: tensors.get(f"{path}.{leaf}") for leaf in ("scales", "biases", "qzeros")}
        nbytes = weight.nbytes + sum(t.nbytes for t in beside.values() if t is not None)
        if leaf == "qweight":
            yield _Candidate(path, _awq_shape(weight), "AWQ or GPTQ", nbytes)
        elif leaf != "weight" or len(weight.shape) < 2:
            continue
        elif weight.dtype == "U32" and beside["scales"] is not None:
            one = _affine(path, weight, beside, nbytes, said.of(path) if said else None)
            rotated = f"{path}.signs" in tensors
            yield replace(one, form=f"{one.form}, rotated") if rotated else one
        elif weight.dtype == "U8" and f"{path}.weight_scale" in tensors and len(weight.shape) == 2:
            source = PackedBitnet(weight, NUMPY_DTYPES["F32"].type(1))
            scale, shape = tensors[f"{path}.weight_scale"], source.shape
            checked = None
            if settings is not None:
                checked = partial(PackedBitnet.of, weight, scale, shape, settings.divides)
            yield _Candidate(path, shape, "packed BitNet", weight.nbytes, source, checked)
        elif masters and _is_master(path, weight, settings):
            yield _Candidate(path, weight.shape, _MASTER, weight.nbytes)
        elif not quantized and (floats := FloatSource.of(weight)) is not None:
            yield _Candidate(path, weight.shape, FLOATS, weight.nbytes, floats)


def _bitnet_settings(raw: Mapping[str, Any]) -> BitnetSettings | None:
    """How a BitNet model is stored; None if it is none, or not one that can be imported."""
    if not is_bitnet(raw) or "ternary" in raw:
        return None
    try:
        return read_settings(raw)
    except CheckpointError:
        return None


def _is_master(path: str, weight: TensorRef, settings: BitnetSettings | None) -> bool:
    """Whether weights of a BitNet model are rounded when it is loaded: those of linear layers."""
    skipped = () if settings is None else settings.unconverted
    linear = len(weight.shape) == 2 and weight.dtype in FLOAT_DTYPES and ".layers." in path
    return linear and not any(name in path for name in skipped)


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
    candidates: Iterable[_Candidate], packed: Iterable[QuantizedMatrix], deep: Deep | None
) -> TernaryInfo | None:
    """Look at all candidates; `deep` is None if no codes are to be read."""
    sought = list(candidates)
    codes = None
    if deep is not None:
        read = [(one.nbytes, one.open) for one in sought if one.source is not None]
        codes = iter(_examined(read, deep))
    found = [*packed, *(_matrix(one, codes) for one in sought)]
    return TernaryInfo(found, deep is not None) if found else None


def _examined(
    sources: Sequence[tuple[int, Callable[[], TernarySource]]], deep: Deep
) -> list[TernaryMatrix | NotTernary]:
    """Go through sources, several at a time: as matrices, or why they are none.

    Args:
        sources: bytes of each, and what opens it.
        deep: see there.

    Raises:
        CheckpointError: one is damaged: the first of those that are.
    """
    total = sum(nbytes for nbytes, _ in sources)
    threads = _CONNECTIONS if deep.remote else None
    with deep.reading(total, deep.remote) as progress, reading_pool(threads) as pool:
        reader = _Reader(progress, total)
        try:
            return list(ahead(pool, (partial(reader.examine, *one) for one in sources)))
        finally:
            reader.stopped = True


@dataclass
class _Reader:
    """Goes through sources in several threads, and tells the progress.

    Attributes:
        progress: called with bytes that were read or need not be, and `total`.
        total: bytes of all sources.
        done: bytes so far.
        stopped: nothing more is to be read.
    """

    progress: Progress
    total: int
    done: int = 0
    stopped: bool = False
    _lock: Lock = field(default_factory=Lock)

    def examine(
        self, nbytes: int, opened: Callable[[], TernarySource]
    ) -> TernaryMatrix | NotTernary:
        """All of a source; see `_examined`."""
        left = nbytes

        def in_order(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
            nonlocal left
            for call in calls:
                if self.stopped:
                    raise CancelledError
                yield call()
                left -= self._add(min(left, SLAB_BYTES))

        try:
            return settled(opened(), in_order)
        except NotTernary as error:
            return error
        finally:
            self._add(left)

    def _add(self, nbytes: int) -> int:
        with self._lock:
            self.done += nbytes
            self.progress(self.done, self.total)
        return nbytes


def _matrix(one: _Candidate, codes: Iterator[TernaryMatrix | NotTernary] | None) -> QuantizedMatrix:
    """What is known of a candidate; with `codes`, the next of them is what is in it."""
    common = (one.name, one.shape, one.form)
    if one.form == _MASTER:
        packed = _packed_bytes(one.shape, Scales(0, "float32"))
        return QuantizedMatrix(*common, True, None, one.nbytes, 0, packed)
    if one.source is None:
        return QuantizedMatrix(*common, False, None, one.nbytes, None, None)
    if codes is not None:
        found = next(codes)
    else:
        # What headers say: groups as they are, and trits where nothing else has a code.
        found = with_scales(one.source, Seen(one_a_row=False, pairs=False))
    if isinstance(found, NotTernary):
        return QuantizedMatrix(*common, False, str(found), one.nbytes, None, None)
    ternary = True if codes is not None or one.source.always else None
    packed = _packed_bytes(one.source.shape, found.scales)
    return QuantizedMatrix(*common, ternary, None, one.nbytes, found.scales.group, packed)


def _identity(source: TernarySource) -> TernarySource:
    return source


def _packed_bytes(shape: tuple[int, ...], scales: Scales) -> int:
    tensors = module_tensors("", shape, scales).values()
    return sum(prod(size) * NUMPY_DTYPES[dtype].itemsize for size, dtype in tensors)
