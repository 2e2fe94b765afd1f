"""Fields that change what a model computes, and that no model here honours.

They are refused where results would differ from what the config means, and told where nothing that
reads such a config honours them. Each field has values that mean the same as leaving it out.
"""

from collections.abc import Mapping
from typing import Any

from outlier_mlx.models.fields import Fields, short

#: Fields, and the values of each that change nothing.
Harmless = Mapping[str, tuple[Any, ...]]

#: How overlays and tiers never choose experts: always the most probable of a softmax over all.
ROUTING: Harmless = {
    "scoring_func": ("softmax",),
    "moe_gate_act": ("softmax",),
    "moe_router_activation_func": ("softmax",),
    "topk_method": ("greedy",),
    "n_group": (0, 1),
    "topk_group": (0, 1),
    "routed_scaling_factor": (1,),
    "moe_router_logit_softcapping": (0,),
}
# Of overlays, tiers and the configs of their bases: fields that are told of, and why they are
# ignored.
_LAYERS = "the tensors say which layers have experts"
_OWN: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "norm_topk_prob": ((True,), "the weights of a token's experts always add up to 1"),
    "decoder_sparse_step": ((1,), _LAYERS),
    "mlp_only_layers": (([],), _LAYERS),
    "moe_layer_freq": ((1,), _LAYERS),
    "first_k_dense_replace": ((0,), _LAYERS),
    "quantization_config": (({},), "the tensors are read as they are stored"),
}
# Fields of other families: neither transformers nor mlx-lm honours them in those of `models/`.
_FOREIGN: Harmless = {
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "final_logit_softcapping": (0,),
    "attn_logit_softcapping": (0,),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "clip_qkv": (),
    "alibi": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "no_rope_layers": ([],),
    "attention_chunk_size": (0,),
}


def refuse(fields: Fields, harmless: Harmless, reason: str) -> None:
    """Refuse fields whose values change something.

    Raises:
        CheckpointError: names the first such field; the message ends with `reason`.
    """
    for name, values in harmless.items():
        value = fields.raw.get(name)
        if value is not None and value not in values:
            fields.refuse(f"{name} {short(value)} {reason}")


def ignored(raw: Mapping[str, Any], family: str, *, own: bool) -> list[str]:
    """Sentences about the fields of a config that are ignored though they mean something.

    Args:
        raw: the config.
        family: the family of the model, or of the base.
        own: whether it is an overlay's or a tier's.
    """
    reason = f"models of the family {family} have no such field"
    known = {name: (harmless, reason) for name, harmless in _FOREIGN.items()}
    return [
        f"{name} {short(raw[name])} is ignored: {why}"
        for name, (harmless, why) in (known | (dict(_OWN) if own else {})).items()
        if raw.get(name) is not None and raw[name] not in harmless
    ]
