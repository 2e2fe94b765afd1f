"""Times the kernels' variants on a tier's own experts, beside a floor and MLX's kernels.

An arm is one way to compute what a kernel computes. First the result of every arm is checked for
every input; an arm with a wrong result is not timed. Then the arms are timed in rounds, in a
different order in each round, so that a machine that warms up or slows down affects all of them.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.chips import this_chip
from outlier_mlx.engine.generate import activation_dtype
from outlier_mlx.errors import one_line
from outlier_mlx.measure.bench import in_turn
from outlier_mlx.measure.bench_cases import DECODING, LINEAR, Case, cases
from outlier_mlx.measure.bench_inputs import decode_layers, linears
from outlier_mlx.measure.bench_results import Arm, KernelBench, KernelResult
from outlier_mlx.measure.environment import dtype_name
from outlier_mlx.runtime.kernels import VARIANTS
from outlier_mlx.runtime.ops import use_metal
from outlier_mlx.runtime.variants import DECODES, Variant
from outlier_mlx.terminal import Progress, no_progress

ROWS = (4, 8, 16)
BLOCK_ROWS = (2, 4)  # for several pairs, which need more registers
PIECES = (1, 2)
FLOOR = "floor"
# Seconds that a pass of an arm takes, long enough that its start and end hardly count.
PASS_SECONDS = 0.05
MOST_LAUNCHES = 512
# Allowed error of results, as a fraction of their root mean square. One wrong trit in a row of K
# changes a product by K ** -0.5 of that; errors of float32 arithmetic are far smaller.
TOLERANCE = 2.0**-11
ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def bench_kernels(
    model: nn.Module,
    rounds: int,
    tokens: int = 1,
    progress: Progress = no_progress,
) -> KernelBench:
    """Time every variant of the kernels on a tier's experts.

    Args:
        model: a tier that `outlier_mlx.load` returns.
        rounds: number of rounds; each times every arm once.
        tokens: number of tokens decoded at a time.
        progress: called with rounds done so far, and in all.

    Raises:
        OutlierError: the model has no ternary experts.
    """
    dtype = activation_dtype(model)
    todo = cases(model, tokens, dtype)
    total = rounds * len(todo)
    results: list[KernelResult] = []

    def advance(turn: int) -> None:
        progress(len(results) * rounds + turn, total)

    for case in todo:
        results.append(_bench_case(case, dtype, rounds, advance))
    progress(total, total)
    return KernelBench(this_chip(), dtype_name(dtype), results)


def check_kernels(
    model: nn.Module, dtype: mx.Dtype, progress: Progress = no_progress
) -> dict[str, str | None]:
    """Compare every kernel with plain MLX, as it is launched without a choice; nothing is timed.

    Args:
        model: a module with ternary experts.
        dtype: activation dtype.
        progress: called with kernels checked so far, and in all.

    Returns:
        What is wrong with each case, by its name; None: nothing.

    Raises:
        OutlierError: the model has no ternary experts.
    """
    found: dict[str, str | None] = {}
    todo = cases(model, 1, dtype)
    for number, case in enumerate(todo):
        progress(number, len(todo))
        inputs = case.build()
        contender = _ours(case, inputs, dtype, None)
        _check([contender], case, inputs)
        found[case.name] = contender.arm.error
    return found


def copied_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of the copies in MLX's formats that are kept at a time, beside the model.

    Raises:
        OutlierError: the model has no ternary experts.
    """
    dtype = activation_dtype(model)
    copied, most = mlx_dtype(dtype), 0
    layers: Sequence[Any] = decode_layers(model, tokens, dtype)
    experts: Sequence[Any] = linears(model, tokens, 0, dtype)
    for kernel in (*DECODING, LINEAR):
        inputs = experts if kernel is LINEAR else layers
        matrices = product(inputs, kernel.reads, kernel.bits)
        most = max(most, sum(one.copied(name, bits, copied) for one, name, bits in matrices))
    return most


