"""Verifying a tier: every file as its manifest says, and every tensor as its config says."""

from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.models.config import is_tier, parse_config
from outlier_mlx.models.stored import expected_tensors
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.texts import read_json
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.bundle import bundle
from outlier_mlx.writing.manifest import Manifest, check_files, find_manifest
from outlier_mlx.writing.runs import name_leftovers


@dataclass(frozen=True)
class Verified:
    """A tier or model that is whole: how many files, tensors and bytes were checked."""

    files: int
    tensors: int
    nbytes: int


def verify_tier(folder: Path, progress: Progress = no_progress) -> Verified:
    """Check a tier, or a model that was imported or merged, without running or loading it.

    The manifest proves that files are as they were written, not who wrote them. The model code is
    therefore compared with what this version of the project writes.

    Args:
        folder: the tier or model.
        progress: called with bytes hashed so far, and in all.

    Raises:
        CheckpointError: names the first file or tensor that is not as it should be.
    """
    name_leftovers(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    manifest = find_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder}: not a tier: no tier.json, nor a model's checksums.json")
    # The first lists of checksums had no version.
    if manifest.name == "tier.json" or "format_version" in manifest.content:
        manifest.check_version()
    check_files(folder, manifest, progress)
    _check_code(folder, manifest)
    return Verified(len(manifest.files), _check_tensors(folder), manifest.nbytes)


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
    # An export as GGUF has no shards.
    tensors = read_shards(folder, required=is_tier(raw))
    if not is_tier(raw):  # mlx-lm's own model, or an export: held against its manifest alone
        return len(tensors)
    config = parse_config(raw)
    expected = expected_tensors(config, tensors)
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
