"""Settings of BitNet b1.58 and Falcon models.

`transformers/integrations/bitnet.py`: a `BitLinear` divides by `weight_scale`, an `AutoBitLinear`
multiplies. (mlx-lm's own model `bitnet` always multiplies, and its checkpoints are AutoBitLinear.)
"""

from collections.abc import Mapping
from dataclasses import dataclass

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.fields import short

MODEL_TYPE = "bitnet"
_WHERE = "config.json: quantization_config"
_CLASSES = {"bitlinear": True, "autobitlinear": False}
_MODES = ("offline", "online")


@dataclass(frozen=True)
class BitnetSettings:
    """The settings.

    Attributes:
        divides: whether `weight_scale` divides.
        online: whether the files must hold master weights.
        unconverted: modules whose master weights stay as they are, by the end of their names.
    """

    divides: bool
    online: bool
    unconverted: tuple[str, ...]


def is_bitnet(raw: Mapping) -> bool:
    """Whether a config is that of a BitNet model."""
    given = raw.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else None
    return method == "bitnet" or (raw.get("model_type") == MODEL_TYPE and method is None)


def read_settings(raw: Mapping) -> BitnetSettings:
    """Check and read the settings.

    Raises:
        CheckpointError: a layer that computes something else than a scaled ternary product.
    """
    given = raw.get("quantization_config") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{_WHERE} is {short(given)}, expected an object")
    if given.get("use_rms_norm"):
        raise CheckpointError(
            f"{_WHERE}: use_rms_norm: each linear layer normalises its input first, which no model"
            " here does"
        )
    default = "autobitlinear" if raw.get("model_type") == MODEL_TYPE and not given else "bitlinear"
    kind = given.get("linear_class", default)
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise CheckpointError(
            f"{_WHERE}: linear_class {short(kind)}, expected 'bitlinear' or 'autobitlinear'"
        )
    mode = given.get("quantization_mode", "offline")
    if mode not in _MODES:
        raise CheckpointError(f"{_WHERE}: quantization_mode {short(mode)}, expected {_MODES}")
    skipped = given.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise CheckpointError(f"{_WHERE}: modules_to_not_convert must be a list of names")
    activation = raw.get("hidden_act")
    if raw.get("model_type") == MODEL_TYPE and activation not in (None, "relu2"):
        raise CheckpointError(
            f"config.json: hidden_act {short(activation)}; mlx-lm's bitnet has 'relu2'"
        )
    return BitnetSettings(_CLASSES[kind], mode == "online", tuple(skipped))