def mlx_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of MLX's own products: on the CPU, float32, as the runtime's plain path."""
    # MLX's CPU kernels would sum in halves.
    return mx.float32 if mx.default_device() == mx.cpu else dtype


def variants_to_time(
    kernel: str, in_features: int, out_features: int, together: int = 1
) -> list[Variant]:
    """Every way to decode, floor included, in every geometry that the matrix allows.

    If several pairs are multiplied `together`, these are geometries of fewer rows.
    """
    simdgroups = VARIANTS[kernel].simdgroups
    rows_of = ROWS if together == 1 else BLOCK_ROWS
    variants = (
        Variant(decode, rows, pieces, simdgroups).fitted(in_features, out_features)
        for decode, rows, pieces in product(DECODES, rows_of, PIECES)
    )
    return list(dict.fromkeys(variants))


def excess(found: mx.array, expected: mx.array, tolerance: tuple[float, float]) -> float:
    """The largest error of a result, as a multiple of the allowed error.

    Args:
        found: the result, of any shape and floating dtype; or integers, which have to be equal.
        expected: what it should be, of the same shape, float32 or integers.
        tolerance: allowed error, as a fraction of the root mean square of `expected`, and as a
            fraction of each value; both are added.
    """
    if not mx.issubdtype(expected.dtype, mx.floating):
        return 0.0 if mx.array_equal(found, expected).item() else math.inf
    typical = mx.sqrt(mx.mean(mx.square(expected)))
    allowed = tolerance[0] * typical + tolerance[1] * mx.abs(expected) + 1e-30
    errors = mx.abs(found.astype(mx.float32) - expected) / allowed
    return float(mx.max(mx.where(mx.isnan(errors), math.inf, errors)))


def _bench_case(
    case: Case, dtype: mx.Dtype, rounds: int, progress: Callable[[int], None]
) -> KernelResult:
    progress(0)
    inputs, kernel = case.build(), case.kernel
    out_features, in_features = inputs[0].sizes(kernel.reads[0])
    contenders = _theirs(case, inputs, dtype)
    if use_metal():
        variants: list[Variant | None] = [None]
        if kernel.tuned:
            variants = [*variants_to_time(kernel.name, in_features, out_features, case.together)]
        contenders += [_ours(case, inputs, dtype, variant) for variant in variants]
    _check(contenders, case, inputs)
    sound = [c for c in contenders if c.arm.error is None]
    # As many launches as take PASS_SECONDS for the slowest.
    slowest = max((_pass(c, inputs, 1) for c in sound), default=PASS_SECONDS)
    launches = max(1, min(MOST_LAUNCHES, round(PASS_SECONDS / slowest)))
    for turn in range(rounds):
        progress(turn)
        for contender in in_turn(sound, turn):
            contender.arm.seconds.append(_pass(contender, inputs, launches))
    arms = [contender.arm for contender in contenders]
    shape = out_features, in_features, inputs[0].pairs
    return KernelResult(kernel.name, *shape, launches, arms, case.form)


@dataclass
class _Contender:
    """An arm at work.

    Attributes:
        arm: its result.
        waits: see `Kernel`.
        compute: computes the result (an array, or several) for inputs, given also their number.
        tolerance: see `excess`; None if the result has no meaning.
    """

    arm: Arm
    waits: str | None
    compute: Callable[[Any, int], Any]
    tolerance: tuple[float, float] | None

    def outputs(
        self, inputs: Sequence[Any], number: int, previous: mx.array | None
    ) -> list[mx.array]:
        """The results for inputs, by number, after a previous result."""
        given = inputs[number]
        if self.waits is not None:
            after = _after(previous, getattr(given, self.waits))
            given = replace(given, **{self.waits: after})
        found = self.compute(given, number)
        if self.waits is None and previous is not None:
            found = mx.depends([found], [previous])
        return [found] if isinstance(found, mx.array) else list(found)


def _theirs(case: Case, inputs: Sequence[Any], dtype: mx.Dtype) -> list[_Contender]:
    """The arms of MLX: a format each, or its operations alone where the kernel has no matrices."""
    dtype = mlx_dtype(dtype)
    kernel, rounding = case.kernel, 8 * ROUNDING[dtype]  # of the scales, and of every step

    def contender(bits: int | None) -> _Contender:
        copies = [
            [given.affine(matrix, bits, dtype) for matrix in kernel.reads if bits]
            for given in inputs
        ]
        mx.eval([affine.arrays for one in copies for affine in one])
        nbytes = sum(affine.nbytes for affine in copies[0])
        arm = Arm(None, nbytes or _nbytes(case, inputs), label=f"MLX {bits}-bit" if bits else "MLX")
        return _Contender(
            arm,
            kernel.waits,
            lambda given, number: kernel.plain(given, copies[number], dtype),
            (TOLERANCE + rounding, rounding),
        )

    return [contender(bits) for bits in kernel.bits or (None,)]


def _ours(
    case: Case, inputs: Sequence[Any], dtype: mx.Dtype, variant: Variant | None
) -> _Contender:
    kernel = case.kernel
    given = {"variant": variant} if kernel.tuned else {}
    rounding = ROUNDING[dtype if kernel.rounds else mx.float32]
    return _Contender(
        Arm(variant, _nbytes(case, inputs), label="ours", own=True),
        kernel.waits,
        lambda one, _: kernel.ours(one, **given),
        None if variant and variant.decode == FLOOR else (TOLERANCE, rounding),
    )


def _nbytes(case: Case, inputs: Sequence[Any]) -> int:
    return sum(inputs[0].nbytes(matrix) for matrix in case.kernel.reads)


def _check(contenders: list[_Contender], case: Case, inputs: Sequence[Any]) -> None:
    """Compare the result of every arm for every input with plain MLX in float32."""
    kernel = case.kernel
    for number, given in enumerate(inputs):
        affine = [given.affine(matrix, 2, mx.float32) for matrix in kernel.reads if kernel.bits]
        computed = kernel.plain(given, affine, mx.float32)
        expected = [computed] if isinstance(computed, mx.array) else list(computed)
        mx.eval(expected)
        for contender in contenders:
            if contender.arm.error is None:
                contender.arm.error = _error(contender, inputs, number, expected)


def _error(
    contender: _Contender, inputs: Sequence[Any], number: int, expected: list[mx.array]
) -> str | None:
    try:
        found = contender.outputs(inputs, number, None)
        mx.eval(found)
    except (RuntimeError, ValueError) as error:  # as when Metal does not compile it
        return one_line(str(error))[:200]
    if contender.tolerance is None:
        return None
    both = zip(found, expected, strict=True)
    times = max(excess(one, other, contender.tolerance) for one, other in both)
    return f"its result is wrong: {times:.3g} times the error allowed" if times > 1 else None


def _pass(contender: _Contender, inputs: Sequence[Any], launches: int) -> float:
    """Seconds per launch, in a chain of launches that depend on each other."""
    result: list[mx.array | None] = [None]
    for launch in range(launches):
        result = [*contender.outputs(inputs, launch % len(inputs), result[0])]
    start = time.perf_counter()
    mx.eval(result)
    return max(time.perf_counter() - start, 1e-9) / launches


def _after(previous: mx.array | None, given: mx.array) -> mx.array:
    """The same array, but dependent on `previous`, as layers depend on each other."""
    if previous is None:
        return given
    either = previous.flatten()[:1].view(mx.bool_)[:1]
    return mx.where(either, given, given)
