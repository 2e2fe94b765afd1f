"""Writing a plain MLX model: a folder that stock mlx-lm loads, and that can be verified."""

from collections.abc import Callable, Sequence
from pathlib import Path

import outlier_mlx
from outlier_mlx.errors import OutlierError
from outlier_mlx.terminal import Progress
from outlier_mlx.writing.folders import check_free, check_space, whole_folder
from outlier_mlx.writing.parts import Part, described, listing, write_json, write_parts

#: The manifest of a model that is no tier.
MANIFEST = "checksums.json"


def write_model(
    target: Path,
    parts: Sequence[Part],
    config: dict,
    *,
    source: dict,
    assets: Callable[[Path], list[str]],
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model as a folder that appears whole or not at all.

    Args:
        target: the folder to make.
        parts: its tensors, in the order in which they are written.
        config: its config.json.
        source: where it came from and how it was made; goes into the manifest.
        assets: writes tokenizer, model card and the like into the folder, and returns their names.
        force: replace `target` if it is a model that this wrote.
        progress: called with bytes of source read so far, and in all.

    Returns:
        The folder.

    Raises:
        OutlierError: the output exists, or the disk is too small. Nothing is left behind.
    """
    check_free(target, force=force)
    check_space(target, sum(part.nbytes for part in parts), "the model")
    try:
        with whole_folder(target, force=force) as folder:
            files = write_parts(parts, folder, progress)
            files.append(write_json(folder, "config.json", config))
            files += [described(folder, name) for name in assets(folder)]
            manifest = {
                "producer": f"outlier-mlx {outlier_mlx.__version__}",
                "source": source,
                "files": listing(files),
            }
            write_json(folder, MANIFEST, manifest)
    except OSError as error:
        raise OutlierError(f"{target}: cannot write: {error.strerror or error}") from error
    return target
