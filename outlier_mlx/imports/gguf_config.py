"""Build config.json from the metadata of a GGUF file.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Files of the architecture `llama`
hold Llama and Mistral models, which mlx-lm runs with the same code, and Mixtral models.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.imports.gguf_blocks import FLOATS, values
from outlier_mlx.imports.gguf_tokenizer import Vocabulary
from outlier_mlx.models.config import ModelConfig, parse_config
from outlier_mlx.models.families import family
from outlier_mlx.storage.gguf_model import GgufModel
from outlier_mlx.storage.rounding import fits

ARCHITECTURES = ("llama", "qwen2", "qwen3", "bitnet", "qwen35")
# What a model is checked as: mainline's `bitnet` (the 3B of 2024) is a Llama with two more norms.
_CHECKED_AS = {"bitnet": "llama"}
ROPE_FREQS = "rope_freqs.weight"

_SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
}
_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_NUMBERS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
# Keys that are read elsewhere, or do not change the model's output.
_OTHER = {
    "vocab_size",
    "rope.dimension_count",
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
# RoPE scaling of Llama 3.1 and 3.2. Only `factor` differs between models: it is the largest of the
# frequency factors in the file.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Metadata:
    """Reads metadata of an architecture and checks the types."""

    model: GgufModel
    prefix: str

    def get(self, name: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        """The value of a key, of one of the types.

        Raises:
            CheckpointError: it is of another type.
        """
        value = self.model.fields.get(f"{self.prefix}.{name}")
        if value is None:
            return default
        if type(value) not in kinds:
            raise CheckpointError(
                f"{self.model.where}: {self.prefix}.{name} is {str(value)[:40]!r}, expected"
                f" {listed((kind.__name__ for kind in kinds), last='or')}"
            )
        return value

    def need(self, name: str, kinds: tuple[type, ...] = (int,)) -> Any:
        """Like `get`; what is missing is refused, and so is a number that is not above 0."""
        value = self.get(name, kinds)
        if value is None or not 0 < value < math.inf:
            raise CheckpointError(
                f"{self.model.where}: {self.prefix}.{name} is {value}, expected a number above 0"
            )
        return value


def architecture(model: GgufModel) -> str:
    """The `general.architecture` of a file.

    Raises:
        CheckpointError: it is not one of `ARCHITECTURES`.
    """
    name = model.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{model.where}: architecture {str(name)[:40]!r}, expected one of"
            f" {', '.join(ARCHITECTURES)} (llama includes Mistral and Mixtral)"
        )
    return name


def read_config(model: GgufModel, vocabulary: Vocabulary) -> tuple[ModelConfig, list[str]]:
    """Build the complete config of the mlx-lm model; returns it with notes on ignored metadata.

    Raises:
        CheckpointError: the metadata is not consistent or does not match the tensors, or mlx-lm's
            model does not support it.
    """
    fields = Metadata(model, architecture(model))
    experts = fields.get("expert_count", (int,), 0)
    names = _SIZES | (_EXPERTS if experts else {}) | _NUMBERS
    config: dict[str, Any] = {}
    for key, name in names.items():
        value = fields.get(key, (int, float) if key in _NUMBERS else (int,))
        if value is not None:
            config[name] = short_float(value)
    kind = "mixtral" if experts else _CHECKED_AS.get(fields.prefix, fields.prefix)
    known = family(kind)
    config.setdefault("rope_theta", 10000.0)
    config |= {
        "model_type": kind,
        "architectures": [known.architecture],
        "hidden_act": "silu",
        "vocab_size": rows_of_embeddings(model),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        **special_ids(vocabulary),
    }
    if kind == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in model.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in model.tensors
    if known.window_switch and "sliding_window" in config:
        config[known.window_switch] = True
    if "head_dim" in known.defaults and {"hidden_size", "num_attention_heads"} <= config.keys():
        # transformers has another default than llama.cpp.
        width = config["hidden_size"] // max(1, config["num_attention_heads"])
        config.setdefault("head_dim", width)
    scaling = _scaling(fields)
    if scaling is not None:
        config["rope_scaling"] = scaling
    found = parse_config(config, role="import", where=model.where)
    _check_rest(fields, found, vocabulary)
    found = _with_frequency_factors(model, found)
    return found, known.notes(found) + _ignored(fields)


def short_float(value: float) -> float:
    """The shortest decimal for a float32 of the metadata: 1e-05, not 9.99999975e-06."""
    if isinstance(value, int) or not fits(value, "float32"):
        return value
    return float(str(np.float32(value)))


def rows_of_embeddings(model: GgufModel) -> int:
    """Rows of the embedding: the size of the vocabulary."""
    tensor = model.tensors.get("token_embd.weight")
    if tensor is None or len(tensor.shape) != 2:
        raise CheckpointError(f"{model.where}: the matrix token_embd.weight is missing")
    return tensor.shape[0]


def special_ids(vocabulary: Vocabulary) -> dict[str, Any]:
    """The ids of special tokens, as fields of a config.json."""
    ids: dict[str, Any] = {
        f"{name}_token_id": vocabulary.special[name]
        for name in ("bos", "eos", "pad")
        if name in vocabulary.special
    }
    first = [ids["eos_token_id"]] if "eos_token_id" in ids else []
    stops = list(dict.fromkeys([*first, *vocabulary.stops]))
    if len(stops) > 1:
        ids["eos_token_id"] = stops
    return ids


def _check_rest(fields: Metadata, config: ModelConfig, vocabulary: Vocabulary) -> None:
    where, rows = fields.model.where, config.vocab
    if len(vocabulary.tokens) != rows:
        raise CheckpointError(
            f"{where}: {len(vocabulary.tokens)} tokens, but token_embd.weight has {rows} rows"
        )
    width = config.head_dim
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


def _scaling(fields: Metadata) -> dict | None:
    """`rope_scaling` from the metadata; the defaults for YaRN are the same as in transformers."""
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
            f"{where}: {fields.prefix}.rope.scaling.type {kind!r} with factor {factor}; only linear"
            " and yarn are supported"
        )
    scaling = {"rope_type": kind, "type": kind, "factor": short_float(factor)}
    if kind == "yarn":
        context = fields.get("rope.scaling.original_context_length", (int,))
        if context is not None:  # else that of the config, as in llama.cpp
            scaling["original_max_position_embeddings"] = context
    for key in fields.model.fields:
        name = key.removeprefix(f"{fields.prefix}.")
        if name.startswith("rope.scaling.") and name not in _OTHER:
            raise CheckpointError(f"{where}: {key} is not supported by mlx-lm")
    return scaling


def _with_frequency_factors(model: GgufModel, config: ModelConfig) -> ModelConfig:
    """Convert the tensor of frequency factors to Llama 3's `rope_scaling`, or refuse it."""
    tensor = model.tensors.get(ROPE_FREQS)
    if tensor is None:
        return config
    half = config.head_dim // 2
    if tensor.kind not in FLOATS or tensor.shape != (half,):
        raise CheckpointError(
            f"{tensor.where}: {tensor.kind} {tensor.shape}, expected floats {(half,)}"
        )
    factors = values(tensor.kind, tensor.read())[0]
    if (factors == 1).all():
        return config
    scaling = {"rope_type": "llama3", "factor": short_float(float(factors.max())), **_LLAMA3}
    same = np.allclose(factors, _llama3_factors(config, scaling), rtol=1e-5, atol=0)
    if config.family != "llama" or config.rope_scaling is not None or not same:
        raise CheckpointError(
            f"{tensor.where}: frequency factors other than Llama 3's are not supported by mlx-lm"
        )
    return parse_config(config.raw | {"rope_scaling": scaling}, role="import", where=model.where)


def _llama3_factors(config: ModelConfig, scaling: dict) -> np.ndarray:
    """Llama 3's divisors of the frequencies, (head_dim / 2,); source: its `apply_scaling`."""
    width, factor = config.head_dim, scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    lengths = 2 * np.pi * config.rope_theta ** (np.arange(0, width, 2) / width)
    smooth = (context / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(lengths < context / high, 1, np.where(lengths > context / low, factor, between))


def _ignored(fields: Metadata) -> list[str]:
    known = {*_OTHER, *_SIZES, *_EXPERTS, *_NUMBERS}
    prefix = f"{fields.prefix}."
    names = [
        key
        for key in fields.model.fields
        if key.startswith(prefix) and key.removeprefix(prefix) not in known
    ]
    return [f"ignored metadata: {listed(names, 8)}"] if names else []
