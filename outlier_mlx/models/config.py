"""An overlay's `config.json`, whichever names it uses, as one checked description of the model."""

import sys
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import read_json

PROJECTIONS = ("gate", "up", "down")
POSITIONS = ("max_seq_len", "max_position_embeddings")
MOE_LISTS = ("moe_layer_indices", "v3_2_moe_layers", "moe_layers")
MODEL_TYPES = ("outlier_moe", "qwen2", "qwen2_moe")
# Far above any model's. Names are listed for every layer and expert, so those have a bound of
# their own.
MAX_SIZE = 2**31 - 1
MAX_COUNT = 10_000
# What tiers call YaRN: see `tiers.plan`.
TIER_YARN = "deepseek_yarn"


@dataclass(frozen=True)
class Defaults:
    """What a form of checkpoint means when its config does not say."""

    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 32768


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and constants of a model; `raw` is the config as it was written.

    `defaults` is what applied where it did not say.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    max_positions: int
    rope_theta: float
    rope_scaling: dict | None
    rms_norm_eps: float
    tied: bool
    experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    raw: dict
    defaults: Defaults

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads


def read_config(folder: Path, defaults: Defaults | None = None) -> ModelConfig:
    """Read and check a folder's `config.json`.

    Args:
        folder: a checkpoint or base folder.
        defaults: what missing fields mean in this form.

    Raises:
        CheckpointError: a field is missing, malformed, or two names for one field disagree.
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json")
    return parse_config(read_json(inside(folder, "config.json")), defaults or Defaults())


def parse_config(raw: dict, defaults: Defaults) -> ModelConfig:
    """Check the fields of a config; see `read_config`."""
    hidden = _size(raw, "hidden_dim", "hidden_size")
    layers = _size(raw, "n_layers", "num_hidden_layers", most=MAX_COUNT)
    heads = _size(raw, "n_heads", "num_attention_heads")
    kv_heads = _size(raw, "n_kv_heads", "num_key_value_heads", default=heads)
    if hidden % heads or heads % kv_heads or (hidden // heads) % 2:
        raise CheckpointError(
            f"config.json: hidden size {hidden}, {heads} heads, {kv_heads} KV heads: each must"
            " divide the one before it, and the head width must be even"
        )
    theta, scaling = _rope(raw, defaults)
    return ModelConfig(
        hidden=hidden,
        intermediate=_size(raw, "intermediate_dim", "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        vocab=_size(raw, "vocab_size"),
        max_positions=_size(raw, *POSITIONS, default=defaults.max_positions),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_positive(raw, "rms_norm_eps", defaults.rms_norm_eps),
        tied=_flag(raw, "tie_word_embeddings"),
        **_mixture(raw, layers),
        raw=raw,
        defaults=defaults,
    )


def tier_config(raw: dict) -> ModelConfig:
    """Check the `config.json` of a tier, which calls two fields otherwise; see `read_config`."""
    mixture = {"n_experts": raw.get("num_experts"), "top_k": raw.get("num_experts_per_tok")}
    return parse_config(raw | mixture, Defaults())


def _mixture(raw: dict, layers: int) -> dict:
    experts = _size(raw, "n_experts", "outlier_num_experts", default=0, least=0, most=MAX_COUNT)
    top_k = _size(raw, "top_k", "outlier_num_experts_per_tok", default=2)
    kind = raw.get("model_type", "outlier_moe")
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json: model_type {_short(kind)}, expected one of {MODEL_TYPES}"
        )
    moe_layers = _moe_layers(raw, layers) if experts else ()
    top_k = min(top_k, experts) if experts else top_k
    return {"experts": experts, "top_k": top_k, "moe_layers": moe_layers}


def _moe_layers(raw: dict, layers: int) -> tuple[int, ...]:
    lists = {name: raw[name] for name in MOE_LISTS if raw.get(name) is not None}
    for name, numbers in lists.items():
        valid = isinstance(numbers, list) and all(
            type(number) is int and 0 <= number < layers for number in numbers
        )
        if not valid or len(set(numbers)) != len(numbers):
            raise CheckpointError(
                f"config.json: {name} must list different layer numbers from 0 to {layers - 1}"
            )
    if len({frozenset(numbers) for numbers in lists.values()}) > 1:
        raise CheckpointError(f"config.json: {listed(lists)} list different layers")
    for numbers in lists.values():
        return tuple(sorted(numbers))
    return tuple(range(layers))


def _rope(raw: dict, defaults: Defaults) -> tuple[float, dict | None]:
    nested = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    for name, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise CheckpointError(f"config.json: {name} must be an object")
    bases = {
        name: _positive(fields, "rope_theta", None, name)
        for name, fields in (("rope_theta", raw), ("rope_parameters.rope_theta", nested))
        if fields.get("rope_theta") is not None
    }
    if len(set(bases.values())) > 1:
        raise CheckpointError(f"config.json: {_settings(bases)} disagree")
    theta = next(iter(bases.values()), defaults.rope_theta)
    own = {key: value for key, value in nested.items() if key != "rope_theta"}
    names = {"yarn", TIER_YARN} if "ternary" in raw else {"yarn"}
    found = [s for s in (_scaling(own, names), _scaling(scaling, names)) if s is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise CheckpointError("config.json: rope_scaling and rope_parameters disagree")
    return theta, found[0] if found else None


def _scaling(fields: dict, names: set[str]) -> dict | None:
    """YaRN's fields by their usual names, or None where positions are not scaled."""
    kinds = {str(fields[name]) for name in ("type", "rope_type") if fields.get(name) is not None}
    if kinds <= {"default"}:
        return None
    if len(kinds) > 1 or not kinds <= names:
        raise CheckpointError(f"config.json: rope scaling {_short(sorted(kinds))}, expected yarn")
    result: dict = {"rope_type": "yarn", "factor": _positive(fields, "factor", None)}
    original = "original_max_position_embeddings"
    result[original] = _size(fields, original)
    for name in ("beta_fast", "beta_slow", "attention_factor"):
        if fields.get(name) is not None:
            result[name] = _positive(fields, name, None)
    return result


def _size(
    raw: dict, *names: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE
) -> int:
    given = {name: raw[name] for name in names if raw.get(name) is not None}
    for name, value in given.items():
        if type(value) is not int or not least <= value <= most:
            raise CheckpointError(
                f"config.json: {name} is {_short(value)}, expected a whole number from {least} to"
                f" {most}"
            )
    if len(set(given.values())) > 1:
        raise CheckpointError(f"config.json: {_settings(given)} disagree")
    for value in given.values():
        return value
    if default is None:
        raise CheckpointError(f"config.json: {listed(names, last='or')} is missing")
    return default


def _positive(raw: dict, name: str, default: float | None, shown: str | None = None) -> float:
    value = raw.get(name)
    value = default if value is None else value
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if 0 < number <= sys.float_info.max:
        return float(number)
    raise CheckpointError(
        f"config.json: {shown or name} is {_short(value)}, expected a positive number"
    )


def _flag(raw: dict, name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} is {_short(value)}, expected true or false")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _settings(values: dict) -> str:
    return listed(f"{name} = {value}" for name, value in values.items())
