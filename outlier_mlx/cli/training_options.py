"""The options of a training: what the experts are, and how they are trained."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import typer

# Options below a heading of their own in the help.
_experts = partial(typer.Option, rich_help_panel="Experts")
_training = partial(typer.Option, rich_help_panel="Training")


@dataclass(frozen=True)
class Experts:
    """What the experts are."""

    layers: Annotated[
        str,
        _experts(
            metavar="auto|8-20|3,5",
            help="Layers that get experts, numbered from 0; auto: half of them, from above the"
            " first quarter on.",
        ),
    ] = "auto"
    experts_per_domain: Annotated[
        int, _experts(min=1, help="Experts that each domain has in each of these layers.")
    ] = 1
    top_k: Annotated[
        int | None, _experts(min=1, help="Experts of a token. Default: 2, or 1 if there is one.")
    ] = None
    expert_size: Annotated[
        int | None,
        _experts(min=1, help="Width of an expert. Default: half of that of the base's FFN."),
    ] = None
    init: Annotated[
        Literal["ffn", "nothing"],
        _experts(help="Begin with the base's own neurons, or with experts that do nothing."),
    ] = "ffn"
    scales: Annotated[
        Literal["lloyd", "absmean"],
        _experts(help="Scales of rows: of the least squared error, or the mean magnitude."),
    ] = "lloyd"


@dataclass(frozen=True)
class Training:
    """How they are trained."""

    window: Annotated[int, _training(min=2, help="Tokens that are predicted in a window.")] = 256
    held_out: Annotated[
        float, _training(min=0.001, max=0.5, help="Share of each text that is held out.")
    ] = 0.1
    held_out_windows: Annotated[
        int,
        _training(min=2, help="Most windows of a text to hold out: half are measured many times."),
    ] = 128
    steps: Annotated[int, _training(min=0, help="Steps for the experts of each domain.")] = 600
    joint_steps: Annotated[
        int, _training(min=0, help="Steps for routers, alphas and row scales of all together.")
    ] = 300
    joint_weights: Annotated[
        bool,
        _training(
            "--joint-weights",
            help="In these, train all experts' weights, too: better, and needs memory for all.",
        ),
    ] = False
    batch: Annotated[int, _training(min=2, help="Windows in a step.")] = 16
    no_straight_through: Annotated[
        bool,
        _training("--no-straight-through", help="Leave experts as they begin; train the rest."),
    ] = False
    learning_rate: Annotated[
        float, _training(min=0.0, help="Largest learning rate, relative to a tensor's numbers.")
    ] = 0.1
    keep_weight: Annotated[
        float, _training(min=0.0, help="Weight of the divergence from the base on --keep.")
    ] = 2.0
    keep_bound: Annotated[
        float, _training(min=0.0, help="Most by which the perplexity on --keep may rise.")
    ] = 0.03
    balance: Annotated[
        float, _training(min=0.0, help="Weight of the loss for experts that are used unequally.")
    ] = 0.02
    stickiness: Annotated[
        float,
        _training(
            min=0.0,
            help="Weight of the loss for neighbouring tokens with different experts: overlays that"
            " page well.",
        ),
    ] = 0.0
    teacher: Annotated[
        str | None,
        _training(
            metavar="MODEL",
            help="Learn this model's predictions on the domains, not the text's tokens.",
        ),
    ] = None
    base_bits: Annotated[
        Literal["4", "8", "none"],
        _training(help="Train half of the steps with the base rounded to so many bits."),
    ] = "4"
    layers_at_once: Annotated[
        int | None,
        _training(
            min=1, help="Layers whose experts are trained together. Default: as many as fit."
        ),
    ] = None
    no_grad_checkpoint: Annotated[
        bool,
        _training(
            "--no-grad-checkpoint",
            help="Keep all activations for the gradient: faster, and needs more memory.",
        ),
    ] = False
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        _training(
            help="Dtype of the base and of activations. Default: the base's; on the CPU, float32."
        ),
    ] = None
    seed: Annotated[int, _training(min=0, help="Seed of everything random.")] = 0
