"""Llama 1 to 3, and what calls itself so."""

from outlier_mlx.models.families import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    roles=frozenset(["base", "import", "merge"]),
    defaults={"rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    own_head_dim=True,
    base_scalings=("linear", "llama3", "yarn"),
    honours_layer_types=True,
)
