"""Arguments and options that commands share, each declared once, and the groups they come in."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from outlier_mlx.cli.command import GENERAL
from outlier_mlx.engine.distributed.launcher import launched_rank
from outlier_mlx.errors import OutlierError

Recipe = Literal["auto", "q4", "q4-mixed", "q8", "bf16", "f16", "f32"]
BaseBits = Literal["4", "8", "none", "16", "32"]
GroupSize = Literal[32, 64, 128]
KVBits = Literal[2, 3, 4, 5, 6, 8]
Experts = Literal["tq1_0", "affine2"]
DType = Literal["bfloat16", "float16", "float32"]

# Options below a heading of their own in the help.
_sampling = partial(typer.Option, rich_help_panel="Sampling")
_cache = partial(typer.Option, rich_help_panel="KV cache")
_drafts = partial(typer.Option, rich_help_panel="Several tokens at a time")
_loading = partial(typer.Option, rich_help_panel="Loading")
_general = partial(typer.Option, rich_help_panel=GENERAL)


def _set_quiet(value: bool) -> bool:
    if value:
        # huggingface_hub reads it when it is imported, which is later.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return value


def _check_expert_memory(value: str) -> str:
    from outlier_mlx.engine.paging.budget import ExpertMemory as Parsed

    try:
        Parsed.parse(value)
    except OutlierError as error:
        raise typer.BadParameter(str(error)) from None
    return value


def _check_share(value: float) -> float:
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{value:g} is not at least 0 and less than 1")
    return value


# -- what every command may have ----------------------------------------------------------------

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub repository of a tier or other model.")
]
TierModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub repository of a tier.")
]
ModelFolder = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of a tier or imported model.")
]
Revision = Annotated[
    str | None,
    _loading(metavar="REVISION", help="Branch, tag or commit of the repository on the hub."),
]
ActivationDType = Annotated[
    DType | None, _loading(help="Activation dtype. Default: the model's own; float32 on the CPU.")
]
Alpha = Annotated[
    Path | None, _loading(metavar="FILE.json", help="Alphas to use instead of the tier's own.")
]
IgnoreMemory = Annotated[
    bool, _loading("--ignore-memory", help="Load the model even if it does not fit into memory.")
]
ExpertMemory = Annotated[
    str,
    _loading(
        "--expert-memory",
        metavar="SIZE",
        help="Memory for routed experts, such as 4GB or 50%; the others are read when a token needs"
        " them. all: load all; auto: as many as fit.",
        callback=_check_expert_memory,
    ),
]
ExpertSkip = Annotated[
    float,
    _loading(
        "--expert-skip",
        metavar="P",
        help="Lossy: leave out an expert that is not in memory if its share of the weight of a"
        " token's experts is below P. 0 leaves out none.",
        callback=_check_share,
    ),
]
KeepWarm = Annotated[
    bool,
    _loading("--keep-warm", help="Give the GPU something tiny to do while experts are read."),
]
Pipeline = Annotated[
    bool,
    _loading(
        "--pipeline",
        help="Under mlx.launch: each process has some of the layers, by its memory, rather than a"
        " part of every layer.",
    ),
]
Force = Annotated[bool, _general("--force", help="Replace the output if it exists.")]
Json = Annotated[bool, _general("--json", help="Print JSON.")]
Quiet = Annotated[
    bool, _general("--quiet", help="Show no progress and no statistics.", callback=_set_quiet)
]

# -- making -------------------------------------------------------------------------------------

Overlay = Annotated[
    str, typer.Argument(metavar="OVERLAY", help="Folder or hub repository of an overlay.")
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="BASE",
        help="Folder or hub repository of the base model, if the overlay does not contain it.",
    ),
]
BaseRevision = Annotated[
    str | None,
    typer.Option(metavar="REVISION", help="Branch, tag or commit of the base on the hub."),
]
OverlayRevision = Annotated[
    str | None,
    typer.Option(metavar="REVISION", help="Branch, tag or commit of the overlay on the hub."),
]
OutFolder = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write.")]

# -- texts --------------------------------------------------------------------------------------

# Of several processes, the first one alone reads it.
TextFile = Annotated[
    Path,
    typer.Option(
        metavar="FILE", exists=not launched_rank(), dir_okay=False, help="A text file, in UTF-8."
    ),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Windows = Annotated[
    int | None, typer.Option(min=1, help="Number of windows, at most. Default: all of the text.")
]

# -- pictures -----------------------------------------------------------------------------------

Plots = Annotated[Literal["png", "svg", "pdf"], typer.Option(help="File format of the pictures.")]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="Draw no pictures.")]

# -- running ------------------------------------------------------------------------------------

MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-m", min=1, help="Tokens to generate, at most.")
]
PrefillStep = Annotated[
    int, typer.Option(min=1, help="Prompt tokens processed at a time, at most.")
]


@dataclass(frozen=True)
class Generation:
    """What is generated, and how long it may get."""

    max_tokens: MaxTokens = 256
    system_prompt: Annotated[
        str | None, typer.Option(help="System prompt, for the chat template.")
    ] = None
    prefill_step_size: PrefillStep = 2048
    seed: Annotated[int | None, _sampling(min=0, max=2**64 - 1, help="Seed of the sampling.")] = (
        None
    )
    max_kv_size: Annotated[
        int | None,
        _cache(min=1, help="Tokens that the KV cache holds, at most. Default: no limit."),
    ] = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temp: Annotated[
        float, _sampling(min=0.0, help="Temperature; 0 always takes the likeliest token.")
    ] = 0.0
    top_p: Annotated[
        float,
        _sampling(
            min=0.0,
            max=1.0,
            help="Nucleus sampling: sample from the likeliest tokens that sum to this probability.",
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        _sampling(
            min=0.0,
            max=1.0,
            help="Least probability of a token, as a fraction of the likeliest token's.",
        ),
    ] = 0.0
    top_k: Annotated[
        int, _sampling(min=0, help="Sample from the K likeliest tokens; 0: from all.")
    ] = 0


@dataclass(frozen=True)
class Xtc:
    """XTC sampling, and what min-p leaves."""

    xtc_probability: Annotated[
        float, _sampling(min=0.0, max=1.0, help="Probability of XTC sampling.")
    ] = 0.0
    xtc_threshold: Annotated[
        float, _sampling(min=0.0, max=0.5, help="Threshold of XTC sampling.")
    ] = 0.1
    min_tokens_to_keep: Annotated[
        int, _sampling(min=1, help="Number of tokens that --min-p keeps, at least.")
    ] = 1


@dataclass(frozen=True)
class KVCache:
    """How the KV cache is quantized."""

    kv_bits: Annotated[
        KVBits | None, _cache(help="Bits of a quantized KV cache. Default: not quantized.")
    ] = None
    kv_group_size: Annotated[GroupSize, _cache(help="Group size of a quantized KV cache.")] = 64
    quantized_kv_start: Annotated[
        int, _cache(min=0, help="Quantize the KV cache from this token on.")
    ] = 5000


PromptLookup = Annotated[
    bool,
    _drafts(
        "--prompt-lookup/--no-prompt-lookup",
        help="Look up next tokens in prompt and text, and check several in one step where measured"
        " times say that it pays. The text is the same.",
    ),
]


@dataclass(frozen=True)
class Drafting:
    """What guesses at next tokens, so that several are generated in a step."""

    prompt_lookup: PromptLookup = True
    draft_model: Annotated[
        str | None,
        _drafts(
            metavar="MODEL",
            help="Folder or hub repository of a much smaller model with the same tokens, which"
            " guesses instead of the lookup.",
        ),
    ] = None
    num_draft_tokens: Annotated[
        int, _drafts(min=1, max=32, help="Tokens that the draft model guesses, at most.")
    ] = 3


@dataclass(frozen=True)
class Loading:
    """Which version of a model is loaded, and how."""

    revision: Revision = None
    dtype: ActivationDType = None
    ignore_memory: IgnoreMemory = False
    expert_memory: ExpertMemory = "auto"
    expert_skip: ExpertSkip = 0.0
    keep_warm: KeepWarm = False
    pipeline: Pipeline = False
