"""Measure time and memory of conversions with the layer shapes of Qwen2.5.

    python scripts/bench_convert.py [--shape 14b] [--form v3.2 ...] [--layers 1 2 4] [--work FOLDER]

For each form of overlay and number of layers, it writes a synthetic overlay (eight experts in every
layer, and the base of those layers) to a temporary folder, converts it in new processes, and
removes everything again. By default, the number of layers doubles from one up to what the disk or
the model allows. The table shows that memory does not grow with the number of layers, that time
grows with it, and how many cores were busy. The source has just been written, so much of it is read
from the page cache.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np
from bench_overlays import FORMS, SHAPES, Model, source_bytes, write_overlay

HEADROOM_BYTES = 2 << 30
SMALL_VOCAB = 2048


def memory(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes; without /proc, the peak for both."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(overlay: Path, out: Path, tier: str) -> dict:
    """Convert once in this process; returns times, sizes, and peak memory without the imports'."""
    from outlier_mlx.checkpoints import open_overlay
    from outlier_mlx.checkpoints.base import join
    from outlier_mlx.tiers.convert import convert_tier
    from outlier_mlx.tiers.plan import make_plan
    from outlier_mlx.tiers.presets import RECIPES

    # The synthetic overlays have no tokenizer: ignore the warning.
    warnings.simplefilter("ignore")
    recipe = RECIPES[tier]
    parts = make_plan(join(open_overlay(overlay), None), recipe).parts
    ends = list(accumulate(part.source_bytes for part in parts))
    # Wall time, and CPU time of all threads, which hardly depends on the machine's other work.
    seconds = {part.kind: np.zeros(2) for part in parts}
    last = np.zeros(2)

    def clocks() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    def progress(done: int, total: int | None) -> None:
        # Called after bytes have been read, packed, hashed and written.
        nonlocal last
        now = clocks()
        seconds[parts[bisect_left(ends, done)].kind] += now - last
        last = now

    before = memory("VmRSS")
    begin = last = clocks()
    report = convert_tier(overlay, None, out, recipe=recipe, progress=progress)
    took, took_cpu = clocks() - begin
    return {
        "seconds": took,
        "cpu_seconds": took_cpu,
        "source": ends[-1],
        "trits": sum(part.params for part in parts if part.kind == "experts"),
        "expert_source": sum(part.source_bytes for part in parts if part.kind == "experts"),
        "expert_seconds": seconds["experts"][0],
        "expert_cpu_seconds": seconds["experts"][1],
        "peak": memory("VmHWM") - before,
        "written": sum(file.stat().st_size for file in out.iterdir()),
        "bits_per_weight": report.rows[-1].bits_per_weight,
    }


def repeat(overlay: Path, out: Path, args: argparse.Namespace) -> Iterator[dict]:
    """Measure several times, each in a new process."""
    for _ in range(args.repeat):
        load = os.getloadavg()[0]
        command = [sys.executable, __file__, "--tier", args.tier, "--child", overlay, out]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        shutil.rmtree(out)
        yield json.loads(done.stdout) | {"load": load}


def max_disk_bytes(form: str, model: Model, tier: str) -> int:
    """Upper bound of the disk space for an overlay and its tier, in bytes."""
    source = source_bytes(form, model)
    weights = sum(prod(spec.shape) for spec in model.base())
    experts = len(model.places()) * sum(prod(shape) for shape in model.matrices().values())
    base = weights * (1.2 if tier.startswith("q") else 4)
    return int(source + base + experts * 0.22) + HEADROOM_BYTES


def layer_counts(form: str, args: argparse.Namespace, free: int) -> list[int]:
    """The numbers of layers to measure."""
    if args.layers:
        return args.layers
    shape, counts = SHAPES[args.shape], [1]
    while counts[-1] < shape.layers:
        more = min(2 * counts[-1], shape.layers)
        if max_disk_bytes(form, Model(shape, more, args.vocab), args.tier) > free:
            break
        counts.append(more)
    return counts


def bench(form: str, layers: int, args: argparse.Namespace, scratch: Path) -> dict:
    """Write one overlay and convert it several times; returns medians, and the highest peak."""
    model = Model(SHAPES[args.shape], layers, args.vocab)
    needed, free = max_disk_bytes(form, model, args.tier), shutil.disk_usage(scratch).free
    if free < needed:
        sys.exit(f"{scratch}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    overlay = scratch / "overlay"
    try:
        write_overlay(overlay, form, model)
        runs = list(repeat(overlay, scratch / "tier", args))
    finally:
        shutil.rmtree(overlay, ignore_errors=True)
    found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    found["peak"] = max(run["peak"] for run in runs)
    found["rate"] = found["source"] / found["seconds"] / 1e9
    found["trits_rate"] = found["trits"] / found["expert_seconds"] / 1e9
    found["trits_cost"] = found["expert_cpu_seconds"] / found["trits"] * 1e9
    found["cores"] = found["cpu_seconds"] / found["seconds"]
    return {"form": form, "layers": layers} | found


HEADER = (
    "form      layers  source   tier     time     a layer  source   experts  core-s    cores"
    "  peak    load\n"
    "                  GB       GB       s        s        GB/s     Gtrit/s  a Gtrit   busy"
    "   MB"
)


def line(found: dict) -> str:
    """A row of the table."""
    return (
        f"{found['form']:9} {found['layers']:<7} {found['source'] / 1e9:<8.2f}"
        f" {found['written'] / 1e9:<8.2f} {found['seconds']:<8.1f}"
        f" {found['seconds'] / found['layers']:<8.2f} {found['rate']:<8.2f}"
        f" {found['trits_rate']:<8.2f} {found['trits_cost']:<9.2f} {found['cores']:<6.2f}"
        f" {found['peak'] / 1e6:<7.0f} {found['load']:.1f}"
    )


def run(args: argparse.Namespace) -> None:
    """Run all measurements and print the table."""
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.work) as scratch:
        print(
            f"shape {args.shape}, vocab {args.vocab}, recipe {args.tier}, {os.cpu_count()} cores,"
            f" {args.repeat} runs each: medians, and the highest peak without the imports' memory\n"
            f"{HEADER}",
            flush=True,
        )
        for form in args.form:
            for layers in layer_counts(form, args, shutil.disk_usage(scratch).free):
                results.append(bench(form, layers, args, Path(scratch)))
                print(line(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line; `--child OVERLAY OUT` measures one conversion."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="14b", choices=list(SHAPES))
    parser.add_argument("--form", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--layers", nargs="+", type=int, help="default: 1, 2, 4 ... while they fit")
    parser.add_argument("--vocab", type=int, default=SMALL_VOCAB, help="Qwen2.5: 152064")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tier", default="q4", choices=["q4", "q8", "bf16", "f16", "f32"])
    parser.add_argument("--work", type=Path, help="folder for the temporary files")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        overlay, out = args.child
        print(json.dumps(measure(overlay, out, args.tier)))
    else:
        # Remove the temporary files also if a signal ends the process.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run(args)


if __name__ == "__main__":
    main()
