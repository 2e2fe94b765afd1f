"""Verifying a tier: every file as its manifest says, and every tensor as its config says."""

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

from outlier_mlx.checkpoints.config import ModelConfig, tier_config
from outlier_mlx.checkpoints.keys import PROJECTIONS
from outlier_mlx.checkpoints.overlay import base_shapes
from outlier_mlx.checkpoints.shards import read_shards
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.folders import inside
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef, read_json
from outlier_mlx.ternary import row_bytes
from outlier_mlx.tiers.bundle import bundle
from outlier_mlx.tiers.plan import FORMAT_VERSION

#: What mlx-lm may load or import from a folder: every file of these names has to be listed.
LOADED = ("model*.safetensors", "*.safetensors", "*.py", "*.index.json")
# Large enough that hashing lets other threads run, small enough for a smooth bar.
_BLOCK = 4 << 20

#: A tensor's shape, and the dtypes it may have.
Expected = tuple[tuple[int, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Verified:
    """A tier that is whole: how many files, tensors and bytes were checked."""

    files: int
    tensors: int
    nbytes: int


def verify_tier(folder: Path, progress: Callable[[int, int], None] | None = None) -> Verified:
    """Check a tier without running or loading it; no network is needed.

    The manifest proves that files are as they were written, not who wrote them. The model code is
    therefore compared with what this version of the project writes.

    Args:
        folder: the tier.
        progress: called with bytes hashed so far, and in all.

    Raises:
        CheckpointError: names the first file or tensor that is not as it should be.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    listed = _read_manifest(folder)
    _check_unlisted(folder, listed)
    _check_files(folder, listed, progress)
    _check_code(folder, listed)
    tensors = _check_tensors(folder)
    return Verified(len(listed), tensors, sum(size for _, size in listed.values()))


def _read_manifest(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and size of each listed file."""
    if not (folder / "tier.json").exists():
        raise CheckpointError(f"{folder}: not a tier: no tier.json")
    manifest = read_json(inside(folder, "tier.json"))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"tier.json: format_version {manifest.get('format_version')!r},"
            f" expected {FORMAT_VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError("tier.json: no list of files")
    listed = {}
    for name, entry in files.items():
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if not isinstance(digest, str) or type(size) is not int:
            raise CheckpointError(f"tier.json: {name}: sha256 and bytes were expected")
        listed[name] = (digest, size)
    if "config.json" not in listed:
        raise CheckpointError("tier.json: does not list config.json")
    return listed


def _check_code(folder: Path, listed: dict[str, tuple[str, int]]) -> None:
    for name in listed:
        if not name.endswith(".py"):
            continue
        code = inside(folder, name).read_text(encoding="utf-8", errors="replace")
        if name != "outlier_moe.py" or code != bundle():
            raise CheckpointError(
                f"{name}: not what this version of outlier-mlx writes; outlier-mlx never runs it,"
                " but --trust-remote-code would"
            )


def _check_unlisted(folder: Path, listed: dict[str, tuple[str, int]]) -> None:
    for pattern in LOADED:
        for path in sorted(folder.glob(pattern)):
            if path.name not in listed:
                raise CheckpointError(f"{path.name}: not listed in tier.json")


def _check_files(
    folder: Path,
    listed: dict[str, tuple[str, int]],
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(size for _, size in listed.values())
    done, lock = 0, threading.Lock()
    stop = threading.Event()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    def check(name: str) -> None:
        digest, size = listed[name]
        path = inside(folder, name)
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{name}: {found} bytes, expected {size}")
        if _sha256(path, advance, stop) != digest and not stop.is_set():
            raise CheckpointError(f"{name}: damaged: its SHA-256 is not the one in tier.json")

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        try:
            for future in [pool.submit(check, name) for name in listed]:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _sha256(path: Path, advance: Callable[[int], None], stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while not stop.is_set() and (block := file.read(_BLOCK)):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _check_tensors(folder: Path) -> int:
    """Every tensor that the config asks for, in its shape and dtype, and no other."""
    raw = read_json(inside(folder, "config.json"))
    tensors = read_shards(folder)
    if "ternary" not in raw:  # a portable tier: mlx-lm's own model, held against its manifest alone
        return len(tensors)
    config = tier_config(raw)
    expected = expected_tensors(config, raw, tensors)
    for name, (shape, dtypes) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{name}: missing, expected {shape}")
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{tensor.where}: {tensor.dtype} {tensor.shape}, expected {' or '.join(dtypes)}"
                f" {shape}"
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
