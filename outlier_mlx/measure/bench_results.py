"""What timing kernels found: arms, kernels, and the file of the fastest variants."""

import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from outlier_mlx.engine.chips import Chip
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.measure.bench import Runs
from outlier_mlx.measure.environment import environment
from outlier_mlx.runtime.variants import (
    CHOICES,
    VARIANTS_VARIABLE,
    Variant,
    chip_name,
    saved_variants,
    variants_file,
)
from outlier_mlx.storage.output import write_json
from outlier_mlx.storage.texts import read_json


def geometry(variant: Variant) -> str:
    """Rows and pieces of a variant, in tables and messages."""
    return f"{variant.rows} rows, {variant.pieces} piece{'s' if variant.pieces > 1 else ''}"


@dataclass
class Arm:
    """One way to compute a kernel's result, and how long it took.

    Attributes:
        variant: variant of our kernel; None: MLX's kernels, or ours if it has no variants.
        nbytes: bytes of weights that a launch reads.
        error: why it is not timed.
        seconds: seconds of one launch, by round.
        label: name of an arm without a variant.
        own: whether it is this project's kernel.
    """

    variant: Variant | None
    nbytes: int
    error: str | None = None
    seconds: list[float] = field(default_factory=list)
    label: str = "MLX 2-bit"
    own: bool = False

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        v = self.variant
        return f"{v.decode}, {geometry(v)}" if v else self.label

    @property
    def runs(self) -> Runs | None:
        """Seconds of one launch; None if it was not timed."""
        return Runs(tuple(self.seconds)) if self.seconds else None

    @property
    def gb_s(self) -> float | None:
        """Bandwidth in GB/s of weights, from the median."""
        return self.nbytes / self.runs.median / 1e9 if self.runs else None

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {
            "arm": self.variant.decode if self.variant else self.label,
            "variant": asdict(self.variant) if self.variant else None,
            "seconds": self.runs.as_json() if self.runs else None,
            "gb_per_s": self.gb_s,
            "error": self.error,
        }


@dataclass
class KernelResult:
    """The arms of one kernel on inputs of one form, MLX's first.

    Attributes:
        kernel: its name.
        out_features: rows of a matrix.
        in_features: columns of a matrix.
        pairs: (token, expert) pairs in a launch.
        launches: number of launches in a pass of an arm.
        arms: the ways to compute it.
        form: what is special about the inputs; "" if nothing.
    """

    kernel: str
    out_features: int
    in_features: int
    pairs: int
    launches: int
    arms: list[Arm]
    form: str = ""

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        return f"{self.kernel}, {self.form}" if self.form else self.kernel

    @property
    def best(self) -> Variant | None:
        """The fastest of the variants that are accurate enough to be chosen."""
        timed = {arm.variant: arm.runs.median for arm in self.arms if arm.variant and arm.runs}
        offered = [v for v in timed if all(getattr(v, f) in CHOICES[f] for f in CHOICES)]
        return min(offered, key=timed.__getitem__, default=None)

    @property
    def theirs(self) -> list[Arm]:
        """The arms of MLX."""
        return [arm for arm in self.arms if not arm.own]

    @property
    def ours(self) -> Arm | None:
        """Our fastest arm, of those that may be chosen; None if there is none."""
        own = [arm for arm in self.arms if arm.own and arm.variant == self.best]
        return own[0] if own else None

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        shown = ("kernel", "form", "out_features", "in_features", "pairs", "launches")
        return {name: getattr(self, name) for name in shown} | {
            "best": asdict(self.best) if self.best else None,
            "arms": [arm.as_json() for arm in self.arms],
        }


@dataclass
class KernelBench:
    """Results for a tier's kernels; without Metal, MLX's arms are the only ones."""

    chip: Chip
    dtype: str
    results: list[KernelResult]

    @property
    def errors(self) -> list[str]:
        """The arms that were not timed, with reasons."""
        return [
            f"{result.name}, {arm.name}: not timed: {arm.error}"
            for result in self.results
            for arm in result.arms
            if arm.error
        ]

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        kernels = [result.as_json() for result in self.results]
        return {**environment(self.chip), "dtype": self.dtype, "kernels": kernels}


def save_best(bench: KernelBench) -> Path:
    """Save the best variants for this chip where the runtime looks for them.

    Returns:
        The file, `variants_file()`; its entries for other chips stay.

    Raises:
        OutlierError: no variant was timed, or there is no place to save it.
    """
    best = {
        result.kernel: asdict(result.best)
        for result in bench.results
        if result.best and not result.form
    }
    file = variants_file()
    if not best:
        raise OutlierError("--save: no kernel was timed, so there is none to choose")
    if file is None:
        raise OutlierError(f"--save: no place to save to: {VARIANTS_VARIABLE} is empty")
    try:
        kept = read_json(file)["chips"] if file.exists() else {}
        kept = {chip: kernels for chip, kernels in kept.items() if isinstance(kernels, dict)}
    except (AttributeError, CheckpointError, KeyError):
        warnings.warn(f"{file}: not a file of kernel variants; replaced", stacklevel=2)
        kept = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"chips": kept | {chip_name(): best}})
    saved_variants.cache_clear()
    return file
