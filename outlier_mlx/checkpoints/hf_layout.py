"""Which class of stock transformers computes what a tier computes, and how that is written.

What follows holds in transformers 4.57 and 5.x alike. `qwen2_moe` has a shared expert beside the
routed ones, weighed by sigmoid(gate x): a gate of zeros is 1/2, so the shared `down_proj` is
doubled. It has no norms of queries and keys. `qwen3_moe` has them, but no shared expert; as the
weights of a token's experts add up to 1, the base's FFN may stand in each expert instead:

    sum_e w_e (FFN_shared(x) + a_e FFN_e(x)) = FFN_shared(x) + sum_e w_e a_e FFN_e(x)

with a width that is the sum of both. Alphas are in the experts' `down_proj` in either class.
"""

from dataclasses import dataclass
from typing import Any

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.attention import has_windows
from outlier_mlx.models.config import BASE_TYPE
from outlier_mlx.models.description import ModelConfig
from outlier_mlx.models.families import family
from outlier_mlx.models.rope import attention_factor
from outlier_mlx.models.tier_fields import FOREIGN, base_fields

# Fields that only tiers have, or that are rewritten. Windows that the base's config may name are no
# part of what its tier computes.
_DROPPED = frozenset(
    ["model_file", "ternary", "quantization", "quantization_config", "moe_layers", BASE_TYPE]
    + ["auto_map", "dtype", "torch_dtype", "transformers_version", *FOREIGN]
    + ["layer_types", "sliding_window", "use_sliding_window", "max_window_layers"]
)
# transformers 5 multiplies by the experts with a function of PyTorch that takes only rows of whole
# 16 bytes, unless the config tells it not to.
_GROUPED = 8


@dataclass(frozen=True)
class HfClass:
    """A class of transformers.

    Attributes:
        model_type: `model_type` of its config.json.
        architecture: its name.
        folded: whether the base's FFN stands in every expert, before the expert's own weights.
    """

    model_type: str
    architecture: str
    folded: bool = False


def hf_class(config: ModelConfig, where: str) -> HfClass:
    """The class that computes what a tier computes.

    Args:
        config: the tier's.
        where: name of the tier, for messages.

    Raises:
        CheckpointError: there is none; says why.
    """
    if has_windows(config):
        raise _refused(where, "some of its layers attend to a window of tokens")
    if not config.moe_layers:
        # transformers' Mistral is its Llama, without biases.
        biases = config.qkv_bias or config.o_bias or config.mlp_bias
        known = family("llama" if config.family == "mistral" and biases else config.family)
        return HfClass(known.model_type, known.architecture)
    if config.mlp_bias or config.o_bias:
        biased = "its FFNs have" if config.mlp_bias else "the output of attention has"
        raise _refused(where, f"{biased} biases, which no MoE class with a shared expert has")
    if config.qk_norm:
        return HfClass("qwen3_moe", "Qwen3MoeForCausalLM", folded=True)
    if config.heads * config.head_dim != config.hidden:
        raise _refused(
            where,
            f"{config.heads} heads of {config.head_dim} are not its hidden_size {config.hidden},"
            " as qwen2_moe of transformers 4.57 needs it",
        )
    return HfClass("qwen2_moe", "Qwen2MoeForCausalLM")


def _refused(where: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{where}: stock transformers cannot express this tier: {reason}")


def hf_config(config: ModelConfig, known: HfClass, dtype: str) -> dict[str, Any]:
    """The config.json of a tier in transformers.

    Args:
        config: the tier's.
        known: its class.
        dtype: the dtype of the weights.
    """
    kept = {key: value for key, value in config.raw.items() if key not in _DROPPED}
    experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    if not config.moe_layers:
        kept = {key: value for key, value in kept.items() if key not in experts}
    kept |= base_fields(config) | {
        "model_type": known.model_type,
        "architectures": [known.architecture],
        "dtype": dtype,
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "yarn" and scaling["factor"] < 1:
        kept["rope_scaling"] = scaling | {"attention_factor": attention_factor(scaling)}
    if known.model_type == "mistral":
        kept["sliding_window"] = None  # it would be 4096 if it were missing
    if known.model_type.startswith("qwen"):
        kept["use_sliding_window"] = False
    return kept | (_mixture(config, known) if config.moe_layers else {})


def _mixture(config: ModelConfig, known: HfClass) -> dict[str, Any]:
    assert config.expert_width is not None  # `open_stored` has seen to that
    dense = [layer for layer in range(config.layers) if layer not in config.moe_layers]
    common: dict[str, Any] = {
        "num_experts": config.experts,
        "num_experts_per_tok": config.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "output_router_logits": False,
    }
    width = config.expert_width + (config.intermediate if known.folded else 0)
    common["moe_intermediate_size"] = width
    if width % _GROUPED or config.hidden % _GROUPED:
        common["experts_implementation"] = "eager"
    if known.folded:
        return common | {"attention_bias": False}
    return common | {
        "qkv_bias": config.qkv_bias,
        "shared_expert_intermediate_size": config.intermediate,
    }
