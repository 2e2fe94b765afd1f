"""A whole tier as one GGUF file that llama.cpp runs, in its architecture `step35`.

Of llama.cpp's architectures (2026), `step35` computes what a tier does: layers with and without
experts in any order (a layer has experts if it has a router), a shared FFN of its own width without
a gate, softmax over all experts and weights of the chosen ones renormalised, optional biases of
queries, keys and values, optional norms of queries and keys, and scaled RoPE. What it has besides
is turned off: windows of attention, the gate of attention heads, a bias of the router, and halves
of heads without RoPE (it halves `rope.dimension_count`, which is therefore twice a head's width).
It has no alphas; they become part of the experts' scales.
https://github.com/ggml-org/llama.cpp/blob/master/src/models/step35.cpp
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.base_matrices import AffineMatrix, base_matrix
from outlier_mlx.checkpoints.export_shared import Origin, slabs
from outlier_mlx.checkpoints.folding import Folded, common_alpha, fold
from outlier_mlx.checkpoints.gguf_encode import (
    affine_kind,
    affine_rounding,
    affine_slabs,
    float_slabs,
    q8_0_slabs,
    ternary_slabs,
)
from outlier_mlx.checkpoints.gguf_vocabulary import vocabulary_fields
from outlier_mlx.checkpoints.llamacpp_config import ROPE_FREQS, config_fields, rope_factors
from outlier_mlx.checkpoints.overlay import Overlay
from outlier_mlx.checkpoints.stored_model import StoredModel
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import PROJECTIONS, ModelConfig
from outlier_mlx.models.gguf_names import GGUF_NAMES
from outlier_mlx.models.modules import Module, tier_modules
from outlier_mlx.storage.padding import padded, padding_note, whole_blocks
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.gguf_file import KINDS, Field, GgufTensor, write_gguf
from outlier_mlx.writing.parts import Parts, Tally
from outlier_mlx.writing.writer import WrittenFile

NAME = "model.gguf"

_NAMES = {
    **GGUF_NAMES,
    "mlp.gate": "ffn_gate_inp",
} | {
    f"mlp.{place}.{projection}_proj": f"ffn_{projection}{suffix}"
    for projection in PROJECTIONS
    for place, suffix in (("shared_expert", "_shexp"), ("switch_mlp", "_exps"))
}


def llamacpp_model(
    stored: StoredModel, overlay: Overlay, origin: Origin, experts: str
) -> "LlamaCppModel":
    """A tier as a GGUF file.

    Args:
        stored: the tier.
        overlay: the same as an overlay.
        origin: its name.
        experts: how experts are stored, one of `gguf_encode.TERNARY`.

    Raises:
        CheckpointError: llama.cpp does not compute something that the tier does; says what.
        OutlierError: rows of experts that blocks do not divide.
    """
    config = stored.config
    assert config is not None  # a tier's is checked
    plan = _Plan(stored, config, overlay, experts, overlay.alphas())
    fields, notes = vocabulary_fields(overlay.path, config.vocab, config.eos_ids)
    own = config_fields(config, plan.width, plan.alpha, origin.model)
    tensors = plan.tensors()
    return LlamaCppModel(
        [], "the export", fields=own | fields, tensors=tensors, notes=(*plan.notes, *notes)
    )


@dataclass(frozen=True, kw_only=True)
class LlamaCppModel(Parts):
    """One GGUF file.

    Attributes:
        fields: its metadata.
        tensors: in the order of the file.
        notes: sentences about what is not exactly as in the tier.
    """

    fields: dict[str, Field]
    tensors: list[GgufTensor]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def write(self, folder: Path, progress: Progress = no_progress) -> list[WrittenFile]:
        """Write `model.gguf`; `progress` gets the bytes written."""
        return [write_gguf(folder / NAME, self.fields, self.tensors, Tally(self.nbytes, progress))]


class _Plan:
    """Which tensors a file has, and what is rounded in them.

    Attributes:
        width: width of an expert in the file: whole blocks.
        alpha: the alpha that all experts have, if it is not part of the scales.
        notes: see `LlamaCppModel`.
    """

    def __init__(
        self,
        stored: StoredModel,
        config: ModelConfig,
        overlay: Overlay,
        experts: str,
        alphas: dict[int, np.ndarray],
    ) -> None:
        self.notes: list[str] = []
        self._stored, self._config, self._overlay = stored, config, overlay
        self._experts, self._alphas = experts, alphas
        _, self._block, _ = KINDS[experts.upper()]
        if config.moe_layers and config.hidden % self._block:
            more = "; --experts q4_0 takes multiples of 32" if config.hidden % 32 == 0 else ""
            raise OutlierError(
                f"{overlay.path.name}: hidden size {config.hidden}: llama.cpp cuts the rows of"
                f" experts into blocks of {self._block} weights in {experts.upper()}{more}"
            )
        own = overlay.expert_intermediate
        self.width = whole_blocks(own, self._block)
        self.notes += padding_note(own, self.width)
        self.alpha = common_alpha(alphas)

    def tensors(self) -> list[GgufTensor]:
        """All tensors, in the order of a forward pass."""
        self._check_scales()
        result: list[GgufTensor] = []
        rounded: list[float] = []
        again: list[str] = []
        for module in tier_modules(self._config):
            if module.leaf == "weight":
                result += self._module(module, rounded, again)
        if self._config.tied:
            # The architecture has no tied head: the embedding is written once more.
            embedding = result[0]
            head = GgufTensor("output.weight", embedding.kind, embedding.shape, embedding.slabs)
            result.append(head)
        factors = rope_factors(self._config)
        if factors is not None:
            result.append(GgufTensor(ROPE_FREQS, "F32", factors.shape, partial(iter, [factors])))
        if rounded:
            self.notes.append(
                f"scales of {len(rounded)} matrices of the base are rounded to float16, by at most"
                f" {max(rounded):.1e} of themselves"
            )
        if again:
            self.notes.append(
                f"{len(again)} matrices of the base with more than 5 bits are quantized again, to"
                f" Q8_0: {again[0]} and so on"
            )
        return result

    def _module(
        self, module: Module, rounded: list[float], again: list[str]
    ) -> Iterator[GgufTensor]:
        name = _name(module.path)
        tensors = self._stored.tensors
        if module.kind == "experts":
            layer = int(module.path.split(".")[2])
            yield self._expert_tensor(name, layer, module.path.rpartition(".")[2])
            return
        weight = base_matrix(tensors, self._config, module.path)
        if isinstance(weight, AffineMatrix):
            kind = affine_kind(weight)
            if kind is None:
                again.append(module.path)
                blocks = partial(q8_0_slabs, weight)
            else:
                blocks = partial(affine_slabs, weight)
                error = affine_rounding(weight)
                rounded += [error] if error else []
            yield GgufTensor(f"{name}.weight", kind or "Q8_0", weight.shape, blocks)
        elif len(weight.shape) > 1 and module.kind != "router":
            yield GgufTensor(f"{name}.weight", weight.dtype, weight.shape, partial(slabs, weight))
        else:
            yield GgufTensor(f"{name}.weight", "F32", weight.shape, partial(float_slabs, weight))
        if module.bias:
            bias = tensors[f"{module.path}.bias"]
            yield GgufTensor(f"{name}.bias", "F32", bias.shape, partial(float_slabs, bias))

    def _check_scales(self) -> None:
        """Note by how much float16 changes the experts' scales."""
        worst = 0.0
        for layer, members in self._overlay.experts.items():
            worst = max([worst, *(self._folded(layer, e).rounding for e in range(len(members)))])
        if worst:
            self.notes.append(
                "scales of experts, alphas included, are rounded to float16, by at most"
                f" {worst:.1e} of themselves"
            )

    def _folded(self, layer: int, number: int) -> Folded:
        expert = self._overlay.experts[layer][number]
        alpha = float(self._alphas[layer][number]) / self.alpha
        gate, up, down = (matrix.row_scales() for _, matrix in expert)
        return fold(gate, up, down, alpha, f"{expert.down.scale.where}: times alpha")

    def _expert_tensor(self, name: str, layer: int, module: str) -> GgufTensor:
        projection = module.removesuffix("_proj")
        hidden, members = self._config.hidden, len(self._overlay.experts[layer])
        shape = (hidden, self.width) if projection == "down" else (self.width, hidden)

        def blocks() -> Iterator[np.ndarray]:
            for number, expert in enumerate(self._overlay.experts[layer]):
                scales = getattr(self._folded(layer, number), projection)
                trits = padded(getattr(expert, projection), shape).trits
                yield from ternary_slabs(self._experts, trits, scales)

        return GgufTensor(f"{name}.weight", self._experts.upper(), (members, *shape), blocks)


def _name(path: str) -> str:
    """llama.cpp's name of a module."""
    if path in _NAMES:
        return _NAMES[path]
    words = path.split(".")
    return f"blk.{words[2]}.{_NAMES['.'.join(words[3:])]}"
