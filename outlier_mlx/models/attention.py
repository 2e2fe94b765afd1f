"""The attention window of each layer, as far as a config says it."""

from outlier_mlx.models.description import Description, LinearAttention
from outlier_mlx.models.families import Family
from outlier_mlx.models.fields import Fields
from outlier_mlx.models.quantization import largest_group

# Fields of models whose layers do not all have keys and values of one width in the KV cache: latent
# or shared keys, states of recurrent layers, layers that differ.
_OTHER = (
    *("kv_lora_rank", "num_kv_shared_layers", "block_configs", "block_types", "use_cla"),
    *("hybrid_override_pattern", "layers_block_type", "full_attention_interval", "full_attn_idxs"),
    *("attn_layer_period", "attn_type_list", "attention_chunk_size", "layer_group_size"),
    *("num_kv_reuse_layers", "loop_num", "state_size", "sliding_window_layers", "global_head_dim"),
)
_OTHER_PREFIXES = ("mamba_", "ssm_", "linear_", "conv_", "lru_", "swa_", "rwkv_")
# mlx-lm's models with plain attention in every n-th layer, and a gated delta net in all others.
_GATED_DELTA = (
    *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    "prism_hadamard_qwen35",
)
_LINEAR_SIZES = (
    *("linear_num_value_heads", "linear_num_key_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_conv_kernel_dim"),
)


def read_attention(
    fields: Fields, known: Family | None, layers: int | None
) -> tuple[int | None, ...] | None:
    """The window of each layer in tokens, None for a layer that attends to all tokens.

    A layer of linear attention has the window 0: it keeps no keys, but a state (`read_linear`).

    Args:
        fields: the config.
        known: the family, if it is one of `models/`; mlx-lm's models of these have plain attention.
        layers: number of layers.

    Returns:
        None if the windows are not known, or a layer has no plain attention.
    """
    if layers is None:
        return None
    if known is not None and not known.honours_layer_types:
        return (None,) * layers
    if read_linear(fields) is not None:
        interval = fields.raw.get("full_attention_interval", 4)
        if type(interval) is not int or interval < 1:
            return None
        return tuple(0 if (layer + 1) % interval else None for layer in range(layers))
    if known is None and _is_other(fields):
        return None
    types, window = fields.raw.get("layer_types"), fields.raw.get("sliding_window")
    if types is None and known is None:
        types = _from_pattern(fields.raw.get("sliding_window_pattern"), layers)
    if types is None:
        return (None,) * layers
    windows = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != layers:
        return None
    if not all(isinstance(kind, str) and kind in windows for kind in types):
        return None
    if "sliding_attention" in types and (type(window) is not int or window < 1):
        return None
    return tuple(windows[kind] for kind in types)


def read_linear(fields: Fields) -> LinearAttention | None:
    """The sizes of layers of linear attention; None for other models, or where one is not known.

    They are those of mlx-lm's gated delta net, which keeps the last inputs of its convolution in
    16 bits, and a matrix for each value head in float32.
    """
    if fields.raw.get("model_type") not in _GATED_DELTA:
        return None
    sizes = [n for n in map(fields.raw.get, _LINEAR_SIZES) if type(n) is int and n > 0]
    if len(sizes) < len(_LINEAR_SIZES):
        return None
    values, keys, key_width, value_width, kernel = sizes
    channels = 2 * keys * key_width + values * value_width
    return LinearAttention(
        channels, 2 * (kernel - 1) * channels + 4 * values * value_width * key_width
    )


def fitting_group(config: Description, group_size: int) -> int | None:
    """The group size in which mlx-lm can quantize a model's KV cache.

    Args:
        config: the model.
        group_size: the wanted one, which is taken if it divides the width of a head.

    Returns:
        None if no group size fits, a layer has a window, or that is not known.
    """
    if config.attention is None or has_windows(config):
        return None
    return largest_group(config.head_dim, group_size) if config.head_dim else None


def has_windows(config: Description) -> bool:
    """Whether a layer attends to the last tokens only; linear attention has no such window."""
    return any(config.attention or ())


def _is_other(fields: Fields) -> bool:
    raw = fields.raw
    if any(raw.get(name) for name in _OTHER):
        return True
    if any(raw[name] for name in raw if name.startswith(_OTHER_PREFIXES)):
        return True
    given = raw.get("v_head_dim")
    return given is not None and given != raw.get("head_dim")


def _from_pattern(pattern: object, layers: int) -> object:
    """`layer_types` of a `sliding_window_pattern` n: every n-th layer attends to all tokens."""
    if pattern is None:
        return None
    if type(pattern) is not int or pattern < 1:
        return ()
    full = {layer for layer in range(layers) if layer % pattern == pattern - 1}
    return ["full_attention" if n in full else "sliding_attention" for n in range(layers)]
