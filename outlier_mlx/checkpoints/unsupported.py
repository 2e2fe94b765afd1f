"""Checkpoints that look supported by their shapes, but are not."""

import re
from collections.abc import Iterable
from pathlib import Path

from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_json

_ROTATION_FILES = ("rotation_matrices.safetensors", "rotation_metadata.json")
_ROTATION_KEY = re.compile(r"(?:.*\.)?hadamard_[0-9]+")


def refuse_unsupported(folder: Path, keys: Iterable[str]) -> None:
    """Refuse forms that are known and not supported.

    Args:
        folder: the checkpoint.
        keys: keys of its tensors.

    Raises:
        CheckpointError: its weights are rotated, or its layers share experts (ReXMoE).
    """
    keys = list(keys)
    rotated = next((name for name in _ROTATION_FILES if (folder / name).exists()), None)
    rotated = rotated or next((key for key in keys if _ROTATION_KEY.fullmatch(key)), None)
    if rotated is not None:
        raise CheckpointError(
            f"{folder}: a rotated checkpoint ({rotated}): its trits are those of rotated weights,"
            " which this version does not undo"
        )
    named = next((text for text in [*keys, *_words(folder)] if _is_rexmoe(text)), None)
    if named is not None:
        raise CheckpointError(
            f"{folder}: a ReXMoE checkpoint ({named[:80]!r}): layers that share experts, as in the"
            " 150B models, are stored in a way that is not published"
        )


def _is_rexmoe(text: str) -> bool:
    return "rexmoe" in re.sub(r"[\W_]", "", text.lower())


def _words(folder: Path) -> Iterable[str]:
    """Names of fields in config.json, and what `model_type` and `architectures` say."""
    if not (folder / "config.json").exists():
        return
    config = read_json(inside(folder, "config.json"))
    for name, value in config.items():
        yield name
        if name in ("model_type", "architectures"):
            items = value if isinstance(value, list) else [value]
            yield from (item for item in items if isinstance(item, str))
