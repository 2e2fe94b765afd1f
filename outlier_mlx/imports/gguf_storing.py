"""How each tensor of a GGUF model is stored: exactly, if MLX has a format for it."""

from collections.abc import Sequence
from dataclasses import dataclass

from outlier_mlx.checkpoints.gguf import BlockScales, BlockTrits
from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports import KQuants, gguf_blocks
from outlier_mlx.imports.gguf_blocks import AFFINE, FLOATS, REGROUPED
from outlier_mlx.imports.gguf_names import AnyRows, Names
from outlier_mlx.imports.gguf_parts import AffineMatrix, PlainTensor, RoundingErrors
from outlier_mlx.imports.gguf_qwen35 import Qwen35Names, is_a_log, read_a_log
from outlier_mlx.imports.gguf_ternary import Candidate, Matrices
from outlier_mlx.models.modules import Module
from outlier_mlx.runtime.affine2 import EXPERT_FORMAT_VERSION, ROWS
from outlier_mlx.storage.gguf import GgufTensor
from outlier_mlx.storage.rounding import is_rounded
from outlier_mlx.storage.tensors import ExpertMatrix
from outlier_mlx.writing.expert_parts import TernaryExperts
from outlier_mlx.writing.float_parts import Constant
from outlier_mlx.writing.parts import Part, quantization
from outlier_mlx.writing.ternary_parts import TernaryPart

_TERNARY = ("TQ1_0", "TQ2_0")
_REGROUPED_BITS, _GROUP = 8, 32
# Only float32 tensors of at most this many weights (norms, biases, routers) are checked for whether
# a 16-bit dtype holds them exactly.
_MAX_CHECKED = 1 << 22


@dataclass(frozen=True)
class Source:
    """A weight or bias of a module, and where it comes from.

    Attributes:
        module: the module, of mlx-lm's model.
        rows: the rows of the file's tensors that make it up, one after another.
        bias: whether it is the bias.
        factor: a tensor (1,) by which the weight is multiplied; None: there is none.
    """

    module: Module
    rows: tuple[AnyRows, ...]
    bias: bool = False
    factor: GgufTensor | None = None

    @property
    def kinds(self) -> set[str]:
        """The ggml types of its rows."""
        return {rows.tensor.kind for rows in self.rows}

    @property
    def candidate(self) -> Candidate:
        """What may be a ternary matrix; without rows if it is a bias."""
        return Candidate(self.module, () if self.bias else self.rows, self.factor)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), (experts, out, in) or (out,)."""
        return self.module.shape[:1] if self.bias else self.module.shape

    def check(self) -> None:
        """Refuse types that are not supported, and quantized vectors.

        Raises:
            CheckpointError: it has one of these.
        """
        read = FLOATS if len(self.shape) == 1 else (*FLOATS, *AFFINE, *REGROUPED)
        for rows in self.rows:
            if rows.tensor.kind not in read:
                raise CheckpointError(
                    f"{rows.tensor.where}: type {rows.tensor.kind}, expected one of"
                    f" {', '.join(read)}"
                )


def sources_of(names: Names | Qwen35Names, needed: Sequence[Module]) -> list[Source]:
    """The sources of all modules, weights first.

    Raises:
        CheckpointError: a tensor is missing, is not used, or has a type that is not supported.
    """
    sources = [
        Source(module, names.weight(module), factor=names.factor(module)) for module in needed
    ]
    sources += [Source(module, names.bias(module), bias=True) for module in needed if module.bias]
    names.check_all_used()
    for source in sources:
        source.check()
    return sources


@dataclass(frozen=True)
class Plan:
    """Decides how each part is stored.

    Attributes:
        dtype: of scales, biases, norms and routers.
        k_quants: how types with small groups are stored.
        errors: collects the largest rounding errors, when parts are written.
        ternary: experts that ternary layers hold, by path of their projection.
        matrices: dense ternary matrices.
    """

    dtype: str
    k_quants: KQuants
    errors: RoundingErrors
    ternary: dict[str, list[ExpertMatrix]]
    matrices: Matrices

    def part(self, source: Source) -> Part:
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

    def _floats(self, source: Source) -> str:
        """The dtype of an unquantized source. In an exact model, large 16-bit matrices stay so."""
        halves = {"F16": "float16", "BF16": "bfloat16"}
        small = len(source.shape) == 1 or source.module.kind == "router"
        if self.dtype == "float32" and len(source.kinds) == 1 and not small:
            return halves.get(next(iter(source.kinds)), "float32")
        return self.dtype


def ternary_layers(sources: Sequence[Source]) -> dict[str, list[ExpertMatrix]]:
    """The experts that ternary layers can hold exactly, by path of their projection.

    All three projections of the layer must be ternary, and all blocks of a row must have the same
    scale.
    """
    layers: dict[str, list[Source]] = {}
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


def _expert_matrices(source: Source) -> list[ExpertMatrix]:
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


def exact_dtype(sources: Sequence[Source], k_quants: KQuants, *, ternary: bool = False) -> str:
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
