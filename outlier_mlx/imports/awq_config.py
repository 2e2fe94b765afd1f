"""AutoAWQ's quantization settings from config.json or quant_config.json."""

from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.quantization import largest_group
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_json

# Names of AutoAWQ's other layouts in configs.
_OTHER_VERSIONS = ("gemv", "gemv_fast", "marlin", "exllama", "exllamav2", "ipex")


@dataclass(frozen=True)
class AwqFormat:
    """Settings of AWQ quantization.

    Attributes:
        where: file and field of the settings, for messages.
        group_size: number of weights along `in` that share a scale; -1: a whole row.
        zero_point: whether zero points are stored; if not, they are all 8.
    """

    where: str
    group_size: int
    zero_point: bool


def read_format(folder: Path, config: dict) -> AwqFormat | None:
    """Read AutoAWQ's settings from config.json, or from quant_config.json of old repositories.

    Returns:
        The settings, or None if there are none.

    Raises:
        CheckpointError: the method, version or number of bits is not supported.
    """
    if "quantization" in config:
        raise CheckpointError(
            f"{folder.name}: config.json has `quantization`: this is already an MLX model"
        )
    settings, where = config.get("quantization_config"), "config.json: quantization_config"
    if settings is None and (folder / "quant_config.json").exists():
        settings, where = read_json(inside(folder, "quant_config.json")), "quant_config.json"
        settings.setdefault("quant_method", "awq")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: expected an object")
    method = str(settings.get("quant_method"))[:40].lower()
    if method != "awq":
        raise CheckpointError(f"{where}: quant_method {method}; only awq is supported")
    version = str(settings.get("version", "gemm"))[:40].lower()
    backend = str(settings.get("backend", "autoawq"))[:40].lower()
    if version != "gemm":
        known = "another layout" if version in _OTHER_VERSIONS else "unknown"
        raise CheckpointError(f"{where}: version {version} ({known}); only gemm is supported")
    if backend != "autoawq":
        raise CheckpointError(f"{where}: backend {backend}; only autoawq is supported")
    bits = settings.get("bits", settings.get("w_bit"))
    if type(bits) is not int or bits != 4:
        raise CheckpointError(f"{where}: bits {_short(bits)}, expected 4")
    group = settings.get("group_size", settings.get("q_group_size", 128))
    if type(group) is not int or (group != -1 and (group < 1 or largest_group(group) is None)):
        raise CheckpointError(
            f"{where}: group_size {_short(group)}, expected -1 or a multiple of 32"
        )
    zero_point = settings.get("zero_point", True)
    if not isinstance(zero_point, bool):
        raise CheckpointError(f"{where}: zero_point {_short(zero_point)}, expected a boolean")
    return AwqFormat(where, group, zero_point)


def _short(value: object) -> str:
    """The value's repr, which tells "4" and 4 apart."""
    return repr(value)[:40]
