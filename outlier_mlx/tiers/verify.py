"""Verifying a tier: every file as its manifest says, and every tensor as its config says."""

from dataclasses import dataclass
from pathlib import Path

from outlier_mlx import __version__
from outlier_mlx.checkpoints.export_transformers import TRANSFORMERS
from outlier_mlx.checkpoints.gguf_info import holds_gguf
from outlier_mlx.checkpoints.values import check_values
from outlier_mlx.engine.loading import load_tokenizer, open_model
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import is_overlay, is_ternary_model, is_tier
from outlier_mlx.models.fields import short
from outlier_mlx.models.tier_fields import MODEL_FILE, TERNARY_FILE
from outlier_mlx.storage.gguf_model import read_model
from outlier_mlx.storage.paths import inside, no_folder
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.texts import read_bytes, read_json
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.assets import has_tokenizer
from outlier_mlx.writing.bundle import is_bundle
from outlier_mlx.writing.manifest import Manifest, check_files, find_manifest, is_code
from outlier_mlx.writing.runs import name_leftovers

_ONLY = (
    f"and only a tier's {MODEL_FILE} and a ternary model's {TERNARY_FILE} may be:"
    " --trust-remote-code would run it"
)


@dataclass(frozen=True)
class Verified:
    """A tier or model that is whole: how many files, tensors and bytes were checked."""

    files: int
    tensors: int
    nbytes: int


def verify_tier(folder: Path, progress: Progress = no_progress) -> Verified:
    """Check a tier, or a model that was imported or merged, without running it.

    The manifest proves that files are as they were written, not who wrote them. What could make
    other programs run code is therefore refused whatever it says, and the model is held against
    all that loading it depends on.

    Args:
        folder: the tier or model.
        progress: called with bytes done so far, and in all. Files are read twice, so each pass
            counts half of them.

    Raises:
        CheckpointError: names the first file or tensor that is not as it should be.
    """
    name_leftovers(folder)
    if not folder.is_dir():
        raise CheckpointError(no_folder(folder))
    manifest = find_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder}: not a tier: no tier.json, nor a model's checksums.json")
    # The first lists of checksums had no version.
    if manifest.name == "tier.json" or "format_version" in manifest.content:
        manifest.check_version()
    check_files(folder, manifest, _part_of(progress, manifest, 0))
    _check_code(folder, manifest)
    tensors = _check_model(folder, manifest, _part_of(progress, manifest, 1))
    progress(manifest.nbytes, manifest.nbytes)
    return Verified(len(manifest.files), tensors, manifest.nbytes)


def _part_of(progress: Progress, manifest: Manifest, number: int) -> Progress:
    """The progress callback of the first or second half of the work."""

    def advance(done: int, total: int | None) -> None:
        share = done / total if total else 0
        progress(int((number + share) / 2 * manifest.nbytes), manifest.nbytes)

    return advance


def _check_code(folder: Path, manifest: Manifest) -> None:
    """Check that the only code is a tier's own, and that nothing names any other."""
    config = {} if holds_gguf(folder) else read_json(inside(folder, "config.json"))
    code = [name for name in manifest.files if is_code(name)]
    own = _own_code(config)
    if code != ([] if own is None else [own]):
        name = next((name for name in code if name != own), None)
        raise CheckpointError(f"{name}: code, {_ONLY}" if name else f"{own}: not listed")
    if config.get("model_file") != own:
        named = short(config.get("model_file"))
        raise CheckpointError(f"config.json: model_file is {named}, {_ONLY}")
    for file in ("config.json", "tokenizer_config.json"):
        if file in manifest.files and read_json(inside(folder, file)).get("auto_map") is not None:
            raise CheckpointError(f"{file}: auto_map names code, {_ONLY}")
    if own and not is_bundle(read_bytes(inside(folder, own)), own):
        writer = manifest.content.get("producer")
        what, cure = ("tier", "convert the tier") if is_tier(config) else ("model", "import it")
        raise CheckpointError(
            f"{own}: not what this version of outlier-mlx writes ({__version__}; the {what} is by"
            f" {short(writer)}). outlier-mlx never runs it, but --trust-remote-code would; {cure}"
            " again"
        )


def _own_code(config: dict) -> str | None:
    """The name of the code that this project writes beside a model of this config, if any."""
    if is_tier(config):
        return MODEL_FILE
    return TERNARY_FILE if is_ternary_model(config) else None


def _check_model(folder: Path, manifest: Manifest, progress: Progress) -> int:
    """Check everything that loading depends on; returns the number of tensors."""
    if holds_gguf(folder):
        return len(read_model(folder).tensors)
    raw = read_json(inside(folder, "config.json"))
    # Exports; as GGUF, they have no shards.
    if is_overlay(raw) or manifest.content.get("format") == TRANSFORMERS:
        return len(read_shards(folder, required=False))
    model = open_model(folder)
    if has_tokenizer(folder):
        load_tokenizer(folder, model.raw)
    if model.config is not None or model.ternary is not None:
        check_values(model, progress)
    return len(model.tensors)
