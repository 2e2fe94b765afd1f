"""Verifying a tier: every file as its manifest says, and every tensor as its config says."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from outlier_mlx.checkpoints.overlay import base_shapes
from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.models.config import PROJECTIONS, ModelConfig, tier_config
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef, read_json
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.terminal import Progress
from outlier_mlx.ternary import row_bytes
from outlier_mlx.tiers.plan import FORMAT_VERSION
from outlier_mlx.writing.bundle import bundle
from outlier_mlx.writing.folders import MANIFESTS
from outlier_mlx.writing.manifest import Manifest, check_files, read_manifest

#: A tensor's shape, and the dtypes it may have.
Expected = tuple[tuple[int, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Verified:
    """A tier or model that is whole: how many files, tensors and bytes were checked."""

    files: int
    tensors: int
    nbytes: int


def verify_tier(folder: Path, progress: Progress | None = None) -> Verified:
    """Check a tier, or a model that was imported or merged, without running or loading it.

    The manifest proves that files are as they were written, not who wrote them. The model code is
    therefore compared with what this version of the project writes.

    Args:
        folder: the tier or model.
        progress: called with bytes hashed so far, and in all.

    Raises:
        CheckpointError: names the first file or tensor that is not as it should be.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    manifest = read_manifest(folder, _manifest_name(folder))
    version = manifest.content.get("format_version")
    if manifest.name == "tier.json" and version != FORMAT_VERSION:
        raise CheckpointError(f"tier.json: format_version {version!r}, expected {FORMAT_VERSION}")
    check_files(folder, manifest, progress)
    _check_code(folder, manifest)
    return Verified(len(manifest.files), _check_tensors(folder), manifest.nbytes)


def _manifest_name(folder: Path) -> str:
    for name in MANIFESTS:
        if (folder / name).exists():
            return name
    raise CheckpointError(f"{folder}: not a tier: no tier.json, nor a model's checksums.json")


def _check_code(folder: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if not name.endswith(".py"):
            continue
        code = inside(folder, name).read_text(encoding="utf-8", errors="replace")
        if name != "outlier_moe.py" or code != bundle():
            raise CheckpointError(
                f"{name}: not what this version of outlier-mlx writes; outlier-mlx never runs it,"
                " but --trust-remote-code would"
            )


def _check_tensors(folder: Path) -> int:
    """Every tensor that the config asks for, in its shape and dtype, and no other."""
    raw = read_json(inside(folder, "config.json"))
    tensors = read_shards(folder)
    if "ternary" not in raw:  # mlx-lm's own model: held against its manifest alone
        return len(tensors)
    config = tier_config(raw)
    expected = expected_tensors(config, raw, tensors)
    for name, (shape, dtypes) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{name}: missing, expected {shape}")
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{tensor.where}: {tensor.dtype} {tensor.shape}, expected"
                f" {listed(dtypes, last='or')} {shape}"
            )
    for name, tensor in tensors.items():
        if name not in expected:
            raise CheckpointError(f"{tensor.where}: not a tensor of this model")
    return len(tensors)


def expected_tensors(
    config: ModelConfig, raw: dict, tensors: dict[str, TensorRef]
) -> dict[str, Expected]:
    """Names, shapes and dtypes of a tier's tensors.

    Args:
        config: the model's dimensions.
        raw: the tier's config.json.
        tensors: what is there; a matrix with `scales` beside it is taken as quantized.
    """
    expected: dict[str, Expected] = {}
    for name, shape in base_shapes(config).items():
        if ".mlp." in name and int(name.split(".")[2]) in config.moe_layers:
            name = name.replace(".mlp.", ".mlp.shared_expert.")
        path = name.rsplit(".", 1)[0]
        if len(shape) == 2 and f"{path}.scales" in tensors:
            expected |= _affine(path, shape, raw, FLOAT_DTYPES)
        else:
            expected[name] = (shape, FLOAT_DTYPES)
    width = raw.get("moe_intermediate_size")
    if config.moe_layers and (type(width) is not int or width < 1):
        raise CheckpointError(f"config.json: moe_intermediate_size is {width!r}")
    for layer in config.moe_layers:
        prefix = f"model.layers.{layer}.mlp"
        expected[f"{prefix}.gate.weight"] = ((config.experts, config.hidden), ("F32",))
        expected[f"{prefix}.alpha"] = ((config.experts,), ("F32",))
        for projection in PROJECTIONS:
            sizes = (width, config.hidden) if projection != "down" else (config.hidden, width)
            path = f"{prefix}.switch_mlp.{projection}_proj"
            expected |= _experts(path, (config.experts, *sizes), raw)
    return expected


def _experts(path: str, shape: tuple[int, ...], raw: dict) -> dict[str, Expected]:
    if raw["ternary"].get("format") == "affine2":
        return _affine(path, shape, raw, ("F32",))
    *lead, width = shape
    return {
        f"{path}.weight": ((*lead, row_bytes(width)), ("U8",)),
        f"{path}.scales": (tuple(lead), ("F32",)),
    }


def _affine(
    path: str, shape: tuple[int, ...], raw: dict, dtypes: tuple[str, ...]
) -> dict[str, Expected]:
    """A matrix in MLX's affine format, by the config's `quantization`."""
    quantization = raw.get("quantization")
    default = quantization if isinstance(quantization, dict) else {}
    how = default.get(path, default)
    how = how if isinstance(how, dict) else {}
    bits, group = how.get("bits"), how.get("group_size")
    if bits not in (2, 4, 6, 8) or group not in (32, 64, 128) or prod(shape) % group:
        raise CheckpointError(f"config.json: quantization does not say how {path} is stored")
    *lead, width = shape
    groups = ((*lead, width // group), dtypes)
    return {
        f"{path}.weight": ((*lead, width * bits // 32), ("U32",)),
        f"{path}.scales": groups,
        f"{path}.biases": groups,
    }
