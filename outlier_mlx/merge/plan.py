"""The plan of the merged model: its tensors in order, and its config."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from outlier_mlx.merge.gates import Gates
from outlier_mlx.merge.model import Mixture
from outlier_mlx.models.config import PROJECTIONS, spell_config
from outlier_mlx.models.families import family
from outlier_mlx.models.modules import Module
from outlier_mlx.models.quantization import DEFAULT_GROUP_SIZE, largest_group
from outlier_mlx.storage.tensors import FloatTensor
from outlier_mlx.writing.expert_parts import Stacked
from outlier_mlx.writing.float_parts import Constant, Plain, Quantized
from outlier_mlx.writing.parts import Part, quantization

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
_MIXTRAL_NAMES = {"gate": "w1", "down": "w2", "up": "w3"}
# Fields of the base's config that the mixture replaces, or that only the source's loader reads.
_DROPPED = frozenset(
    ["_name_or_path", "head_dim", "layer_types", "max_window_layers", "attention_bias", "mlp_bias"]
    + ["pretraining_tp", "rope_parameters", "rope_scaling", "transformers_version", "dtype"]
    + ["torch_dtype", "use_sliding_window", "sliding_window", "auto_map", "model_file"]
)


@dataclass(frozen=True)
class StoredAs:
    """How the merged model is stored.

    Attributes:
        dtype: dtype of tensors that are not quantized.
        bits: None: Hugging Face's tensor names; 4 or 8: an MLX folder with quantized matrices.
        group_size: number of weights that share a scale.
    """

    dtype: str
    bits: int | None = None
    group_size: int = DEFAULT_GROUP_SIZE


def make_parts(mixture: Mixture, gates: Gates, stored_as: StoredAs) -> list[Part]:
    """Every tensor of the merged model, in the order of a forward pass."""
    return list(_Plan(mixture, gates, stored_as).parts())


class _Plan:
    def __init__(self, mixture: Mixture, gates: Gates, stored_as: StoredAs) -> None:
        self.mixture, self.gates, self.stored_as = mixture, gates, stored_as

    def parts(self) -> Iterator[Part]:
        for module in self.mixture.modules:
            layer = int(module.path.split(".")[2]) if ".layers." in module.path else 0
            if module.kind == "router":
                yield self._gate(module, layer)
            elif module.kind == "shared FFN":
                assert self.mixture.shared is not None
                matrix = self.mixture.shared.matrix(layer, _projection(module))
                yield self._stored(module.path, module.kind, matrix)
            elif module.kind != "experts":
                yield from self._copied(module)
            elif self.stored_as.bits is not None:
                yield self._stacked(module, layer)
            elif _projection(module) == PROJECTIONS[0]:
                yield from self._apart(layer, module.path.rpartition(".switch_mlp.")[0])

    def _copied(self, module: Module) -> Iterator[Part]:
        """A module of the base; if the base's embeddings are tied, they are copied as the head."""
        tensors = self.mixture.base.tensors
        path = module.path
        if path == "lm_head" and self.mixture.base.config.tied:
            path = "model.embed_tokens"
        weight = tensors[f"{path}.weight"]
        if len(module.shape) == 1:
            yield self._vector(module, f"{path}.weight", weight)
        else:
            yield self._stored(module.path, module.kind, weight)
        if module.bias:
            yield self._vector(module, f"{path}.bias", tensors.get(f"{path}.bias"))

    def _vector(self, module: Module, name: str, tensor: FloatTensor | None) -> Part:
        if tensor is None:  # a bias that a llama does not have
            zeros = np.zeros(module.shape[0], np.float32)
            return Constant(module.path, module.kind, name, zeros, self.stored_as.dtype)
        return Plain(module.path, module.kind, tensor, name, self.stored_as.dtype)

    def _gate(self, module: Module, layer: int) -> Part:
        rows = self.gates.routed[layer]
        if module.path.endswith(".shared_expert_gate"):
            assert self.gates.shared is not None
            rows = self.gates.shared[layer][None]
        return Constant(module.path, "router", f"{module.path}.weight", rows, self.stored_as.dtype)

    def _stacked(self, module: Module, layer: int) -> Part:
        matrices = [expert.matrix(layer, _projection(module)) for expert in self.mixture.experts]
        members = tuple(self._stored(module.path, "experts", matrix) for matrix in matrices)
        return Stacked(module.path, "experts", members)

    def _apart(self, layer: int, prefix: str) -> Iterator[Part]:
        """All projections of the experts, with Hugging Face's names."""
        mixtral = self.mixture.architecture == "mixtral"
        for expert in self.mixture.experts:
            for projection in PROJECTIONS:
                name = _MIXTRAL_NAMES[projection] if mixtral else f"{projection}_proj"
                path = f"{prefix}.experts.{expert.number}.{name}"
                yield self._stored(path, "experts", expert.matrix(layer, projection))

    def _stored(self, path: str, kind: str, tensor: FloatTensor) -> Part:
        """A matrix; quantized if requested and if a group size divides its width."""
        stored_as = self.stored_as
        group = largest_group(tensor.shape[1], stored_as.group_size)
        if stored_as.bits is None or group is None:
            return Plain(path, kind, tensor, f"{path}.weight", stored_as.dtype)
        return Quantized(path, kind, tensor, stored_as.bits, group, stored_as.dtype)


def _projection(module: Module) -> str:
    """The projection of a module: "gate", "up" or "down"."""
    return module.path.rpartition(".")[2].removesuffix("_proj")


def unquantized(parts: Sequence[Part], stored_as: StoredAs) -> list[str]:
    """Paths of matrices that should be quantized, but whose width no group size divides."""
    if stored_as.bits is None:
        return []
    members = [(p.path, p.members[0] if isinstance(p, Stacked) else p) for p in parts]
    return [path for path, p in members if isinstance(p, Plain) and len(p.tensor.shape) == 2]


def make_config(mixture: Mixture, stored_as: StoredAs, parts: Sequence[Part]) -> dict:
    """The merged model's config.json: the base's, with the fields of a mixture of experts."""
    base = mixture.base.config
    config = {key: value for key, value in spell_config(base).items() if key not in _DROPPED}
    config |= {"dtype": stored_as.dtype, "torch_dtype": stored_as.dtype, "sliding_window": None}
    config["tie_word_embeddings"] = mixture.config.tied
    known = family(mixture.architecture)
    config |= {"architectures": [known.architecture], "model_type": known.model_type}
    if mixture.architecture == "mixtral":
        config["num_local_experts"] = len(mixture.experts)
    else:
        config |= {
            "num_experts": len(mixture.experts),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": base.intermediate,
            "shared_expert_intermediate_size": base.intermediate,
            "use_sliding_window": False,
        }
    return config | {"num_experts_per_tok": mixture.top_k} | quantization(parts)
