"""Times the decode kernels' variants on a tier's own experts, beside a floor and MLX's kernels.

An arm is one way to compute what a kernel computes. First the result of every arm is checked for
every layer; an arm with a wrong result is not timed. Then the arms are timed in rounds, in a
different order in each round, so that a machine that warms up or slows down affects all of them.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.chips import Chip, this_chip
from outlier_mlx.errors import CheckpointError, OutlierError, one_line
from outlier_mlx.measure.bench import Runs
from outlier_mlx.measure.bench_cases import KERNELS, Kernel, Layer, decode_layers
from outlier_mlx.measure.environment import activation_dtype, dtype_name, environment
from outlier_mlx.runtime.kernels import VARIANTS
from outlier_mlx.runtime.ops import use_metal
from outlier_mlx.runtime.variants import (
    CHOICES,
    DECODES,
    VARIANTS_VARIABLE,
    Variant,
    chip_name,
    saved_variants,
    variants_file,
)
from outlier_mlx.storage.output import write_json
from outlier_mlx.storage.texts import read_json
from outlier_mlx.terminal import Progress, no_progress

ROWS = (4, 8, 16)
PIECES = (1, 2)
FLOOR = "floor"
# Seconds that a pass of an arm takes, long enough that its start and end hardly count.
PASS_SECONDS = 0.05
MOST_LAUNCHES = 512
# Allowed error of results, as a fraction of their root mean square. One wrong trit in a row of K
# changes a product by K ** -0.5 of that; errors of float32 arithmetic are far smaller.
TOLERANCE = 2.0**-11
ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


@dataclass
class Arm:
    """One way to compute a kernel's result, and how long it took.

    Attributes:
        variant: variant of our kernel; None: MLX's 2-bit kernels.
        nbytes: bytes of weights that a launch reads.
        error: why it is not timed.
        seconds: seconds of one launch, by round.
    """

    variant: Variant | None
    nbytes: int
    error: str | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        v = self.variant
        return f"{v.decode}, {geometry(v)}" if v else "MLX 2-bit"

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
            "arm": self.variant.decode if self.variant else "mlx",
            "variant": asdict(self.variant) if self.variant else None,
            "seconds": self.runs.as_json() if self.runs else None,
            "gb_per_s": self.gb_s,
            "error": self.error,
        }


@dataclass
class KernelResult:
    """The arms of one kernel, MLX's first.

    Attributes:
        kernel: its name.
        out_features: rows of a matrix.
        in_features: columns of a matrix.
        pairs: (token, expert) pairs in a launch.
        launches: number of launches in a pass of an arm.
        arms: the ways to compute it.
    """

    kernel: str
    out_features: int
    in_features: int
    pairs: int
    launches: int
    arms: list[Arm]

    @property
    def best(self) -> Variant | None:
        """The fastest of the variants that are accurate enough to be chosen."""
        timed = {arm.variant: arm.runs.median for arm in self.arms if arm.variant and arm.runs}
        offered = [v for v in timed if all(getattr(v, f) in CHOICES[f] for f in CHOICES)]
        return min(offered, key=timed.__getitem__, default=None)

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        shown = ("kernel", "out_features", "in_features", "pairs", "launches")
        return {name: getattr(self, name) for name in shown} | {
            "best": asdict(self.best) if self.best else None,
            "arms": [arm.as_json() for arm in self.arms],
        }


@dataclass
class KernelBench:
    """Results for a tier's kernels; without Metal, MLX's arm is the only one."""

    chip: Chip
    dtype: str
    results: list[KernelResult]

    @property
    def errors(self) -> list[str]:
        """The arms that were not timed, with reasons."""
        return [
            f"{result.kernel}, {arm.name}: not timed: {arm.error}"
            for result in self.results
            for arm in result.arms
            if arm.error
        ]

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        kernels = [result.as_json() for result in self.results]
        return {**environment(self.chip), "dtype": self.dtype, "kernels": kernels}


def bench_kernels(
    model: nn.Module,
    rounds: int,
    tokens: int = 1,
    progress: Progress = no_progress,
) -> KernelBench:
    """Time every variant of the decode kernels on a tier's experts.

    Args:
        model: a tier that `outlier_mlx.load` returns.
        rounds: number of rounds; each times every arm once.
        tokens: number of tokens decoded at a time.
        progress: called with rounds done so far, and in all.

    Raises:
        OutlierError: the model has no ternary experts.
    """
    dtype = activation_dtype(model)
    layers = decode_layers(model, tokens, dtype)
    total = rounds * len(KERNELS)
    results: list[KernelResult] = []

    def advance(turn: int) -> None:
        progress(len(results) * rounds + turn, total)

    for kernel in KERNELS:
        results.append(_bench_kernel(kernel, layers, dtype, rounds, advance))
    progress(total, total)
    return KernelBench(this_chip(), dtype_name(dtype), results)


def variants_to_time(kernel: str, in_features: int, out_features: int) -> list[Variant]:
    """Every way to decode, floor included, in every geometry that the matrix allows."""
    simdgroups = VARIANTS[kernel].simdgroups
    variants = (
        Variant(decode, rows, pieces, simdgroups).fitted(in_features, out_features)
        for decode, rows, pieces in product(DECODES, ROWS, PIECES)
    )
    return list(dict.fromkeys(variants))


def geometry(variant: Variant) -> str:
    """Rows and pieces of a variant, in tables and messages."""
    return f"{variant.rows} rows, {variant.pieces} piece{'s' if variant.pieces > 1 else ''}"


def excess(found: mx.array, expected: mx.array, tolerance: tuple[float, float]) -> float:
    """The largest error of a result, as a multiple of the allowed error.

    Args:
        found: the result, of any shape and floating dtype.
        expected: what it should be, of the same shape, float32.
        tolerance: allowed error, as a fraction of the root mean square of `expected`, and as a
            fraction of each value; both are added.
    """
    typical = mx.sqrt(mx.mean(mx.square(expected)))
    allowed = tolerance[0] * typical + tolerance[1] * mx.abs(expected) + 1e-30
    errors = mx.abs(found.astype(mx.float32) - expected) / allowed
    return float(mx.max(mx.where(mx.isnan(errors), math.inf, errors)))


def save_best(bench: KernelBench) -> Path:
    """Save the best variants for this chip where the runtime looks for them.

    Returns:
        The file, `variants_file()`; its entries for other chips stay.

    Raises:
        OutlierError: no variant was timed, or there is no place to save it.
    """
    best = {result.kernel: asdict(result.best) for result in bench.results if result.best}
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


def _bench_kernel(
    kernel: Kernel,
    layers: list[Layer],
    dtype: mx.Dtype,
    rounds: int,
    progress: Callable[[int], None],
) -> KernelResult:
    first = layers[0]
    in_features = first.in_features(kernel.reads[0])
    out_features = getattr(first, kernel.reads[0])[0].shape[1]
    progress(0)
    contenders = [_mlx(kernel, layers, dtype)]
    if use_metal():
        variants = variants_to_time(kernel.name, in_features, out_features)
        contenders += [_ours(kernel, layers, dtype, variant) for variant in variants]
    _check(contenders, kernel, layers)
    sound = [c for c in contenders if c.arm.error is None]
    # As many launches as take PASS_SECONDS for the slowest.
    slowest = max((_pass(c, len(layers), 1) for c in sound), default=PASS_SECONDS)
    launches = max(1, min(MOST_LAUNCHES, round(PASS_SECONDS / slowest)))
    for turn in range(rounds):
        progress(turn)
        for contender in _in_turn(sound, turn):
            contender.arm.seconds.append(_pass(contender, len(layers), launches))
    arms = [contender.arm for contender in contenders]
    pairs = first.indices.size
    return KernelResult(kernel.name, out_features, in_features, pairs, launches, arms)


@dataclass
class _Contender:
    """An arm at work.

    Attributes:
        arm: its result.
        compute: computes the result for a layer, by number, after a previous result.
        tolerance: see `excess`; None if the result has no meaning.
    """

    arm: Arm
    compute: Callable[[int, mx.array | None], mx.array]
    tolerance: tuple[float, float] | None


def _in_turn(contenders: list[_Contender], turn: int) -> list[_Contender]:
    """The order of a round: rotated by its number, reversed in every other round."""
    start = turn % max(len(contenders), 1)
    order = contenders[start:] + contenders[:start]
    return order[::-1] if turn % 2 else order


def _mlx(kernel: Kernel, layers: list[Layer], dtype: mx.Dtype) -> _Contender:
    if mx.default_device() == mx.cpu:
        dtype = mx.float32  # as the runtime's plain path; MLX's CPU kernels would sum in halves
    copies = [[layer.transcoded(matrix, dtype) for matrix in kernel.reads] for layer in layers]
    mx.eval(copies)

    def compute(number: int, previous: mx.array | None) -> mx.array:
        layer = layers[number]
        return kernel.plain(layer, copies[number], _after(previous, layer.places), dtype)

    nbytes = sum(array.nbytes for affine in copies[0] for array in affine)
    rounding = 8 * ROUNDING[dtype]  # of the scales, and of every step
    return _Contender(Arm(None, nbytes), compute, (TOLERANCE + rounding, rounding))


def _ours(kernel: Kernel, layers: list[Layer], dtype: mx.Dtype, variant: Variant) -> _Contender:
    def compute(number: int, previous: mx.array | None) -> mx.array:
        layer = layers[number]
        return kernel.ours(layer, _after(previous, layer.indices), variant)

    nbytes = sum(layers[0].nbytes(matrix) for matrix in kernel.reads)
    rounding = ROUNDING[dtype if kernel.rounds else mx.float32]
    tolerance = None if variant.decode == FLOOR else (TOLERANCE, rounding)
    return _Contender(Arm(variant, nbytes), compute, tolerance)


def _check(contenders: list[_Contender], kernel: Kernel, layers: list[Layer]) -> None:
    """Compare the result of every arm for every layer with plain MLX in float32."""
    for number, layer in enumerate(layers):
        affine = [layer.transcoded(matrix, mx.float32) for matrix in kernel.reads]
        expected = kernel.plain(layer, affine, layer.places, mx.float32)
        mx.eval(expected)
        for contender in contenders:
            if contender.arm.error is None:
                contender.arm.error = _error(contender, number, expected)


def _error(contender: _Contender, number: int, expected: mx.array) -> str | None:
    try:
        found = contender.compute(number, None)
        mx.eval(found)
    except (RuntimeError, ValueError) as error:  # as when Metal does not compile it
        return one_line(str(error))[:200]
    if contender.tolerance is None:
        return None
    times = excess(found, expected, contender.tolerance)
    return f"its result is wrong: {times:.3g} times the error allowed" if times > 1 else None


def _pass(contender: _Contender, layers: int, launches: int) -> float:
    """Seconds per launch, in a chain of launches that depend on each other."""
    result = None
    for launch in range(launches):
        result = contender.compute(launch % layers, result)
    start = time.perf_counter()
    mx.eval(result)
    return max(time.perf_counter() - start, 1e-9) / launches


def _after(previous: mx.array | None, indices: mx.array) -> mx.array:
    """The same indices, but dependent on `previous`, as layers depend on each other."""
    if previous is None:
        return indices
    either = previous.flatten()[:1].view(mx.bool_)[:1]
    return mx.where(either, indices, indices)
