"""Mixtral: in every layer, routed experts in place of the FFN."""

from outlier_mlx.models.description import ModelConfig
from outlier_mlx.models.families import Family
from outlier_mlx.models.modules import Module, gated


def _experts(config: ModelConfig, layer: int) -> list[Module]:
    path = f"model.layers.{layer}.block_sparse_moe"
    hidden, width, experts = config.hidden, config.intermediate, config.experts
    return [
        Module(f"{path}.gate", "router", (experts, hidden)),
        *gated(f"{path}.switch_mlp", "experts", hidden, width, lead=(experts,)),
    ]


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    roles=frozenset(["import"]),
    defaults={
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 131072,
    },
    scalings=(),
    experts=("num_local_experts", "num_experts_per_tok"),
    expert_width="intermediate_size",
    feed_forward=_experts,
)
