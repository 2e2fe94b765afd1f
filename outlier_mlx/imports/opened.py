"""The common result of all importers: a model that can be written as an MLX folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.writing.parts import Part


@dataclass(frozen=True)
class Opened:
    """A model that can be written as an MLX folder.

    Attributes:
        source_format: format of the source, such as "AutoAWQ int4".
        parts: tensors, in the order of writing.
        config: content of config.json.
        assets: writes tokenizer and other small files to a folder.
        notes: returns notes on what is not exact or is ignored; called after parts are written.
        details: how the model was made, for the manifest.
        glanced: whether writing may still find codes that are no trits: if it is refused, the
            model is to be opened again without `quick`, which then names the first fault.
        tier: of a tier, what its manifest says of its sources; None for other models.
    """

    source_format: str
    parts: list[Part]
    config: dict
    assets: Callable[[Path], None]
    notes: Callable[[], list[str]]
    details: dict
    glanced: bool = False
    tier: dict | None = None
