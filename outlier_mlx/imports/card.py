"""The model card of an imported model."""

from collections.abc import Sequence
from pathlib import Path

from outlier_mlx.imports.opened import Opened
from outlier_mlx.models.summary import SummaryRow
from outlier_mlx.storage.hub import Source
from outlier_mlx.writing.card import Card, origin_of, plain


def model_card(
    folder: Path, name: str, source: Source, opened: Opened, rows: Sequence[SummaryRow]
) -> str:
    """The text of the card, once everything else is in the folder."""
    program = "outlier-mlx generate" if "ternary_switch" in opened.config else "mlx_lm.generate"
    origin = origin_of("source", source)
    return Card(
        name=name,
        introduction="Imported by outlier-mlx for MLX from a model in"
        f" {plain(opened.source_format)}.",
        commands=[f'{program} --model {name} --prompt "Once upon a time"'],
        origins=[origin],
        based_on=[origin],
        relation="quantized",
        tags=["mlx"],
        rows=rows,
        changes=[*map(plain, opened.notes()), "`config.json` was written anew"],
    ).text(folder)
