"""The config.json that a GGUF file's metadata describes.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Files of the architecture `llama`
hold Llama, Mistral and, with experts, Mixtral models: MLX runs all but the last with the same code.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.imports.gguf_blocks import FLOATS, values
from outlier_mlx.imports.gguf_file import GgufModel
from outlier_mlx.imports.gguf_tokenizer import Vocabulary
from outlier_mlx.models.plain import complete_config, head_dim

ARCHITECTURES = ("llama", "qwen2")
ROPE_FREQS = "rope_freqs.weight"

_SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.sliding_window": "sliding_window",
}
_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_NUMBERS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
# Read elsewhere, or without influence on what is computed.
_OTHER = {
    "vocab_size",
    "rope.dimension_count",
    "attention.key_length",
    "attention.value_length",
    "attention.causal",
    "expert_feed_forward_length",
    "tensor_data_layout",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
}
_ARCHITECTURE_NAMES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
# Llama 3.1's and 3.2's long positions: the factors of low and high frequencies, and the context
# that they were made for. The first is in the file (it is the largest of the frequencies' factors).
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class _Fields:
    """The metadata of an architecture, with its types checked."""

    model: GgufModel
    prefix: str

    def get(self, name: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        value = self.model.fields.get(f"{self.prefix}.{name}")
        if value is None:
            return default
        if type(value) not in kinds:
            raise CheckpointError(
                f"{self.model.where}: {self.prefix}.{name} is {str(value)[:40]!r}, expected"
                f" {listed((kind.__name__ for kind in kinds), last='or')}"
            )
        return value


def architecture(model: GgufModel) -> str:
    """The architecture of a file.

    Raises:
        CheckpointError: it is not one of `ARCHITECTURES`.
    """
    name = model.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{model.where}: architecture {str(name)[:40]!r}, expected one of"
            f" {', '.join(ARCHITECTURES)} (which holds Mistral and Mixtral, too)"
        )
    return name


def read_config(model: GgufModel, vocabulary: Vocabulary) -> tuple[dict, list[str]]:
    """The config of MLX's model, complete, and notes on what it does not honour.

    Raises:
        CheckpointError: the metadata contradicts itself or the tensors, or asks for what MLX's
            model does not do.
    """
    fields = _Fields(model, architecture(model))
    sizes = _SIZES | (_EXPERTS if _experts(fields) else {})
    config: dict[str, Any] = {}
    for key, name in sizes.items():
        value = fields.get(key, (int,))
        if value is not None:
            config[name] = value
    for key, name in _NUMBERS.items():
        value = fields.get(key, (int, float))
        if value is not None:
            config[name] = _short(value)
    family = "mixtral" if _experts(fields) else fields.prefix
    config.setdefault("rope_theta", 10000.0)
    config |= {
        "model_type": family,
        "architectures": [_ARCHITECTURE_NAMES[family]],
        "hidden_act": "silu",
        "vocab_size": _rows_of_embeddings(model),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        **_special(vocabulary),
    }
    width = fields.get("attention.key_length", (int,))
    if width is not None:
        config["head_dim"] = width
    if family == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in model.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in model.tensors
    if family == "qwen2" and "sliding_window" in config:
        config["use_sliding_window"] = True
    scaling = _scaling(fields)
    if scaling is not None:
        config["rope_scaling"] = scaling
    config, notes = complete_config(config, model.where, tied="output.weight" not in model.tensors)
    _check_rest(fields, config, vocabulary)
    config = _honour_frequencies(model, config)
    return config, notes + _unread(fields, sizes)


def _experts(fields: _Fields) -> int:
    return fields.get("expert_count", (int,), 0)


def _short(value: float) -> float:
    """A float32 of the metadata as the shortest decimal that means it: 1e-05, not 9.99999975e-06"""
    return value if isinstance(value, int) else float(str(np.float32(value)))


def _rows_of_embeddings(model: GgufModel) -> int:
    tensor = model.tensors.get("token_embd.weight")
    if tensor is None or len(tensor.shape) != 2:
        raise CheckpointError(f"{model.where}: no matrix token_embd.weight")
    return tensor.shape[0]


def _special(vocabulary: Vocabulary) -> dict[str, Any]:
    ids: dict[str, Any] = {
        f"{name}_token_id": vocabulary.special[name]
        for name in ("bos", "eos", "pad")
        if name in vocabulary.special
    }
    stops = list(dict.fromkeys([ids.get("eos_token_id"), *vocabulary.stops]))
    stops = [n for n in stops if n is not None]
    if len(stops) > 1:
        ids["eos_token_id"] = stops
    return ids


def _check_rest(fields: _Fields, config: dict, vocabulary: Vocabulary) -> None:
    where, rows = fields.model.where, config["vocab_size"]
    if len(vocabulary.tokens) != rows:
        raise CheckpointError(
            f"{where}: {len(vocabulary.tokens)} tokens, but token_embd.weight has {rows} rows"
        )
    width = head_dim(config)
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        value = fields.get(key, (int,), width)
        if value != width:
            raise CheckpointError(
                f"{where}: {fields.prefix}.{key} is {value}, but a head has {width} dimensions"
            )
    stated = fields.get("vocab_size", (int,), rows)
    if stated != rows:
        raise CheckpointError(
            f"{where}: {fields.prefix}.vocab_size is {stated}, but token_embd.weight has"
            f" {rows} rows"
        )


def _scaling(fields: _Fields) -> dict | None:
    """`rope_scaling` of the metadata; llama.cpp's defaults for YaRN are transformers'."""
    kind = fields.get("rope.scaling.type", (str,))
    old = fields.get("rope.scale_linear", (int, float))  # files of 2023
    factor = fields.get("rope.scaling.factor", (int, float), old)
    if kind is None and factor is not None:
        kind = "linear"
    if kind in (None, "none") or (kind == "linear" and factor in (None, 0, 1)):
        return None
    where = fields.model.where
    if kind not in ("linear", "yarn") or factor is None or not 0 < factor < math.inf:
        raise CheckpointError(
            f"{where}: {fields.prefix}.rope.scaling.type {kind!r} with factor {factor}; linear and"
            " yarn are honoured"
        )
    scaling = {"rope_type": kind, "type": kind, "factor": _short(factor)}
    if kind == "yarn":
        context = fields.get("rope.scaling.original_context_length", (int,))
        if context is None:
            raise CheckpointError(f"{where}: yarn without rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = context
    for key in fields.model.fields:
        name = key.removeprefix(f"{fields.prefix}.")
        if name.startswith("rope.scaling.") and name not in _OTHER:
            raise CheckpointError(f"{where}: {key} is not honoured by mlx-lm")
    return scaling


def _honour_frequencies(model: GgufModel, config: dict) -> dict:
    """Express a tensor of frequency factors as Llama 3's `rope_scaling`, or refuse it."""
    tensor = model.tensors.get(ROPE_FREQS)
    if tensor is None:
        return config
    half = head_dim(config) // 2
    if tensor.kind not in FLOATS or tensor.shape != (half,):
        raise CheckpointError(
            f"{tensor.where}: {tensor.kind} {tensor.shape}, expected floats {(half,)}"
        )
    factors = values(tensor.kind, tensor.read())[0]
    if (factors == 1).all():
        return config
    scaling = {"rope_type": "llama3", "factor": _short(float(factors.max())), **_LLAMA3}
    same = np.allclose(factors, _llama3_factors(config, scaling), rtol=1e-5, atol=0)
    if config["model_type"] != "llama" or "rope_scaling" in config or not same:
        raise CheckpointError(
            f"{tensor.where}: frequencies that are not Llama 3's; mlx-lm has no place for them"
        )
    return config | {"rope_scaling": scaling}


def _llama3_factors(config: dict, scaling: dict) -> np.ndarray:
    """What Llama 3 divides each frequency by (its reference code, `apply_scaling`)."""
    width, factor = head_dim(config), scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    lengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, width, 2) / width)
    smooth = (context / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(lengths < context / high, 1, np.where(lengths > context / low, factor, between))


def _unread(fields: _Fields, sizes: dict[str, str]) -> list[str]:
    known = _OTHER | set(sizes) | set(_EXPERTS) | set(_NUMBERS)
    prefix = f"{fields.prefix}."
    names = [
        key
        for key in fields.model.fields
        if key.startswith(prefix) and key.removeprefix(prefix) not in known
    ]
    return [f"metadata that is not read: {listed(names, 8)}"] if names else []
