"""The plan of the merged model: its tensors in order, and its config."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from outlier_mlx.imports.opened import quantization
from outlier_mlx.merge.gates import Gates
from outlier_mlx.merge.model import Mixture
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.storage.tensors import FloatTensor
from outlier_mlx.tiers.presets import GROUP_SIZES
from outlier_mlx.writing.parts import Chunk, Part
from outlier_mlx.writing.tensors import Constant, Plain, Quantized
from outlier_mlx.writing.writer import TensorSpec

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
_MIXTRAL_NAMES = {"gate": "w1", "down": "w2", "up": "w3"}
# Of the base's config: what the mixture says otherwise, or what only the source's loader reads.
_DROPPED = frozenset(
    ["_name_or_path", "head_dim", "layer_types", "max_window_layers", "attention_bias", "mlp_bias"]
    + ["pretraining_tp", "rope_parameters", "rope_scaling", "transformers_version", "dtype"]
    + ["torch_dtype", "use_sliding_window", "sliding_window", "auto_map", "model_file"]
)


@dataclass(frozen=True)
class Form:
    """How the merged model is stored.

    Attributes:
        dtype: of what is not quantized.
        bits: None writes Hugging Face's names; 4 or 8 an MLX folder with quantized matrices.
        group_size: weights that share a scale.
    """

    dtype: str
    bits: int | None = None
    group_size: int = 64


@dataclass(frozen=True)
class Stacked(Part):
    """One projection of a layer's experts as MLX has it: (experts, out, in), perhaps quantized.

    Attributes:
        members: an expert each; all with the same tensors, as they will be named.
    """

    members: tuple[Part, ...]

    @property
    def params(self) -> int:
        """Of all experts."""
        return sum(member.params for member in self.members)

    @property
    def source_bytes(self) -> int:
        """Of all experts."""
        return sum(member.source_bytes for member in self.members)

    def specs(self) -> list[TensorSpec]:
        """A member's, with one more axis."""
        count = len(self.members)
        return [
            TensorSpec(spec.name, spec.dtype, (count, *spec.shape))
            for spec in self.members[0].specs()
        ]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """Weights expert by expert, then the scales and biases that were put aside."""
        first, *others = (spec.name for spec in self.specs())
        aside: dict[str, list[memoryview]] = {name: [] for name in others}
        for member in self.members:
            for name, chunk, used in member.chunks(pool):
                if name == first:
                    yield name, chunk, used
                else:
                    aside[name].append(chunk)
        for name, pieces in aside.items():
            for piece in pieces:
                yield name, piece, 0


def make_parts(mixture: Mixture, gates: Gates, form: Form) -> list[Part]:
    """Every tensor of the merged model, in the order of a forward pass."""
    return list(_Plan(mixture, gates, form).parts())


