"""Qwen2-MoE: routed experts beside one that every token uses, weighed by a gate of its own."""

from outlier_mlx.models.description import ModelConfig
from outlier_mlx.models.families import Family
from outlier_mlx.models.modules import Module, gated


def _experts(config: ModelConfig, layer: int) -> list[Module]:
    path = f"model.layers.{layer}.mlp"
    hidden, experts = config.hidden, config.experts
    width = config.expert_width or config.intermediate
    shared = config.raw.get("shared_expert_intermediate_size") or config.intermediate
    return [
        Module(f"{path}.gate", "router", (experts, hidden)),
        Module(f"{path}.shared_expert_gate", "router", (1, hidden)),
        *gated(f"{path}.shared_expert", "shared FFN", hidden, shared),
        *gated(f"{path}.switch_mlp", "experts", hidden, width, lead=(experts,)),
    ]


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    defaults={
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_experts": 60,
        "num_experts_per_tok": 4,
    },
    qkv_bias=True,
    scalings=(),
    refused={"qkv_bias": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    window=4096,
    window_switch="use_sliding_window",
    experts=("num_experts", "num_experts_per_tok"),
    feed_forward=_experts,
)
