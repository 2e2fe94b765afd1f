"""Any model's config.json as one description.

`parse_config` is strict, for models that are converted or loaded; `describe` accepts anything.
Published configs have several names for one field. The names of two versions of transformers and
of three kinds of overlays are read only here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.models.attention import read_attention, read_linear
from outlier_mlx.models.description import (
    PROJECTIONS,
    Defaults,
    Description,
    ModelConfig,
    is_overlay,
    is_ternary_model,
    is_tier,
)
from outlier_mlx.models.families import Family, families, family, with_role
from outlier_mlx.models.fields import MAX_COUNT, Fields, short
from outlier_mlx.models.ignored import ROUTING, refuse
from outlier_mlx.models.quantization import read_quantization
from outlier_mlx.models.rope import read_scaling, rope_type, spell_rope
from outlier_mlx.models.spelling import NESTED, lifted, normalised, without_nulls
from outlier_mlx.models.token_ids import end_ids
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_json

__all__ = ["PROJECTIONS", "Defaults", "Description", "ModelConfig"]
__all__ += ["is_overlay", "is_ternary_model", "is_tier"]

POSITIONS = ("max_seq_len", "max_position_embeddings")
MOE_LISTS = ("moe_layer_indices", "v3_2_moe_layers", "moe_layers")
#: What the config of an overlay calls itself, besides the model type of its base.
OVERLAY_TYPES = ("outlier_moe", "qwen2_moe")
#: In configs of overlays and tiers: the model type of the base.
BASE_TYPE = "base_model_type"
#: The base of overlays that neither name nor contain one. All published overlays are on it.
DEFAULT_BASE = "qwen2"
#: In place of a role: any model that this project makes, but for tiers.
MADE = "made"
# Names of the number of experts, and of the number of experts that a token uses.
_EXPERTS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")
TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "expert_intermediate_size")
# Model types of this project, and the types of mlx-lm that they extend.
_MADE_OF = {"ternary_mixtral": "mixtral"}
MAX_LABELS = 100_000
_NOT_SPELLED = (
    *("quantization_config", "quantization", "quantize_activations", "auto_map", "model_file"),
    *("ternary", "ternary_switch"),  # of models of this project, whose writers add them
    "rope_traditional",  # transformers does not know it
)


def raw_config(folder: Path) -> dict:
    """A folder's `config.json` as it is written.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: not a model: no config.json")
    return read_json(inside(folder, "config.json"))


def read_config(folder: Path, defaults: Defaults | None = None) -> ModelConfig:
    """Read and check a folder's `config.json`; see `parse_config`."""
    return parse_config(raw_config(folder), defaults)


def parse_config(
    raw: dict,
    defaults: Defaults | None = None,
    *,
    role: str = "base",
    where: str = "config.json",
) -> ModelConfig:
    """Check the config of an overlay, a tier, or a model of a supported family.

    Args:
        raw: the config; it is not changed.
        defaults: values of missing fields; by default, `Defaults()` for overlays and tiers on
            Qwen2, and those of transformers for all others.
        role: one of `Family.roles`, or `MADE`; "base" for overlays and tiers. If an overlay does
            not name its base, everything that any base supports is accepted.
        where: name of the config in messages.

    Raises:
        CheckpointError: a field is missing or not valid, two names for one field disagree, or
            mlx-lm's model of the family does not do what the config asks for.
    """
    if is_tier(raw) and not isinstance(raw["ternary"], dict):
        raise CheckpointError(f"{where}: ternary is {short(raw['ternary'])}, expected an object")
    on_base = is_tier(raw) or is_overlay(raw) or "model_type" not in raw
    known = _base_family(raw, where) if on_base else family(_model_type(raw, role, where))
    plain = not on_base and defaults is None
    if defaults is None:
        on_default = on_base and known.model_type == DEFAULT_BASE
        defaults = Defaults() if on_default else known.own_defaults()
    spelled = normalised(raw, where) if plain else spell_rope(raw, where, defaults.max_positions)
    fields = Fields(spelled, where, strict=True)
    values = _values(fields, known, defaults, aliases=role == "base")
    known.check(fields)
    if on_base:
        refuse(fields, ROUTING, "is not how overlays choose experts")
    fields.flag("rope_traditional")
    _check_labels(fields)
    _check_layer_types(fields, values)
    _check_heads(fields, known, values, role)
    end_ids(raw.get("eos_token_id"), where)
    plain_scalings = dict.fromkeys(("import", MADE), known.scalings)
    allowed = ({"base": known.base_scalings} | plain_scalings).get(role, ())
    scaling = read_scaling(spelled, where, allowed, tier=is_tier(raw))
    if scaling is not None and scaling["rope_type"] == "yarn" and values["rope_theta"] == 1:
        fields.refuse("rope_theta 1 has no frequencies that YaRN could scale")
    if role != "base":
        _refuse_attention_factor(scaling, where)
    return ModelConfig(
        **values | {"rope_scaling": scaling, "raw": raw},
        qkv_bias=known.flag(known.qkv_bias, fields),
        o_bias=known.flag(known.o_bias, fields),
        mlp_bias=known.flag(known.mlp_bias, fields),
        qk_norm=known.qk_norm,
        defaults=defaults,
    )


