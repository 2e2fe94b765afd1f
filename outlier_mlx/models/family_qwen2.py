"""Qwen2 and Qwen2.5: biases in queries, keys and values."""

from outlier_mlx.models.families import Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    roles=frozenset(["base", "import", "merge"]),
    defaults={"rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    qkv_bias=True,
    window=4096,
    window_switch="use_sliding_window",
    window_from="max_window_layers",
)
