"""Open GGUF models, and say what is not exact."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.errors import CheckpointError, by_layer, listed
from outlier_mlx.imports import KQuants, ScaleType, TernaryFormat
from outlier_mlx.imports.gguf_config import architecture, read_config
from outlier_mlx.imports.gguf_names import Names
from outlier_mlx.imports.gguf_parts import AffineMatrix, PlainTensor, RoundingErrors
from outlier_mlx.imports.gguf_qwen35 import Qwen35Names, read_qwen35
from outlier_mlx.imports.gguf_storing import Plan, Source, exact_dtype, sources_of, ternary_layers
from outlier_mlx.imports.gguf_ternary import (
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
from outlier_mlx.storage.gguf_model import GgufModel, read_model
from outlier_mlx.storage.ternary_blocks import TYPES
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.parts import Part

#: Architectures that are read for their ternary weights only.
NEEDS_ROWS = ("bitnet", "qwen35")


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
        strict: see `import_model`.
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
    sources = sources_of(made.names, made.modules)
    as_rows, matrices = experts == "tq1_0", Matrices()
    layers = ternary_layers(sources) if as_rows else {}
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
    chosen = dtype or exact_dtype(others, k_quants, ternary=bool(matrices.found))
    plan = Plan(chosen, k_quants, RoundingErrors(), layers, matrices)
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


def _types(sources: Iterable[Source]) -> list[str]:
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


def _notes(parts: Sequence[Part], plan: Plan, dtype: str | None) -> list[str]:
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
