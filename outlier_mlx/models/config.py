"""Any model's config.json as one description.

`parse_config` is strict, for models that are converted or loaded; `describe` accepts anything.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.models.config_values import config_values
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
from outlier_mlx.models.fields import Fields, short
from outlier_mlx.models.ignored import ROUTING, refuse
from outlier_mlx.models.rope import read_scaling, rope_type, spell_rope
from outlier_mlx.models.spelling import NESTED, lifted, normalised, without_nulls
from outlier_mlx.models.token_ids import end_ids
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_json

__all__ = ["PROJECTIONS", "Defaults", "Description", "ModelConfig"]
__all__ += ["is_overlay", "is_ternary_model", "is_tier"]

#: What the config of an overlay calls itself, besides the model type of its base.
OVERLAY_TYPES = ("outlier_moe", "qwen2_moe")
#: In configs of overlays and tiers: the model type of the base.
BASE_TYPE = "base_model_type"
#: The base of overlays that neither name nor contain one. All published overlays are on it.
DEFAULT_BASE = "qwen2"
#: In place of a role: any model that this project makes, but for tiers.
MADE = "made"
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
    values = config_values(fields, known, defaults, aliases=role == "base")
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
    values = config_values(Fields(spelled, "config.json", strict=False), known, None, aliases=own)
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
