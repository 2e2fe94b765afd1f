"""Options that commands share."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer


def _set_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.find_root().meta["debug"] = value
    return value


def _set_quiet(value: bool) -> bool:
    if value:
        # huggingface_hub reads it when it is imported, which is later.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return value


Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", callback=_set_debug)]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="No progress, no statistics.", callback=_set_quiet)
]
IgnoreMemory = Annotated[
    bool, typer.Option("--ignore-memory", help="Load the model even if it does not fit.")
]
Alpha = Annotated[
    Path | None, typer.Option(help="An alpha.json to use instead of the tier's own alphas.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]

Tier = Literal["auto", "q4", "q4-mixed", "q8", "bf16", "f16", "f32"]
BaseBits = Literal["4", "8", "none", "16", "32"]
GroupSize = Literal["32", "64", "128"]
Experts = Literal["tq1_0", "affine2"]
DType = Literal["bfloat16", "float16", "float32"]
ExportFormat = Literal["overlay", "packed", "gguf"]
ScaleDType = Literal["float32", "float16"]
AwqBits = Literal["4", "5"]
KQuants = Literal["8bit", "float16", "float32"]
