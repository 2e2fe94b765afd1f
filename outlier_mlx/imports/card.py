"""The model card (`README.md`) of an imported model."""

from collections.abc import Sequence
from pathlib import Path

from outlier_mlx.errors import one_line
from outlier_mlx.imports.opened import Opened
from outlier_mlx.models.summary import SummaryRow
from outlier_mlx.storage.hub import Source
from outlier_mlx.writing.licences import CARD, stated_licence


def write_card(
    folder: Path, name: str, source: Source, opened: Opened, rows: Sequence[SummaryRow]
) -> str:
    """Write the card into a folder whose parts are written; returns its file's name."""
    from huggingface_hub import ModelCardData

    licence = stated_licence(source.folder) if source.folder.is_dir() else None
    metadata = ModelCardData(
        **(licence.as_json() if licence else {}),
        library_name="mlx",
        pipeline_tag="text-generation",
        base_model=source.name if source.revision else None,
        base_model_relation="quantized" if source.revision else None,
        tags=["mlx"],
    )
    revision = f", revision `{source.revision}`" if source.revision else ""
    program = "outlier-mlx generate" if "ternary_switch" in opened.config else "mlx_lm.generate"
    notes = "".join(f"- {_plain(note)}\n" for note in opened.notes())
    table = "\n".join(
        f"| {row.kind} | {row.params:,} | {row.nbytes:,} | {row.bits_per_weight:.2f} |"
        for row in rows
    )
    text = f"""---
{metadata.to_yaml()}
---

# {_plain(name)}

Imported by outlier-mlx for MLX from `{_plain(source.name)}`{revision} ({_plain(opened.form)}).

```
{program} --model {_plain(name)} --prompt "Once upon a time"
```

{notes}
| part | parameters | bytes | bits per weight |
|---|---:|---:|---:|
{table}
"""
    (folder / CARD).write_text(text, encoding="utf-8")
    return CARD


def _plain(text: str) -> str:
    """Text of others as it stands in Markdown."""
    return "".join(c for c in one_line(text)[:600] if c not in "`|<>[]*")
