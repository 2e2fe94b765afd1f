"""The model card of a tier (`README.md`)."""

from outlier_mlx.storage.hub import Source
from outlier_mlx.tiers.plan import Plan


def model_card(name: str, plan: Plan, overlay: Source, base: Source | None) -> str:
    """The text of a tier's README.md."""
    rows = "\n".join(
        f"| {row.kind} | {row.params:,} | {row.nbytes:,} | {row.bits_per_weight:.2f} |"
        for row in plan.rows()
    )
    sources = f"- overlay: {_cited(overlay)}\n"
    sources += f"- base: {_cited(base)}\n" if base else "- base: contained in the overlay\n"
    metadata = f"base_model: {base.name}\n" if base and base.revision else ""
    flag = " --trust-remote-code" if "model_file" in plan.config else ""
    code = "\nThe second command runs `outlier_moe.py` from this folder; the first never does.\n"
    return f"""---
library_name: mlx
tags: [mlx, moe, ternary]
{metadata}---

# {name}

An Outlier model for MLX: a quantized base with ternary experts, converted by outlier-mlx with the
recipe `{plan.recipe.name}` ({plan.recipe.dtype}).

{sources}
```
outlier-mlx generate --model {name} --prompt "Once upon a time"
mlx_lm.generate --model {name}{flag} --prompt "Once upon a time"
```
{code if flag else ""}
| part | parameters | bytes | bits per weight |
|---|---|---|---|
{rows}

Weights were modified: quantized or packed as the table says. The terms of the overlay's and the
base's licences apply.
"""


def _cited(source: Source) -> str:
    return f"{source.name}" + (f", revision {source.revision}" if source.revision else "")
