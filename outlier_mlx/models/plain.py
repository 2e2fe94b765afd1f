"""The model families that imports know: what MLX's model of a config is made of, and its names.

Names and shapes are those of mlx-lm 0.32's `models/{llama,mixtral,qwen2}.py`; it runs mistral with
llama's. Only what those modules honour is let through: what they would ignore is refused, or noted
where it matters to long texts alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from outlier_mlx.errors import CheckpointError

FAMILIES = ("llama", "mistral", "mixtral", "qwen2")

# What transformers assumes where a config does not say; mlx-lm's defaults differ in places.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "mixtral": {
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 131072,
    },
    "qwen2": {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
}
# Far above any model's; names are listed for every layer, so those have a bound of their own.
_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 10_000
# Of positions, as mlx-lm's `models/rope_utils.py` does them.
_SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Module:
    """A module of an MLX model that stores a weight.

    Attributes:
        path: as in "model.layers.0.self_attn.q_proj".
        kind: the line of the summary that counts it (`tiers.summary.KINDS`).
        shape: of its weight before quantization: (out, in), (experts, out, in) or (hidden,).
        bias: whether `path.bias`, (out,), belongs to it.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def params(self) -> int:
        """Elements of the weight."""
        return prod(self.shape)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its weight and bias, unquantized."""
        bias = {f"{self.path}.bias": self.shape[:1]} if self.bias else {}
        return {f"{self.path}.weight": self.shape} | bias


def complete_config(config: dict, where: str, *, tied: bool) -> tuple[dict, list[str]]:
    """A config of one of `FAMILIES` with everything spelled out that MLX's model depends on.

    Args:
        config: as `plain_config.normalised` returns it.
        where: what messages call it.
        tied: whether the head is the embeddings' where the config does not say.

    Returns:
        The config, without `quantization_config`, `auto_map` and the like, and notes on what MLX's
        model will not do.

    Raises:
        CheckpointError: the family is another one, a field is missing or no sound number, or the
            model needs what MLX's does not do.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type {_short(family)}, expected one of {', '.join(FAMILIES)}"
        )
    dropped = ("quantization_config", "quantization", "auto_map", "model_file")
    result = {k: v for k, v in config.items() if k not in dropped}
    for name, value in _DEFAULTS[family].items():
        if result.get(name) is None:
            result[name] = value
    if result.get("num_key_value_heads") is None:
        result["num_key_value_heads"] = result.get("num_attention_heads")
    if result.get("tie_word_embeddings") is None:
        result["tie_word_embeddings"] = tied
    _check_sizes(result, where)
    _check_supported(result, where)
    return result, _notes(result)


def _check_sizes(config: dict, where: str) -> None:
    names = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
    names += ["vocab_size", "num_hidden_layers", "max_position_embeddings"]
    if config["model_type"] == "mixtral":
        names += ["num_local_experts", "num_experts_per_tok"]
    for name in names:
        most = _MAX_LAYERS if name in ("num_hidden_layers", "num_local_experts") else _MAX_SIZE
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(
                f"{where}: {name} is {_short(value)}, expected a whole number from 1 to {most}"
            )
    for name in ("rope_theta", "rms_norm_eps"):
        value = config[name]
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise CheckpointError(f"{where}: {name} is {_short(value)}, expected a positive number")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    given = config.get("head_dim")
    if given is None and hidden % heads:
        raise CheckpointError(
            f"{where}: {heads} attention heads do not divide hidden_size {hidden}"
        )
    if given is not None and (type(given) is not int or not 1 <= given <= _MAX_SIZE):
        raise CheckpointError(f"{where}: head_dim is {_short(given)}, expected a whole number")
    if heads % config["num_key_value_heads"]:
        raise CheckpointError(
            f"{where}: {config['num_key_value_heads']} KV heads do not divide {heads} heads"
        )
    if config["model_type"] == "mixtral" and (
        config["num_experts_per_tok"] > config["num_local_experts"]
    ):
        raise CheckpointError(
            f"{where}: num_experts_per_tok is {config['num_experts_per_tok']}, of"
            f" {config['num_local_experts']} experts"
        )