class _Plan:
    def __init__(self, mixture: Mixture, gates: Gates, form: Form) -> None:
        self.mixture, self.gates, self.form = mixture, gates, form

    def parts(self) -> Iterator[Part]:
        base = self.mixture.base
        yield self._matrix("model.embed_tokens", "embeddings")
        for layer in range(base.layers):
            prefix = f"model.layers.{layer}"
            yield self._vector(f"{prefix}.input_layernorm.weight", "norms")
            for name in ("q", "k", "v", "o"):
                yield self._matrix(f"{prefix}.self_attn.{name}_proj", "attention")
                if name != "o" and self.mixture.biased:
                    yield self._vector(f"{prefix}.self_attn.{name}_proj.bias", "attention")
            yield self._vector(f"{prefix}.post_attention_layernorm.weight", "norms")
            yield from self._moe(layer, f"{prefix}.{self.mixture.moe_path}")
        yield self._vector("model.norm.weight", "norms")
        if not self.mixture.tied:
            tied = base.config["tie_word_embeddings"]
            yield self._matrix("lm_head", "head", "model.embed_tokens" if tied else "lm_head")

    def _moe(self, layer: int, prefix: str) -> Iterator[Part]:
        yield self._gate(f"{prefix}.gate", self.gates.routed[layer])
        shared = self.mixture.shared
        if shared is not None:
            assert self.gates.shared is not None
            yield self._gate(f"{prefix}.shared_expert_gate", self.gates.shared[layer][None])
            for projection in PROJECTIONS:
                path = f"{prefix}.shared_expert.{projection}_proj"
                yield self._stored(path, "shared FFN", shared.matrix(layer, projection))
        if self.form.bits is None:
            yield from self._apart(layer, prefix)
            return
        for projection in PROJECTIONS:
            path = f"{prefix}.switch_mlp.{projection}_proj"
            matrices = [expert.matrix(layer, projection) for expert in self.mixture.experts]
            members = tuple(self._stored(path, "experts", matrix) for matrix in matrices)
            yield Stacked(path, "experts", members)

    def _apart(self, layer: int, prefix: str) -> Iterator[Part]:
        """Experts by Hugging Face's names."""
        mixtral = self.mixture.architecture == "mixtral"
        for expert in self.mixture.experts:
            for projection in PROJECTIONS:
                name = _MIXTRAL_NAMES[projection] if mixtral else f"{projection}_proj"
                path = f"{prefix}.experts.{expert.number}.{name}"
                yield self._stored(path, "experts", expert.matrix(layer, projection))

    def _gate(self, path: str, rows: np.ndarray) -> Part:
        return Constant(path, "router", f"{path}.weight", rows, self.form.dtype)

    def _matrix(self, path: str, kind: str, source: str | None = None) -> Part:
        return self._stored(path, kind, self.mixture.base.tensors[f"{source or path}.weight"])

    def _vector(self, name: str, kind: str) -> Part:
        path = name.rpartition(".")[0]
        tensor = self.mixture.base.tensors.get(name)
        if tensor is None:  # a bias that a llama does not have
            out = self.mixture.base.tensors[f"{path}.weight"].shape[0]
            return Constant(path, kind, name, np.zeros(out, np.float32), self.form.dtype)
        return Plain(path, kind, tensor, name, self.form.dtype)

    def _stored(self, path: str, kind: str, tensor: FloatTensor) -> Part:
        """A matrix, quantized where that is asked for and a group size divides its width."""
        form = self.form
        width = tensor.shape[1]
        sizes = [size for size in GROUP_SIZES if size <= form.group_size and width % size == 0]
        if form.bits is None or not sizes:
            return Plain(path, kind, tensor, f"{path}.weight", form.dtype)
        return Quantized(path, kind, tensor, form.bits, max(sizes), form.dtype)


def unquantized(parts: Sequence[Part], form: Form) -> list[str]:
    """Matrices that no group size divides, though they were to be quantized."""
    if form.bits is None:
        return []
    members = [(p.path, p.members[0] if isinstance(p, Stacked) else p) for p in parts]
    return [path for path, p in members if isinstance(p, Plain) and len(p.tensor.shape) == 2]


def make_config(mixture: Mixture, form: Form, parts: Sequence[Part]) -> dict:
    """The merged model's config.json: the base's, and what makes it a mixture of experts."""
    base = mixture.base.config
    config = {key: value for key, value in base.items() if key not in _DROPPED}
    config |= {"dtype": form.dtype, "torch_dtype": form.dtype, "sliding_window": None}
    config["tie_word_embeddings"] = mixture.tied
    if mixture.architecture == "mixtral":
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": len(mixture.experts),
        }
    else:
        config |= {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "num_experts": len(mixture.experts),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": base["intermediate_size"],
            "shared_expert_intermediate_size": base["intermediate_size"],
            "use_sliding_window": False,
        }
    config["num_experts_per_tok"] = mixture.top_k
    stored = {}
    for part in parts:
        inner = part.members[0] if isinstance(part, Stacked) else part
        if isinstance(inner, Quantized):
            stored[part.path] = (inner.bits, inner.group_size)
    if stored:
        config["quantization"] = quantization(stored)
    return config
