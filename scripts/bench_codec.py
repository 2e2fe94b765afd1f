"""Time packing and unpacking of trits, compared with simple NumPy code and with gguf-py.

The result of every function is checked before it is timed. The functions take turns, so that a busy
machine slows all of them. A rate is the median over the rounds; a ratio is the median of the ratios
within each round.

    python scripts/bench_codec.py --rows 2768 --width 5120
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import gguf  # noqa: E402
import numpy as np  # noqa: E402

from outlier_mlx.ternary import (  # noqa: E402
    check_rows,
    flat_to_rows,
    ggml,
    pack_rows,
    pack_tq1_0,
    rows_to_flat,
    unpack_rows,
    unpack_tq1_0,
)

TQ1_0 = gguf.GGMLQuantizationType.TQ1_0


def plain_pack(trits: np.ndarray) -> np.ndarray:
    """The definition in int16: multiply by powers of three, and sum over groups of five."""
    digits = np.ones(-(-trits.size // 5) * 5, np.int16)
    digits[: trits.size] = trits.reshape(-1)
    digits[: trits.size] += 1
    powers = np.array([1, 3, 9, 27, 81], np.int16)
    return (digits.reshape(-1, 5) * powers).sum(axis=1).astype(np.uint8)


def plain_unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The definition in uint8: five divisions, five remainders."""
    trits = np.empty((packed.size, 5), np.int8)
    for k in range(5):
        trits[:, k] = packed // 3**k % 3
    trits -= 1
    return trits.reshape(-1)[: np.prod(shape)].reshape(shape)


def time_in_turns(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call: for each function, one value per round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in range(rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, arms: dict[str, Callable[[], object]], trits: int, rounds: int) -> None:
    """Time the functions and print a table; the others are compared with the first."""
    seconds = time_in_turns(arms, rounds)
    base = next(iter(seconds.values()))
    print(f"\n{title:34} {'GB/s of trits':>14} {'best':>7} {'times':>7}")
    for name, taken in seconds.items():
        times = median(b / t for b, t in zip(base, taken, strict=True))
        rate, best = trits / median(taken) / 1e9, trits / min(taken) / 1e9
        print(f"  {name:32} {rate:14.2f} {best:7.2f} {times:6.1f}x")


def main() -> None:
    """Check the results, time the functions, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=2768)
    parser.add_argument("--width", type=int, default=5120, help="a multiple of 256, for ggml")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    shape = (options.rows, options.width)

    trits = np.random.default_rng(0).integers(-1, 2, shape, np.int8)
    packed, rows = pack_tq1_0(trits), pack_rows(trits)
    weights = trits.astype(np.float32)
    d = np.ones((options.rows, options.width // 256), np.float16)
    blocks = ggml.pack_tq1_0_blocks(trits, d)

    assert np.array_equal(packed, plain_pack(trits))
    assert np.array_equal(plain_unpack(packed, shape), trits)
    assert np.array_equal(unpack_tq1_0(packed, shape), trits)
    assert np.array_equal(unpack_rows(rows, options.width), trits)
    assert np.array_equal(flat_to_rows(packed, shape), rows)
    assert np.array_equal(rows_to_flat(rows, shape), packed)
    assert np.array_equal(blocks, gguf.quantize(weights, TQ1_0))
    assert np.array_equal(weights, gguf.dequantize(blocks, TQ1_0))
    check_rows(rows, options.width)

    print(f"{shape[0]} x {shape[1]} trits, {options.rounds} rounds, one thread")
    report(
        "packing (validation included)",
        {
            "int16 product and sum": lambda: plain_pack(trits),
            "pack_tq1_0": lambda: pack_tq1_0(trits),
            "pack_rows": lambda: pack_rows(trits),
            "ggml.pack_tq1_0_blocks": lambda: ggml.pack_tq1_0_blocks(trits, d),
            "gguf-py TQ1_0 (from float32)": lambda: gguf.quantize(weights, TQ1_0),
        },
        trits.size,
        options.rounds,
    )
    report(
        "unpacking",
        {
            "five divisions and remainders": lambda: plain_unpack(packed, shape),
            "unpack_tq1_0": lambda: unpack_tq1_0(packed, shape),
            "unpack_rows": lambda: unpack_rows(rows, options.width),
            "ggml.unpack_tq1_0_blocks": lambda: ggml.unpack_tq1_0_blocks(blocks),
            "gguf-py TQ1_0 (to float32)": lambda: gguf.dequantize(blocks, TQ1_0),
        },
        trits.size,
        options.rounds,
    )
    report(
        "between the layouts",
        {
            "unpack, then pack": lambda: pack_rows(unpack_tq1_0(packed, shape)),
            "flat_to_rows": lambda: flat_to_rows(packed, shape),
            "rows_to_flat": lambda: rows_to_flat(rows, shape),
            "check_rows": lambda: check_rows(rows, options.width),
        },
        trits.size,
        options.rounds,
    )


if __name__ == "__main__":
    main()
