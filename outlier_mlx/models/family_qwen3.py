"""Qwen3, dense: queries and keys are normalised in each head, whose width is its own."""

from outlier_mlx.models.families import Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    roles=frozenset(["base", "import"]),
    defaults={
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "head_dim": 128,
    },
    qk_norm=True,
    own_head_dim=True,
    refused={"attention_bias": (False,)},
    window=4096,
    window_switch="use_sliding_window",
    window_from="max_window_layers",
)
