"""The values of a config.json's fields, whatever names it has for them.

Published configs have several names for one field: those of two versions of transformers, and of
three kinds of overlays. They are read only here.
"""

from typing import Any

from outlier_mlx.errors import listed
from outlier_mlx.models.attention import read_attention, read_linear
from outlier_mlx.models.description import Defaults, is_overlay, is_tier
from outlier_mlx.models.families import Family
from outlier_mlx.models.fields import MAX_COUNT, Fields
from outlier_mlx.models.quantization import read_quantization

POSITIONS = ("max_seq_len", "max_position_embeddings")
MOE_LISTS = ("moe_layer_indices", "v3_2_moe_layers", "moe_layers")
# Names of the number of experts, and of the number of experts that a token uses.
_EXPERTS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")
TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "expert_intermediate_size")


def config_values(
    fields: Fields, known: Family | None, defaults: Defaults | None, *, aliases: bool
) -> dict[str, Any]:
    """The fields of a `Description`; RoPE's scaling is not checked.

    Args:
        fields: the config.
        known: its family.
        defaults: values of missing fields.
        aliases: whether sizes may have the names that overlays use.
    """

    def size(alias: str, name: str, **limits: Any) -> Any:
        return fields.size(*((alias, name) if aliases else (name,)), **limits)

    raw, usual = fields.raw, vars(defaults) if defaults else {}
    hidden = size("hidden_dim", "hidden_size")
    layers = size("n_layers", "num_hidden_layers", most=MAX_COUNT)
    heads = size("n_heads", "num_attention_heads")
    intermediate = size("intermediate_dim", "intermediate_size")
    kv_heads = known.defaults.get("num_key_value_heads", heads) if known is not None else heads
    return {
        "model_type": raw.get("model_type") if isinstance(raw.get("model_type"), str) else None,
        "family": known.model_type if known is not None else None,
        "hidden": hidden,
        "intermediate": intermediate,
        "layers": layers,
        "heads": heads,
        "kv_heads": size("n_kv_heads", "num_key_value_heads", default=kv_heads),
        "head_dim": _head_dim(fields, known, hidden, heads),
        "vocab": fields.size("vocab_size"),
        "max_positions": size(*POSITIONS, default=usual.get("max_positions")),
        "rope_theta": fields.positive("rope_theta", usual.get("rope_theta")),
        "rope_scaling": raw.get("rope_scaling") or None,
        "rms_norm_eps": fields.positive("rms_norm_eps", usual.get("rms_norm_eps")),
        "tied": fields.flag("tie_word_embeddings", False if fields.strict else None),
        **_mixture(fields, known, layers),
        "attention": read_attention(fields, known, layers),
        "linear": read_linear(fields),
        "dtype": _dtype(raw),
        "eos_ids": _ids(raw.get("eos_token_id")),
        "quantization": read_quantization(raw),
        "raw": dict(raw),
    }


def _head_dim(fields: Fields, known: Family | None, hidden: Any, heads: Any) -> int | None:
    if known is None or known.own_head_dim:
        given = fields.size("head_dim", required=False)
        if given is not None or fields.raw.get("head_dim") is not None:
            return given
        if known is not None and "head_dim" in known.defaults:
            return int(known.defaults["head_dim"])
    if hidden is None or heads is None or hidden % heads:
        fields.refuse(f"{heads} attention heads do not divide hidden_size {hidden}")
        return None
    return hidden // heads


def _mixture(fields: Fields, known: Family | None, layers: int | None) -> dict[str, Any]:
    raw = dict(fields.raw)
    names: list[tuple[str, ...]]  # of the number of experts, and of those that a token uses
    lists: tuple[str, ...] = ()
    if is_tier(raw):
        names, lists = [("num_experts",), ("num_experts_per_tok",)], ("moe_layers",)
    elif is_overlay(raw):
        names = [("n_experts", "outlier_num_experts"), ("top_k", "outlier_num_experts_per_tok")]
        lists = MOE_LISTS
    elif known is None:
        return _other_mixture(fields, layers)
    elif known.experts is not None:
        names = [(name,) for name in known.experts]
    else:
        return {"experts": 0, "top_k": 0, "moe_layers": (), "expert_width": None}
    experts = fields.size(*names[0], default=0, least=0, most=MAX_COUNT) or 0
    top_k = fields.size(*names[1], default=2)
    if experts and not lists and top_k is not None and top_k > experts:
        fields.refuse(f"{names[1][0]} is {top_k}, of {experts} experts")
    moe_layers = _moe_layers(fields, lists, layers) if experts else ()
    dense = raw.get("mlp_only_layers")
    if not lists and isinstance(dense, list):  # of transformers
        moe_layers = moe_layers and tuple(n for n in moe_layers if n not in dense)
    wide = known.expert_width if known is not None else Family.expert_width
    width = fields.size(wide, required=False) if moe_layers else None
    return {
        "experts": experts,
        "top_k": min(top_k, experts) if experts and top_k else top_k,
        "moe_layers": moe_layers,
        "expert_width": width,
    }


def _other_mixture(fields: Fields, layers: int | None) -> dict[str, Any]:
    """The experts of a model of an unknown family, as far as the usual field names tell."""
    experts = next((n for name in _EXPERTS if (n := fields.size(name))), 0)
    return {
        "experts": experts,
        "top_k": next((n for name in TOP_K_NAMES if (n := fields.size(name))), None),
        "moe_layers": None if experts or layers is None else (),
        "expert_width": next((n for name in _EXPERT_WIDTHS if (n := fields.size(name))), None),
    }


def _moe_layers(
    fields: Fields, names: tuple[str, ...], layers: int | None
) -> tuple[int, ...] | None:
    if layers is None:
        return None
    lists = {name: fields.raw[name] for name in names if fields.raw.get(name) is not None}
    for name, numbers in lists.items():
        valid = isinstance(numbers, list) and all(
            type(number) is int and 0 <= number < layers for number in numbers
        )
        if not valid or len(set(numbers)) != len(numbers):
            fields.refuse(f"{name} must list different layer numbers from 0 to {layers - 1}")
            return None
    if len({frozenset(numbers) for numbers in lists.values()}) > 1:
        fields.refuse(f"{listed(lists)} list different layers")
        return None
    return tuple(sorted(next(iter(lists.values()), range(layers))))


def _dtype(raw: Any) -> str | None:
    value = raw.get("dtype") or raw.get("torch_dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else None


def _ids(value: Any) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(n for n in listed if type(n) is int and n >= 0)
