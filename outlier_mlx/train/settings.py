"""What decides the result of a training; everything else only decides how long it takes."""

import json
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Literal

from outlier_mlx.errors import OutlierError
from outlier_mlx.models.description import ModelConfig

#: Experts' widths are a multiple of this: a quantized tier needs groups of 32.
WIDTH_MULTIPLE = 32


# Settings whose option has another name; and what decides a training and has none.
_OPTIONS = {
    "straight_through": "--no-straight-through",
    "expert_steps": "--steps",
    "grad_checkpoint": "--no-grad-checkpoint",
}
_NO_OPTION = ("keep_share", "temperature", "alpha", "version", "base", "data")


def option(name: str) -> str:
    """What a user types for a setting; its name, if there is no option."""
    if name in _NO_OPTION:
        return name
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")


@dataclass(frozen=True)
class Settings:
    """Settings of a training.

    Attributes:
        layers: numbers of the layers that get experts; None: see `resolved`.
        experts_per_domain: experts that each domain has in each of these layers.
        top_k: experts of a token.
        expert_size: width of an expert; None: half of the width of the base's FFN.
        init: what experts begin as: those neurons of the base's FFN that matter most for the
            domain, or random weights whose output is zero.
        scales: how rows of weights become trits and a scale: with the least squared error
            (Lloyd-Max), or with the mean magnitude as the scale.
        straight_through: train the experts of each domain; without, they stay as they began.
        expert_steps: steps for each domain's experts, divided among the layer groups.
        joint_steps: steps for router, alphas and row scales of all domains together.
        joint_weights: in these steps, train the weights of all experts, too.
        batch: windows in a step.
        keep_share: share of these windows that is text of what the base shall not forget.
        learning_rate: the largest rate of Adam, relative to a tensor's typical number.
        keep_weight: weight of the divergence from the base on that text.
        keep_bound: most by which its held-out perplexity may rise, as a share.
        temperature: divides the logits of model and teacher.
        balance: weight of the loss for experts that are used unequally.
        stickiness: weight of the loss for neighbouring tokens with different experts. The last
            stage may then pay for a higher hit rate of a cache of experts, by so much loss.
        alpha: factor of an expert's output at the beginning.
        seed: of everything random.
        layers_at_once: layers whose experts are trained together; None: as many as fit in memory.
        grad_checkpoint: keep only the inputs of layers for the gradient, and compute the rest
            again: less memory, and a third more time.
        base_bits: every second step is made against the base rounded to so many bits; None: none.
    """

    layers: tuple[int, ...] | None = None
    experts_per_domain: int = 1
    top_k: int = 2
    expert_size: int | None = None
    init: Literal["ffn", "nothing"] = "ffn"
    scales: Literal["lloyd", "absmean"] = "lloyd"
    straight_through: bool = True
    expert_steps: int = 600
    joint_steps: int = 300
    joint_weights: bool = False
    batch: int = 16
    keep_share: float = 1 / 3
    learning_rate: float = 0.1
    keep_weight: float = 2.0
    keep_bound: float = 0.03
    temperature: float = 2.0
    balance: float = 0.02
    stickiness: float = 0.0
    alpha: float = 0.1
    seed: int = 0
    layers_at_once: int | None = None
    grad_checkpoint: bool = True
    base_bits: int | None = 4

    def check(self, config: ModelConfig, domains: int) -> None:
        """Check the settings against a base.

        Args:
            config: the base's.
            domains: number of domains.

        Raises:
            OutlierError: names the option and what was expected.
        """
        layers = self.layers
        if layers is not None and (
            not layers or layers != tuple(sorted(set(layers))) or not 0 <= layers[0] <= layers[-1]
        ):
            raise OutlierError(f"--layers: {layers}; expected ascending numbers, each once")
        if layers is not None and layers[-1] >= config.layers:
            raise OutlierError(
                f"--layers: {layers[-1]}; the base has {config.layers} layers, numbered from 0"
            )
        size = self.expert_size
        if size is not None and (size < 1 or size % WIDTH_MULTIPLE):
            raise OutlierError(f"--expert-size: {size}; expected a multiple of {WIDTH_MULTIPLE}")
        if size is not None and self.init == "ffn" and size > config.intermediate:
            raise OutlierError(
                f"--expert-size: {size}; the base's FFN, from which experts are made, has only"
                f" {config.intermediate} neurons"
            )
        if config.hidden % 4:
            raise OutlierError(
                f"the base's hidden size is {config.hidden}; expected a multiple of 4"
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise OutlierError(f"{option(name)}: {value}; expected at least {least}")
        if not 0 < self.keep_share < 1:
            raise OutlierError(f"keep_share: {self.keep_share}; expected between 0 and 1")
        if self.keep_rows < 1 or self.new_rows < 1:
            raise OutlierError(f"--batch: {self.batch}; expected at least 2 windows")
        if self.joint_weights and not self.straight_through:
            raise OutlierError(
                "--joint-weights: weights are trained by straight-through estimation, which"
                " --no-straight-through turns off"
            )
        if self.base_bits not in (None, 4, 8):
            raise OutlierError(f"--base-bits: {self.base_bits}; expected 4, 8 or none")
        if self.top_k > domains * self.experts_per_domain:
            raise OutlierError(
                f"--top-k: {self.top_k}; there are only {domains * self.experts_per_domain} experts"
            )

    def resolved(self, config: ModelConfig) -> "Settings":
        """The same settings with nothing left open but `layers_at_once`.

        Layers: half of the base's, from above its first quarter on; three where it has fewer than
        six. Published overlays have experts in such layers.
        """
        layers = self.layers
        if layers is None:
            first = max(1, round(0.28 * config.layers)) if config.layers > 1 else 0
            count = max(config.layers // 2, min(3, config.layers - first))
            layers = tuple(range(first, min(config.layers, first + count)))
        size = self.expert_size
        if size is None:
            half = config.intermediate // 2
            size = max(WIDTH_MULTIPLE, half // WIDTH_MULTIPLE * WIDTH_MULTIPLE)
        return replace(self, layers=layers, expert_size=size)

    @property
    def trains_experts(self) -> bool:
        """Whether the weights of experts are trained."""
        return self.straight_through and self.expert_steps > 0

    @property
    def keep_rows(self) -> int:
        """Windows in a step that are text of what the base shall not forget."""
        return max(1, round(self.batch * self.keep_share))

    @property
    def new_rows(self) -> int:
        """Windows in a step that are text of domains."""
        return self.batch - self.keep_rows

    def as_json(self) -> dict:
        """The settings as JSON values."""
        layers = None if self.layers is None else list(self.layers)
        return asdict(self) | {"layers": layers}

    def digest(self) -> str:
        """A digest of all settings."""
        return sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()


# The least value of each number.
_LEAST = {
    "experts_per_domain": 1,
    "top_k": 1,
    "expert_steps": 0,
    "joint_steps": 0,
    "batch": 2,
    "learning_rate": 0.0,
    "keep_weight": 0.0,
    "keep_bound": 0.0,
    "temperature": 0.1,
    "balance": 0.0,
    "stickiness": 0.0,
    "seed": 0,
    "layers_at_once": 1,
}
