"""What a source becomes, whatever its format: the seam between importers and writing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.writing.parts import Part


@dataclass(frozen=True)
class Opened:
    """A model that can be written as an MLX folder.

    Attributes:
        source_format: the format it came in, as "AutoAWQ int4".
        parts: its tensors, in the order in which they are written.
        config: its config.json.
        assets: writes tokenizer and the like into a folder.
        notes: sentences on what is not exact or not honoured; asked once the parts are written.
        details: how it was made, for the manifest.
    """

    source_format: str
    parts: list[Part]
    config: dict
    assets: Callable[[Path], None]
    notes: Callable[[], list[str]]
    details: dict
