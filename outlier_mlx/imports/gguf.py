"""Open GGUF models, and choose how each tensor is stored: exactly if MLX has a format for it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.checkpoints.gguf import BlockScales, BlockTrits
from outlier_mlx.errors import CheckpointError, by_layer, listed
from outlier_mlx.imports import KQuants, ScaleType, TernaryFormat, gguf_blocks
from outlier_mlx.imports.gguf_blocks import AFFINE, FLOATS, REGROUPED
from outlier_mlx.imports.gguf_config import architecture, read_config
from outlier_mlx.imports.gguf_names import AnyRows, Names
from outlier_mlx.imports.gguf_parts import AffineMatrix, PlainTensor, RoundingErrors
from outlier_mlx.imports.gguf_qwen35 import (
    Qwen35Names,
    is_a_log,
    read_a_log,
    read_qwen35,
)
from outlier_mlx.imports.gguf_ternary import (
    Candidate,
    Matrices,
    check_rotated,
    modules_of,
    rotation_of,
    ternary_matrices,
)
from outlier_mlx.imports.gguf_tokenizer import Vocabulary, read_vocabulary, write_tokenizer
from outlier_mlx.imports.opened import Opened
from outlier_mlx.models.config import spell_config
from outlier_mlx.models.families import family
from outlier_mlx.models.modules import Module
from outlier_mlx.runtime.affine2 import EXPERT_FORMAT_VERSION, ROWS
from outlier_mlx.storage.gguf import GgufTensor
from outlier_mlx.storage.gguf_model import GgufModel, read_model
from outlier_mlx.storage.rounding import is_rounded
from outlier_mlx.storage.tensors import ExpertMatrix
from outlier_mlx.storage.ternary_blocks import TYPES
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.expert_parts import TernaryExperts
from outlier_mlx.writing.float_parts import Constant
from outlier_mlx.writing.parts import Part, quantization
from outlier_mlx.writing.ternary_parts import TernaryPart

_TERNARY = ("TQ1_0", "TQ2_0")
#: Architectures that are read for their ternary weights only.
NEEDS_ROWS = ("bitnet", "qwen35")
_REGROUPED_BITS, _GROUP = 8, 32
# Only float32 tensors of at most this many weights (norms, biases, routers) are checked for whether
# a 16-bit dtype holds them exactly.
_MAX_CHECKED = 1 << 22


def open_gguf_model(
    place: Path,
    *,
    file: str | None = None,
    dtype: ScaleType | None = None,
    k_quants: KQuants = "8bit",
    experts: TernaryFormat = "tq1_0",
    strict: bool = False,
    quick: bool = False,
    progress: Progress = no_progress,
) -> Opened:
    """Open a GGUF model of the architectures in `gguf_config.ARCHITECTURES`.

    Args:
        place: a `.gguf` file, one of the files of a split model, or a folder.
        file: file name of the model in a folder.
        dtype: dtype of scales, biases, norms and routers; with "float16", also of all other floats.
            Default: the smallest dtype that is exact.
        k_quants: how to store Q2_K, Q3_K and Q6_K: as affine 8-bit, or as floats.
        experts: how to store ternary experts with one scale per row: "tq1_0" for this project's
            ternary layers, "affine2" for stock mlx-lm.
        quick: see `Opened.glanced`.
        progress: called with bytes of ternary matrices examined so far, and None.

    Raises:
        CheckpointError: the files are damaged or not supported.
    """
    model = read_model(place, file)
    kind = architecture(model)
    hadamard = rotation_of(model, kind)
    vocabulary = read_vocabulary(model.fields, kind, model.where)
    made = _describe(model, kind, vocabulary)
    if hadamard is not None:
        check_rotated(hadamard, model, made.names)
    sources = _sources(made.names, made.modules)
    as_rows = experts == "tq1_0"
    layers = _ternary_layers(sources) if as_rows else {}
    matrices = Matrices()
    if as_rows and not made.has_experts:
        matrices = ternary_matrices(
            [s.candidate for s in sources],
            made.names,
            hadamard,
            strict=strict,
            quick=quick,
            progress=progress,
        )
    elif strict or hadamard is not None:
        option = "a rotated model" if hadamard is not None else "--strict"
        raise CheckpointError(f"{model.where}: {option} needs dense ternary rows (--experts tq1_0)")
    if kind in NEEDS_ROWS and not matrices.found:
        raise CheckpointError(
            f"{model.where}: {kind} models are imported if they are ternary; this one has no"
            f" matrix in {listed(TYPES, last='or')}"
        )
    rows = {*layers, *matrices.found}
    others = [source for source in sources if source.bias or source.module.path not in rows]
    chosen = dtype or _exact_dtype(others, k_quants, ternary=bool(matrices.found))
    plan = _Plan(chosen, k_quants, RoundingErrors(), layers, matrices)
    parts = [*matrices.rotations.parts(), *(plan.part(source) for source in sources)]
    types = _types(sources)
    notes = [*vocabulary.notes, *made.notes]
    if matrices.found:
        notes.append(_of_rows(matrices, only=hadamard is not None or kind in NEEDS_ROWS))
    return Opened(
        source_format=f"GGUF {'+'.join(types)}",
        parts=parts,
        config=made.config | plan.config(parts),
        assets=lambda folder: write_tokenizer(vocabulary, folder),
        notes=lambda: [*notes, *_notes(parts, plan, dtype)],
        details={"types": types, "dtype": chosen, "largest_errors": plan.errors.largest},
        glanced=any(matrix.glanced for matrix in matrices.found.values()),
    )


@dataclass(frozen=True)
class _Described:
    """A model of any architecture.

    Attributes:
        config: its config.json, but for how weights are stored.
        modules: the modules of mlx-lm's model that store weights.
        names: finds their tensors.
        notes: on what is ignored.
        has_experts: whether it is a mixture of experts.
    """

    config: dict
    modules: list[Module]
    names: Names | Qwen35Names
    notes: list[str]
    has_experts: bool = False


def _describe(model: GgufModel, kind: str, vocabulary: Vocabulary) -> _Described:
    if kind == "qwen35":
        config = read_qwen35(model, vocabulary)
        found = Qwen35Names(model, config)
        drafts = sorted(found.drafts())
        notes = [f"ignored: the draft head {listed(drafts, 2)}"] if drafts else []
        return _Described(config, modules_of(config, len(model.tensors)), found, notes)
    parsed, notes = read_config(model, vocabulary)
    names = Names(model, parsed, permuted=kind == "llama")
    spelled = spell_config(parsed)
    if kind == "bitnet":
        # mlx-lm's model has this type, and another activation: the config says which one it is.
        spelled |= {"model_type": kind, "architectures": ["BitNetForCausalLM"]}
        return _Described(spelled, modules_of(spelled, len(model.tensors)), names, notes)
    modules = family(parsed.family).modules(parsed)
    return _Described(spelled, modules, names, notes, parsed.experts > 0)


@dataclass(frozen=True)
class _Source:
    """A weight or bias of a module, and its source rows."""

    module: Module
    rows: tuple[AnyRows, ...]
    bias: bool = False
    factor: GgufTensor | None = None

    @property
    def kinds(self) -> set[str]:
        return {rows.tensor.kind for rows in self.rows}

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.module, () if self.bias else self.rows, self.factor)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.module.shape[:1] if self.bias else self.module.shape

    def check(self) -> None:
        """Refuse types that are not supported, and quantized vectors."""
        read = FLOATS if len(self.shape) == 1 else (*FLOATS, *AFFINE, *REGROUPED)
        for rows in self.rows:
            if rows.tensor.kind not in read:
                raise CheckpointError(
                    f"{rows.tensor.where}: type {rows.tensor.kind}, expected one of"
                    f" {', '.join(read)}"
                )


def _sources(names: Names | Qwen35Names, needed: Sequence[Module]) -> list[_Source]:
    """Find the sources of all modules; checks that every tensor is used and its type supported."""
    sources = [
        _Source(module, names.weight(module), factor=names.factor(module)) for module in needed
    ]
    sources += [_Source(module, names.bias(module), bias=True) for module in needed if module.bias]
    names.check_all_used()
    for source in sources:
        source.check()
    return sources


@dataclass(frozen=True)
class _Plan:
    """Decides how each part is stored."""

    dtype: str
    k_quants: KQuants
    errors: RoundingErrors
    ternary: dict[str, list[ExpertMatrix]]
    matrices: Matrices

    def part(self, source: _Source) -> Part:
        """The part for a source."""
        path, kind = source.module.path, source.module.kind
        if path in self.ternary:
            return TernaryExperts(path, kind, tuple(self.ternary[path]))
        if path in self.matrices.found and not source.bias:
            return TernaryPart(path, kind, self.matrices.found[path])
        if is_a_log(source.module):
            return Constant(path, kind, f"{path}.A_log", read_a_log(source.rows[0]), "float32")
        kinds = source.kinds
        common = (path, kind, source.shape, source.rows)
        if kinds.isdisjoint(FLOATS):
            if kinds.isdisjoint(REGROUPED):
                bits = max(AFFINE[name].bits for name in kinds)
                group = min(AFFINE[name].group for name in kinds)
                return AffineMatrix(*common, self.dtype, self.errors, bits, group)
            if self.k_quants == "8bit":
                how = (self.dtype, self.errors, _REGROUPED_BITS, _GROUP)
                return AffineMatrix(*common, *how)
            dtype: str = self.k_quants
        else:
            dtype = self._floats(source)
        name = f"{path}.{'bias' if source.bias else source.module.leaf}"
        return PlainTensor(*common, dtype, self.errors, name)

    def config(self, parts: Sequence[Part]) -> dict:
        """The fields of config.json that describe how parts are stored."""
        config = {"dtype": self.dtype, "torch_dtype": self.dtype} | quantization(parts)
        if self.ternary:
            layers = sorted({int(path.split(".")[2]) for path in self.ternary})
            ternary = {"format": ROWS, "version": EXPERT_FORMAT_VERSION, "layers": layers}
            config |= {"model_type": "ternary_mixtral", "ternary_switch": ternary}
        if self.matrices.found:
            config["ternary"] = self.matrices.fields().spelled()
        return config

    def _floats(self, source: _Source) -> str:
        """The dtype of an unquantized source. In an exact model, large 16-bit matrices stay so."""
        halves = {"F16": "float16", "BF16": "bfloat16"}
        small = len(source.shape) == 1 or source.module.kind == "router"
        if self.dtype == "float32" and len(source.kinds) == 1 and not small:
            return halves.get(next(iter(source.kinds)), "float32")
        return self.dtype


def _ternary_layers(sources: Sequence[_Source]) -> dict[str, list[ExpertMatrix]]:
    """The experts that ternary layers can hold exactly, by path of their projection.

    All three projections of the layer must be ternary, and all blocks of a row must have the same
    scale.
    """
    layers: dict[str, list[_Source]] = {}
    for source in sources:
        if source.module.kind == "experts":
            layers.setdefault(source.module.path.rpartition(".")[0], []).append(source)
    result: dict[str, list[ExpertMatrix]] = {}
    for group in layers.values():
        if not all(source.kinds <= set(_TERNARY) for source in group):
            continue
        matrices = {source.module.path: _expert_matrices(source) for source in group}
        if all(_has_row_scales(m) for found in matrices.values() for m in found):
            result |= matrices
    return result


def _expert_matrices(source: _Source) -> list[ExpertMatrix]:
    _, out, _ = source.module.shape
    found = []
    for rows in source.rows:
        for start in range(rows.start, rows.start + rows.count, out):
            trits = BlockTrits(rows.tensor.matrix(start, start + out))
            found.append(ExpertMatrix(trits, BlockScales(trits)))
    return found


def _has_row_scales(matrix: ExpertMatrix) -> bool:
    try:
        matrix.row_scales()
    except CheckpointError:
        return False
    return True


def _exact_dtype(sources: Sequence[_Source], k_quants: KQuants, *, ternary: bool = False) -> str:
    """The smallest dtype that holds all norms, scales and biases exactly.

    They all need the same dtype: MLX computes in float32 if one operand is float32, or if one is
    float16 and the other bfloat16. The decays of delta nets are always float32, and do not count.
    `ternary`: there are ternary matrices besides, whose results have the dtype of their input.
    """
    sources = [source for source in sources if not is_a_log(source.module)]
    kinds = set().union(*(source.kinds for source in sources))
    mixed = any(
        not source.kinds <= set(FLOATS) and not source.kinds.isdisjoint(FLOATS)
        for source in sources
    )
    affine = {kind for kind, layout in AFFINE.items() if layout.half}
    regrouped = set(REGROUPED) if k_quants != "float32" else set()
    candidates = {"bfloat16": {"BF16"}, "float16": {"F16"} | affine | regrouped}
    for dtype, allowed in candidates.items():
        if (
            mixed
            or not (kinds - {"F32"} or (ternary and dtype == "float16"))
            or not kinds - {"F32"} <= allowed
        ):
            continue
        if all(_fits(rows, dtype) for source in sources for rows in source.rows):
            return dtype
    return "float32"


def _fits(rows: AnyRows, dtype: str) -> bool:
    """Whether a dtype holds a float32 tensor exactly; True for all other tensors."""
    tensor = rows.tensor
    if tensor.kind != "F32":
        return True
    if rows.count * tensor.shape[-1] > _MAX_CHECKED:
        return False
    weights = gguf_blocks.values("F32", rows.read(0, rows.count))
    return not is_rounded(weights, dtype).any()


def _types(sources: Iterable[_Source]) -> list[str]:
    """The ggml types of the model without norms and routers, by falling number of weights."""
    weights: Counter[str] = Counter()
    for source in sources:
        for rows in source.rows if source.module.kind not in ("norms", "router") else ():
            weights[rows.tensor.kind] += rows.count * rows.tensor.shape[-1]
    return [kind for kind, _ in weights.most_common()]


def _of_rows(matrices: Matrices, *, only: bool) -> str:
    """A note on what runs ternary rows; `only`: the model cannot be stored otherwise."""
    note = (
        f"{len(matrices.found)} matrices are ternary rows of this project, which mlx-lm loads only"
        " with --trust-remote-code"
    )
    return note if only else f"{note}; --experts affine2 makes a model without them"


def _notes(parts: Sequence[Part], plan: _Plan, dtype: str | None) -> list[str]:
    """Notes on what is not exact, with the largest error for each type and what it is stored as."""
    found: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        if isinstance(part, PlainTensor | AffineMatrix) and plan.errors.largest.get(part.path):
            found.setdefault(("+".join(part.kinds), part.stored_as), []).append(part.path)
    notes = []
    for (kinds, stored_as), paths in found.items():
        error = max(plan.errors.largest[path] for path in paths)
        notes.append(f"{kinds} as {stored_as}: off by up to {error:.2g} in {by_layer(paths)}")
    if plan.ternary:
        notes.append(
            "the experts are ternary layers of this project, which stock mlx-lm cannot load; it can"
            " load a model made with --experts affine2"
        )
    if plan.dtype != "float32":
        return notes
    if dtype is None and any(isinstance(p, AffineMatrix) and p.bits < 8 for p in parts):
        notes.append(
            "scales, biases and norms are float32, so the model is exact; --dtype float16 saves one"
            " bit per weight"
        )
    if dtype is None and plan.matrices.found:
        notes.append(
            "norms are float32, since 16 bits do not hold exactly all that is not ternary; so the"
            " model computes in float32, unless it is made with --dtype float16"
        )
    halves = [p.path for p in parts if isinstance(p, PlainTensor) and p.dtype != "float32"]
    if halves:
        notes.append(
            f"{by_layer(halves)}: 16-bit weights in a float32 model, which MLX converts at every"
            " use; --dtype float16 stores all in float16"
        )
    return notes
