"""Families of models as data: a module `family_NAME.py` each, found by its name.

A new family is one new module here, with a `FAMILY`, and its tests; nothing lists them.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import outlier_mlx.models as package
from outlier_mlx.models.description import Defaults, Description, ModelConfig
from outlier_mlx.models.fields import Fields, short
from outlier_mlx.models.ignored import Harmless, ignored, refuse
from outlier_mlx.models.modules import FeedForward, Module, dense, list_modules

_PREFIX = "family_"


@dataclass(frozen=True)
class Family:
    """What a model type computes, as mlx-lm's model of it does.

    Attributes:
        model_type: `model_type` of config.json.
        architecture: transformers' class.
        roles: how such a model can be used: "base" (of an overlay), "import", "merge" (a dense
            model that is merged).
        defaults: transformers' values of missing fields; some differ from mlx-lm's.
        qkv_bias: whether queries, keys and values have biases, or the name of a field that says it.
        o_bias: the same for the output of attention.
        mlp_bias: the same for the FFN.
        qk_norm: whether queries and keys are normalised in each head.
        own_head_dim: whether `head_dim` may differ from hidden_size / heads.
        scalings: types of RoPE scaling that mlx-lm's model honours.
        base_scalings: types of RoPE scaling that a tier on such a base honours.
        refused: fields that mlx-lm's model ignores, though transformers' does not, and the values
            of each that change nothing.
        window: transformers' value of a missing `sliding_window`.
        window_switch: the field that turns `sliding_window` on; None: it is on where it is given.
        window_from: the field that says from which layer on there are windows (28 if it is
            missing), where `layer_types` does not say it; None: all layers have them.
        honours_layer_types: whether mlx-lm's model uses the windows of `layer_types`.
        experts: the fields that say how many experts there are, and how many a token uses.
        expert_width: the field that says how wide an expert is.
        feed_forward: the modules of a layer's FFN.
    """

    model_type: str
    architecture: str
    roles: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    own_head_dim: bool = False
    scalings: tuple[str, ...] = ("linear", "dynamic", "llama3", "yarn", "longrope")
    base_scalings: tuple[str, ...] = ("yarn",)
    refused: Harmless = field(default_factory=dict)
    window: int | None = None
    window_switch: str | None = None
    window_from: str | None = None
    honours_layer_types: bool = False
    experts: tuple[str, str] | None = None
    expert_width: str = "moe_intermediate_size"
    feed_forward: FeedForward = dense

    def own_defaults(self) -> Defaults:
        """Values that transformers uses for missing fields."""
        return Defaults(
            rope_theta=self.defaults["rope_theta"],
            rms_norm_eps=self.defaults["rms_norm_eps"],
            max_positions=self.defaults["max_position_embeddings"],
        )

    def config_fields(self, config: ModelConfig) -> dict[str, Any]:
        """The fields of `config.json` that not every family has."""
        flags = {self.qkv_bias: config.qkv_bias, self.o_bias: config.o_bias}
        flags[self.mlp_bias] = config.mlp_bias
        said: dict[str, Any] = {name: on for name, on in flags.items() if isinstance(name, str)}
        return said | ({"head_dim": config.head_dim} if self.own_head_dim else {})

    def check(self, fields: Fields) -> None:
        """Refuse fields that mlx-lm's model would ignore.

        Raises:
            CheckpointError: names the field.
        """
        activation = fields.raw.get("hidden_act") or "silu"
        if activation not in ("silu", "swish"):
            fields.refuse(f"hidden_act {short(activation)}, expected 'silu'")
        refused = {"partial_rotary_factor": (1,)} | dict(self.refused)
        refuse(fields, refused, f"is not supported by mlx-lm's {self.model_type}")

    def flag(self, which: bool | str, fields: Fields) -> Any:
        """The value of `qkv_bias`, `o_bias` or `mlp_bias` for a config."""
        return fields.flag(which) if isinstance(which, str) else which

    def notes(self, config: Description, *, own: bool = False) -> list[str]:
        """Sentences about what a config asks for and mlx-lm's model does not do.

        Args:
            config: the model's.
            own: whether it is an overlay's or a tier's.
        """
        window = self._ignored_window(config)
        said = f"mlx-lm has no sliding window here: beyond {window} tokens, results differ"
        told = ignored(config.raw, self.model_type, own=own)
        return [said, *told] if window else told

    def _ignored_window(self, config: Description) -> Any:
        """The window that transformers' model has and mlx-lm's has not; None: there is none."""
        raw = config.raw
        types, first = raw.get("layer_types"), raw.get(self.window_from or "", 28)
        if not raw.get(self.window_switch or "", self.window_switch is None):
            return None
        if isinstance(types, list):
            if self.honours_layer_types or "sliding_attention" not in types:
                return None
        elif self.window_from and type(first) is int and first >= (config.layers or 0):
            return None
        if "sliding_window" in raw:
            return raw["sliding_window"]
        reachable = self.window is not None and self.window < (config.max_positions or 0)
        return self.window if reachable else None

    def modules(self, config: ModelConfig) -> list[Module]:
        """The modules of MLX's model that store weights, in the order of a forward pass."""
        return list_modules(config, self.feed_forward)


@cache
def families() -> dict[str, Family]:
    """All families by model type."""
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith(_PREFIX)]
    found = [importlib.import_module(f"{package.__name__}.{name}").FAMILY for name in sorted(names)]
    return {each.model_type: each for each in found}


def family(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        KeyError: it is not one of `families()`.
    """
    return families()[model_type]


def with_role(role: str) -> tuple[str, ...]:
    """The model types that have a role; see `Family.roles`."""
    return tuple(name for name, each in families().items() if role in each.roles)
