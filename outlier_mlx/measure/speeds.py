"""What this machine does in a second: as published for its chip, or as measured here and now."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from outlier_mlx.engine.chips import Chip
from outlier_mlx.measure.disk import (
    NotMeasuredError,
    are_enough,
    expert_pieces,
    measure_pieces,
)
from outlier_mlx.measure.expected import Expected, Machine, decoding, reading, work_of
from outlier_mlx.measure.findings import MEASURED, PUBLISHED
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.models.quantization import DEFAULT_GROUP_SIZE
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import read_shards

# What a CPU multiplies: a matrix of 4 bits or in float32, with one vector and with several.
MATRIX, VECTORS, BITS = (1024, 2048), 64, 4
# What a GPU reads: more than its cache holds, as a few matrices of 4 bits.
READ_MATRIX, READ_MATRICES = (32768, 4096), 4
# Operations in a chain, to time one of them.
CHAIN = 500
REPEATS = 5


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second, and where that is known from.

    Attributes:
        machine: its speeds.
        source: `PUBLISHED`, `MEASURED` or `GIVEN` of `findings`; empty if there is no speed.
        about: the speed in words; or why it is not known.
        products_gb_s: GB/s that MLX's products read on a GPU, measured here; None: not measured.
    """

    machine: Machine
    source: str
    about: str
    products_gb_s: float | None = None


def speed_here(chip: Chip, quantized: bool = True) -> Speed:
    """What this machine does: the published bandwidth if there is one, else measured in a second.

    On a CPU, MLX's products take the same time for a weight of any number of bits: their arithmetic
    counts, not the bytes. So weights are counted there.

    Args:
        chip: the chip of MLX's default device.
        quantized: whether a CPU's products are timed with quantized weights, or with float32.
    """
    if chip.device == "cpu":
        one, several = (_multiplying(vectors, quantized) for vectors in (1, VECTORS))
        about = (
            f"this CPU multiplies {one / 1e9:.3g} billion weights a second with one vector, and"
            f" {several / 1e9:.3g} for each of many"
        )
        return Speed(Machine(None, one, several, _operation()), MEASURED, about)
    if chip.bandwidth_gb_s is not None:
        about = f"{chip.name} has {chip.bandwidth_gb_s:g} GB/s"
        return Speed(Machine(chip.bandwidth_gb_s), PUBLISHED, about)
    gb_s = products_gb_s()
    about = f"MLX's 4-bit products read {gb_s:.3g} GB/s here"
    return Speed(Machine(gb_s), MEASURED, about, gb_s)


@dataclass(frozen=True)
class Expectation:
    """What was to be expected of a benchmark, at most.

    Attributes:
        decode: time of a decoded token; None: not known.
        prompt_tps: prompt tokens/s; None: not known.
        source: where the machine's speed is known from.
        about: that speed in words; or why nothing is expected.
    """

    decode: Expected | None
    prompt_tps: float | None
    source: str
    about: str

    def as_json(self) -> dict[str, Any]:
        """Tokens/s and their parts, and where they are known from."""
        return {
            "decode": None if self.decode is None else self.decode.as_json(),
            "prompt_tokens_per_s": self.prompt_tps,
            "source": self.source,
            "about": self.about,
        }


NO_EXPECTATION = Expectation(None, None, "unknown", "")


def expectation(
    folder: Path, chip: Chip, context: int, batch: int, missing_bytes: float = 0.0
) -> Expectation:
    """What is to be expected of a model.

    Args:
        folder: the model.
        chip: the chip of MLX's default device.
        context: tokens in the KV cache.
        batch: prompts at a time; for several, nothing is expected: they may share experts.
        missing_bytes: bytes of experts that a decoded token read, if they are paged; then the disk
            is measured, too.
    """
    if batch > 1:
        about = "no speed is expected of batches, whose tokens may share experts"
        return Expectation(None, None, "unknown", about)
    config, tensors = describe(raw_config(folder)), read_shards(folder)
    work = work_of(tensors, config, context, folder.name)
    if work is None:
        about = "no speed is expected: it is not known how large the model's KV cache is"
        return Expectation(None, None, "unknown", about)
    speed = speed_here(chip, config.quantization is not None)
    machine, about = speed.machine, speed.about
    if missing_bytes:
        disk, told = _disk(tensors)
        machine, about = replace(machine, disk_gb_s=disk), f"{about}; {told}"
        missing_bytes = missing_bytes if disk is not None else 0.0
    found = decoding(work, machine, missing_bytes)
    return Expectation(found, reading(work, machine), speed.source, about)


def _disk(tensors: Mapping[str, TensorRef]) -> tuple[float | None, str]:
    """GB/s that the disk reads of a model's experts, and in words; None if that tells nothing."""
    pieces = expert_pieces(tensors)
    if not are_enough(pieces):
        return None, "experts are too few or small to measure the disk, whose time is left out"
    try:
        gb_s = measure_pieces(pieces, "experts").gb_s
    except NotMeasuredError as error:
        return None, f"without the time of the disk: {error}"
    return gb_s, f"the disk reads {gb_s:.3g} GB/s of experts"


def _multiplying(vectors: int, quantized: bool) -> float:
    """Weights that MLX multiplies in a second, each with so many vectors: weights · vectors / s."""
    rows, columns = MATRIX
    x = mx.random.normal((vectors, columns))
    if quantized:
        matrix = _random_matrix(MATRIX, mx.float32)
        return rows * columns * vectors / _seconds(lambda: _product(x, matrix))
    plain = mx.random.normal(MATRIX)
    return rows * columns * vectors / _seconds(lambda: x @ plain.T)


def products_gb_s() -> float:
    """GB/s that MLX's 4-bit products read on a GPU, of matrices that no cache holds."""
    matrices = [_random_matrix(READ_MATRIX, mx.float16) for _ in range(READ_MATRICES)]
    x = mx.random.normal((1, READ_MATRIX[1])).astype(mx.float16)
    nbytes = sum(array.nbytes for matrix in matrices for array in matrix)
    return nbytes / 1e9 / _seconds(lambda: [_product(x, matrix) for matrix in matrices])


def _random_matrix(shape: tuple[int, int], dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """A matrix in MLX's affine format."""
    rows, columns = shape
    weight = mx.random.randint(0, 1 << 31, (rows, columns * BITS // 32)).astype(mx.uint32)
    scales = mx.ones((rows, columns // DEFAULT_GROUP_SIZE), dtype)
    return weight, scales, -scales


def _product(x: mx.array, matrix: tuple[mx.array, mx.array, mx.array]) -> mx.array:
    how: Any = {"group_size": DEFAULT_GROUP_SIZE, "bits": BITS}
    return mx.quantized_matmul(x, *matrix, **how)


def _operation() -> float:
    """Seconds of an operation on a small array, in a chain of them."""

    def chain() -> mx.array:
        x = mx.zeros(8)
        for _ in range(CHAIN):
            x = x + 1
        return x

    return _seconds(chain) / CHAIN


def _seconds(compute: Callable[[], Any]) -> float:
    """The median time of computing something, after the first time."""
    mx.eval(compute())
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        mx.eval(compute())
        taken.append(time.perf_counter() - start)
    return median(taken)
