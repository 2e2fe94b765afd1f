"""MLX's affine quantization: group sizes, and the field `quantization` of a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.models.fields import short

#: How many weights along a row can share a scale and a bias.
GROUP_SIZES = (32, 64, 128)
#: Bits of a weight in MLX's affine format.
AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
#: MLX's formats with scales of 8 bits: bits and group size of each.
FLOAT_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
#: The group size in which this project quantizes by default.
DEFAULT_GROUP_SIZE = 64


@dataclass(frozen=True)
class Affine:
    """How a matrix is stored.

    Attributes:
        bits: bits of a weight.
        group_size: weights along a row that share a scale and a bias.
    """

    bits: int
    group_size: int


@dataclass(frozen=True)
class Quantization:
    """The `quantization` of a config.json.

    Attributes:
        default: how quantized matrices are stored; None if the config does not say.
        by_path: modules that are stored differently; None for those that are not quantized.
    """

    default: Affine | None
    by_path: Mapping[str, Affine | None] = field(default_factory=dict)

    def of(self, path: str) -> Affine | None:
        """How the quantized module at `path` is stored; None if the config does not say."""
        return self.by_path.get(path, self.default)


def largest_group(width: int, most: int = GROUP_SIZES[-1]) -> int | None:
    """The largest group size up to `most` that divides the width of a row, or None."""
    return max((size for size in GROUP_SIZES if size <= most and width % size == 0), default=None)


def read_quantization(raw: Mapping) -> Quantization | None:
    """Read MLX's quantization from a config; None if it has none.

    mlx-lm writes it under two names; other formats use the second name, too.
    """
    given = raw.get("quantization") or raw.get("quantization_config")
    if not isinstance(given, dict) or "group_size" not in given or "quant_method" in given:
        return None
    by_path = {
        path: _affine(how) for path, how in given.items() if isinstance(how, dict) or how is False
    }
    return Quantization(_affine(given), by_path)


def check_quantization(raw: Mapping) -> None:
    """Check that MLX has every format that the `quantization` of a config names.

    MLX does not check these numbers itself: it divides by a group size of 0.

    Raises:
        CheckpointError: names the module and what is wrong.
    """
    given = raw.get("quantization")
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: quantization is {short(given)}, expected an object")
    _check_format(given, "config.json: quantization")
    for path, how in given.items():
        if isinstance(how, Mapping):
            _check_format(how, f"config.json: quantization of {path[:80]}")


def _check_format(how: Mapping, what: str) -> None:
    mode = how.get("mode", "affine")
    bits: tuple[int, ...] = AFFINE_BITS
    groups: tuple[int, ...] = GROUP_SIZES
    if isinstance(mode, str) and mode in FLOAT_MODES:
        bits, groups = ((only,) for only in FLOAT_MODES[mode])
    elif mode != "affine":
        raise CheckpointError(f"{what}: MLX has no mode {short(mode)}")
    for name, known in (("bits", bits), ("group_size", groups)):
        value = how.get(name)  # if it is missing, MLX uses one of these
        if value is not None and (type(value) is not int or value not in known):
            raise CheckpointError(
                f"{what}: {name} is {short(value)}, expected {listed(known, last='or')}"
            )


def _affine(how: object) -> Affine | None:
    if not isinstance(how, dict):
        return None
    bits, group = how.get("bits"), how.get("group_size")
    if not isinstance(bits, int) or not isinstance(group, int) or bits < 1 or group < 1:
        return None
    return Affine(bits, group)
