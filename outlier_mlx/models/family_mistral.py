"""Mistral, which mlx-lm runs with its model of Llama."""

from outlier_mlx.models.families import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    roles=frozenset(["base", "import", "merge"]),
    defaults={
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    own_head_dim=True,
    base_scalings=("linear", "llama3", "yarn"),
    window=4096,
    honours_layer_types=True,
)
