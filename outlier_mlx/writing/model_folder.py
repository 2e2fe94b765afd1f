"""The one way in which model folders are written: tiers, imported and merged models, exports."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.errors import CheckpointError, CheckpointWarning, OutlierError
from outlier_mlx.models.spelling import lifted
from outlier_mlx.models.summary import SummaryRow
from outlier_mlx.models.token_ids import check_tokenizer
from outlier_mlx.storage.output import write_json, write_whole
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.assets import has_tokenizer
from outlier_mlx.writing.bundle import bundle
from outlier_mlx.writing.folders import Sources, check_free, check_space, whole_folder
from outlier_mlx.writing.licences import CARD
from outlier_mlx.writing.manifest import write_manifest
from outlier_mlx.writing.parts import Parts


@dataclass(frozen=True)
class Written:
    """A model folder that was written.

    Attributes:
        path: the folder.
        rows: parameters and bytes by kind of part, the total last.
        tokenizer: whether a tokenizer came along.
    """

    path: Path
    rows: list[SummaryRow]
    tokenizer: bool


def write_model(
    target: Path,
    tensors: Parts,
    config: dict | None,
    *,
    source: str,
    inputs: Sources,
    assets: Callable[[Path], None],
    manifest: dict,
    manifest_name: str = "checksums.json",
    card: Callable[[Path], str] | None = None,
    check: Callable[[Path], None] | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Written:
    """Write a model as a folder that appears whole or not at all.

    Args:
        target: the folder to make.
        tensors: its tensors, and how they are written.
        config: its config.json; None: the tensors' own file has all that it would say. With
            `model_file` in it, the code of that name is written, too.
        source: what messages call the model that it is made from.
        inputs: files and folders that it is made from, which are never replaced.
        assets: writes tokenizer, licences and the like into the folder. It is called before the
            tensors are read, so that what is wrong with these files is found first, and after.
        manifest: where the model came from and how it was made. Checksums are added of all files
            but the licences and the card.
        manifest_name: the manifest's file, one of `outlier_mlx.writing.manifest.FORMAT_VERSIONS`.
        card: the text of the model card, asked once everything else is in the folder.
        check: called before tensors are read with the folder that has all the rest; raises
            CheckpointError if the model could not be loaded.
        force: replace `target` if it is a model that this project wrote.
        progress: called while tensors are written.

    Raises:
        OutputExistsError: `target` exists and may not be replaced.
        OutlierError: a source is not valid, the model could not be loaded, the embedding has no row
            for a token of the tokenizer, or the disk is too small. Nothing is left behind, but for
            what `tensors` keep for the next run.
    """
    inputs = list(inputs)
    check_free(target, force=force, sources=inputs)
    check_space(target, tensors.room(target), tensors.what)
    try:
        with whole_folder(target, force=force, keep=tensors.keep, sources=inputs) as folder:
            if config is not None:
                write_json(folder / "config.json", config)
            assets(folder)
            if config is not None:
                _check(source, folder, config, check)
            files = tensors.write(folder, progress)
            assets(folder)  # again: a run that starts over has emptied the folder
            if config is not None:
                write_json(folder / "config.json", config)
                if "model_file" in config:
                    write_whole(folder / config["model_file"], bundle(config["model_file"]))
            write_manifest(folder, manifest_name, manifest, files)
            if card is not None:
                write_whole(folder / CARD, card(folder))
    except OSError as error:
        raise OutlierError(f"{target}: cannot write: {error.strerror or error}") from error
    tokenizer = has_tokenizer(target)
    if not tokenizer and config is not None:
        message = f"{source}: no tokenizer beside it; the model has none"
        warnings.warn(message, CheckpointWarning, stacklevel=2)
    return Written(target, tensors.rows, tokenizer)


def _check(source: str, folder: Path, config: dict, check: Callable[[Path], None] | None) -> None:
    try:
        vocab = lifted(config).get("vocab_size")
        if not isinstance(vocab, int):
            raise CheckpointError("config.json: vocab_size is missing")
        check_tokenizer(folder, vocab)
        if check is not None:
            check(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