def _check_supported(config: dict, where: str) -> None:
    family = config["model_type"]
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(
            f"{where}: hidden_act {_short(config['hidden_act'])}; MLX's {family} knows silu only"
        )
    heads_divide = config["hidden_size"] == head_dim(config) * config["num_attention_heads"]
    if family in ("mixtral", "qwen2") and not heads_divide:
        raise CheckpointError(
            f"{where}: head_dim {config.get('head_dim')} is not hidden_size / heads;"
            f" MLX's {family} has no such heads"
        )
    if head_dim(config) % 2:
        raise CheckpointError(f"{where}: head_dim {head_dim(config)} is odd")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(config.get(name, False), bool):
            raise CheckpointError(f"{where}: {name} is {_short(config[name])}, expected a boolean")
    _check_scaling(config, where)


def _check_scaling(config: dict, where: str) -> None:
    scaling = config.get("rope_scaling")
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{where}: rope_scaling is not an object")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return
    if config["model_type"] == "mixtral":
        raise CheckpointError(f"{where}: rope_scaling {_short(kind)}; MLX's mixtral has none")
    if kind not in _SCALINGS:
        raise CheckpointError(
            f"{where}: rope_scaling {_short(kind)}, expected one of {', '.join(_SCALINGS)}"
        )
    if scaling.get("attention_factor") is not None:
        raise CheckpointError(f"{where}: rope_scaling.attention_factor is not known to mlx-lm")


def _notes(config: dict) -> list[str]:
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return []
    if config["model_type"] == "qwen2" and not config.get("use_sliding_window"):
        return []
    return [f"mlx-lm has no sliding window here: beyond {window} tokens, results differ"]


def head_dim(config: dict) -> int:
    """The width of an attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def modules(config: dict) -> list[Module]:
    """Everything that stores a weight in MLX's model of a config, in the order of a forward pass.

    Args:
        config: as `complete_config` returns it.
    """
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    result = [Module("model.embed_tokens", "embeddings", (vocab, hidden))]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        result.append(Module(f"{prefix}.input_layernorm", "norms", (hidden,)))
        result += _attention(f"{prefix}.self_attn", config)
        result.append(Module(f"{prefix}.post_attention_layernorm", "norms", (hidden,)))
        result += _feed_forward(prefix, config)
    result.append(Module("model.norm", "norms", (hidden,)))
    if not config["tie_word_embeddings"]:
        result.append(Module("lm_head", "head", (vocab, hidden)))
    return result


def _attention(prefix: str, config: dict) -> list[Module]:
    hidden, width = config["hidden_size"], head_dim(config)
    queries = config["num_attention_heads"] * width
    keys = config["num_key_value_heads"] * width
    everywhere = bool(config.get("attention_bias")) and config["model_type"] in ("llama", "mistral")
    biased = everywhere or config["model_type"] == "qwen2"
    return [
        Module(f"{prefix}.q_proj", "attention", (queries, hidden), biased),
        Module(f"{prefix}.k_proj", "attention", (keys, hidden), biased),
        Module(f"{prefix}.v_proj", "attention", (keys, hidden), biased),
        Module(f"{prefix}.o_proj", "attention", (hidden, queries), everywhere),
    ]


def _feed_forward(prefix: str, config: dict) -> list[Module]:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    sizes = [(width, hidden), (width, hidden), (hidden, width)]
    if config["model_type"] != "mixtral":
        biased = bool(config.get("mlp_bias")) and config["model_type"] in ("llama", "mistral")
        return [
            Module(f"{prefix}.mlp.{name}", "dense FFN", size, biased)
            for name, size in zip(PROJECTIONS, sizes, strict=True)
        ]
    experts = config["num_local_experts"]
    moe = f"{prefix}.block_sparse_moe"
    return [
        Module(f"{moe}.gate", "router", (experts, hidden)),
        *(
            Module(f"{moe}.switch_mlp.{name}", "experts", (experts, *size))
            for name, size in zip(PROJECTIONS, sizes, strict=True)
        ),
    ]


def check_complete(
    wanted: Iterable[Module], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Check that tensors are those of a model: none is missing, of another shape, or unknown.

    Args:
        wanted: the model's modules.
        found: shapes before quantization, by MLX's name, as "model.norm.weight".
        where: what messages call the source.

    Raises:
        CheckpointError: names the first tensor that is not as it should be.
    """
    expected = {name: shape for module in wanted for name, shape in module.tensors().items()}
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{where}: the tensor {name} {shape} is missing")
        if tuple(found[name]) != shape:
            raise CheckpointError(f"{where}: {name}: shape {found[name]}, expected {shape}")
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{where}: {name}: not a tensor of this model")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
