"""What a config.json says of a model, in one spelling."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from outlier_mlx.models.quantization import Quantization

PROJECTIONS = ("gate", "up", "down")


def is_ternary_model(raw: Mapping[str, Any]) -> bool:
    """Whether a config is that of a model whose own matrices are ternary; see `ternary_fields`."""
    ternary = raw.get("ternary")
    return isinstance(ternary, dict) and "modules" in ternary


def is_tier(raw: Mapping[str, Any]) -> bool:
    """Whether a config is a tier's."""
    return "ternary" in raw and not is_ternary_model(raw)


def is_overlay(raw: Mapping[str, Any]) -> bool:
    """Whether a config is an overlay's."""
    experts = raw.get("n_experts") or raw.get("outlier_num_experts")
    return "ternary" not in raw and bool(experts or raw.get("model_type") == "outlier_moe")


@dataclass(frozen=True)
class Defaults:
    """Values of fields that are missing in an overlay's config."""

    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 32768


@dataclass(frozen=True)
class LinearAttention:
    """What a layer of linear attention computes with.

    Attributes:
        channels: values of a token that it convolves: queries, keys and values.
        state_nbytes: bytes that it keeps of a conversation of any length.
    """

    channels: int
    state_nbytes: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model of any family; None where the config has no value, or no valid one.

    Attributes:
        model_type: `model_type` of the config, or of its text model if the config is nested.
        family: name of the family in `models/`; None if it is not one of these.
        hidden: width of the residual stream.
        intermediate: width of a dense (or shared) FFN.
        layers: decoder layers.
        heads: attention heads of a layer.
        kv_heads: heads of keys and values.
        head_dim: width of a head.
        vocab: rows of the embedding.
        max_positions: `max_position_embeddings`; see `sizes.context_length`.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how positions are scaled, `rope_type` first; None: they are not.
        rms_norm_eps: added to the mean of squares in the norms.
        tied: whether the config says that the head is the embedding.
        experts: routed experts of a MoE layer; 0: there are none.
        top_k: experts that a token uses.
        moe_layers: numbers of the layers that have experts; None: not known which.
        expert_width: width of a routed expert.
        attention: for each layer, how many of the last tokens it attends to, None for all of
            them, 0 for linear attention; None as a whole where a layer is neither, or that is not
            known.
        linear: the layers of linear attention; None if there are none.
        dtype: dtype of activations and unquantized weights.
        eos_ids: tokens that end a text.
        quantization: how matrices are quantized, if they are.
        raw: the config as it was read; a nested one lifted to the top.
    """

    model_type: str | None
    family: str | None
    hidden: int | None
    intermediate: int | None
    layers: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    vocab: int | None
    max_positions: int | None
    rope_theta: float | None
    rope_scaling: dict[str, Any] | None
    rms_norm_eps: float | None
    tied: bool | None
    experts: int
    top_k: int | None
    moe_layers: tuple[int, ...] | None
    expert_width: int | None
    attention: tuple[int | None, ...] | None
    linear: LinearAttention | None
    dtype: str | None
    eos_ids: tuple[int, ...]
    quantization: Quantization | None
    raw: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Description):
    """A checked model of a supported family; these fields determine what it computes.

    Attributes:
        qkv_bias: whether queries, keys and values have biases.
        o_bias: whether the output of attention has one.
        mlp_bias: whether the matrices of the FFN have biases.
        qk_norm: whether queries and keys are normalised in each head.
        defaults: the values that were used for missing fields.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool
    top_k: int
    moe_layers: tuple[int, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    defaults: Defaults