def check_plain(raw: dict, where: str) -> list[str]:
    """Check the config of a model that mlx-lm runs, as far as mlx-lm would ignore what it says.

    Args:
        raw: the config, as `normalised` returns it.
        where: name of the config in messages.

    Returns:
        Sentences about what is ignored, and does no harm to short texts; none for a model of
        an unknown family.

    Raises:
        CheckpointError: mlx-lm's model of the family would compute something else.
    """
    name = str(raw.get("model_type"))
    known = families().get(_MADE_OF.get(name, name))
    _check_labels(Fields(raw, where, strict=True))
    if known is None:
        return []
    known.check(Fields(raw, where, strict=True))
    scaling = raw.get("rope_scaling")
    kind = rope_type(scaling, where) if isinstance(scaling, dict) else "default"
    if kind != "default" and not known.scalings:
        raise CheckpointError(f"{where}: rope_scaling {short(kind)} is ignored by mlx-lm's {name}")
    _refuse_attention_factor(scaling, where)
    return known.notes(describe(raw))


def _check_labels(fields: Fields) -> None:
    """Refuse more labels than a model has: transformers would make a text for each of them."""
    fields.size("num_labels", required=False, least=0, most=MAX_LABELS)


def _refuse_attention_factor(scaling: Any, where: str) -> None:
    if isinstance(scaling, dict) and scaling.get("attention_factor") is not None:
        raise CheckpointError(f"{where}: rope scaling: attention_factor is ignored by mlx-lm")


def describe(raw: dict) -> Description:
    """Describe any model as far as its config is known and valid; raises no error."""
    raw = lifted(raw)
    own = is_tier(raw) or is_overlay(raw)
    name = str(raw.get("model_type"))
    if own:
        name = str(raw.get(BASE_TYPE) or (name if name in with_role("base") else DEFAULT_BASE))
    known = families().get(_MADE_OF.get(name, name))
    defaults = dict(known.defaults) if known is not None and not own else {}
    try:
        spelled = spell_rope(raw, "config.json", defaults.get("max_position_embeddings"))
    except CheckpointError:
        spelled = {key: value for key, value in raw.items() if not key.startswith("rope_")}
    spelled = defaults | {key: value for key, value in spelled.items() if value is not None}
    values = _values(Fields(spelled, "config.json", strict=False), known, None, aliases=own)
    return Description(**values | {"raw": raw})


def describe_args(args: Any) -> Description:
    """Describe a loaded model by its `args` in mlx-lm; see `describe`."""
    raw = dict(vars(args)) if hasattr(args, "__dict__") else {}
    inner = raw.get(NESTED)
    if hasattr(inner, "__dict__"):
        raw[NESTED] = dict(vars(inner))
    return describe(raw)


def spell_config(config: ModelConfig) -> dict:
    """A plain model's config.json with every field that MLX's model depends on.

    Fields about quantization, and about code that the model brings along, are left out.
    """
    spelled = without_nulls(normalised(config.raw))
    kept = {k: v for k, v in spelled.items() if k not in _NOT_SPELLED}
    return kept | {"num_key_value_heads": config.kv_heads, "tie_word_embeddings": config.tied}


def _model_type(raw: dict, role: str, where: str) -> str:
    kind = raw["model_type"]
    if role == MADE:
        names = (*families(), *_MADE_OF)
        kind = _MADE_OF.get(str(kind), kind)
    else:
        names = with_role(role)
    if kind in names:
        return kind
    if role == "base" and kind in OVERLAY_TYPES:
        return stated_base(raw, where) or DEFAULT_BASE
    raise CheckpointError(f"{where}: model_type {short(kind)}, expected {listed(names, last='or')}")


def stated_base(raw: dict, where: str = "config.json") -> str | None:
    """The family of the base in the config of an overlay or tier; None if it names none.

    Raises:
        CheckpointError: the family is not supported.
    """
    names = with_role("base")
    kind = raw.get("model_type", OVERLAY_TYPES[0])
    base = raw.get(BASE_TYPE) or (kind if kind in names else None)
    for name, value, known in (
        ("model_type", kind, (*names, *OVERLAY_TYPES)),
        (BASE_TYPE, base, (*names, None)),
    ):
        if value not in known:
            expected = listed((each for each in known if each is not None), last="or")
            raise CheckpointError(f"{where}: {name} {short(value)}, expected {expected}")
    return base


def _base_family(raw: dict, where: str) -> Family:
    base = stated_base(raw, where)
    if base is not None or is_tier(raw):
        return family(base or DEFAULT_BASE)
    bases = [family(name) for name in with_role("base")]
    scalings = dict.fromkeys(kind for each in bases for kind in each.base_scalings)
    return replace(family(DEFAULT_BASE), own_head_dim=True, base_scalings=tuple(scalings))


def _values(
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


def _check_heads(fields: Fields, known: Family, values: dict[str, Any], role: str) -> None:
    heads, kv_heads, width = (values[name] for name in ("heads", "kv_heads", "head_dim"))
    if heads % kv_heads:
        fields.refuse(f"{kv_heads} KV heads do not divide {heads} attention heads")
    if width % 2:
        fields.refuse(f"attention heads of an odd width, {width}")
    given = fields.raw.get("head_dim")
    if role != "base" and not known.own_head_dim and given not in (None, width):
        fields.refuse(
            f"head_dim {short(given)} is not hidden_size / heads; MLX's {known.model_type} has no"
            " such heads"
        )


def _check_layer_types(fields: Fields, values: dict[str, Any]) -> None:
    types = fields.raw.get("layer_types")
    kinds = ("full_attention", "sliding_attention")
    listed_all = isinstance(types, list) and len(types) == values["layers"]
    if types is not None and not (listed_all and all(kind in kinds for kind in types)):
        fields.refuse("layer_types must name full or sliding attention for each layer")
    if None not in (values["attention"] or ()):
        fields.refuse("layer_types must name full attention once, and a sliding_window be given")


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
