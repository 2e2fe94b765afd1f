"""How fast a conversion is, and how much memory it takes, at the layer shapes of Qwen2.5-14B.

    python scripts/bench_convert.py [--vocab 152064] [--repeat 5] [--work FOLDER]

Writes an overlay of two MoE layers with eight experts each (3.4 GB of trits, and its base) into a
temporary folder, converts it in a fresh process several times, and removes everything again. The
source is read once beforehand, so that it comes from the page cache as far as memory allows.
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

from outlier_mlx.checkpoints.config import Defaults, parse_config
from outlier_mlx.checkpoints.keys import PROJECTIONS
from outlier_mlx.checkpoints.overlay import base_shapes
from outlier_mlx.storage.writer import ShardedWriter, TensorSpec

HIDDEN, FFN, HEADS, KV_HEADS = 5120, 13824, 40, 8
LAYERS, EXPERTS, TOP_K = 2, 8, 2
REAL_VOCAB = 152064
# The tensors repeat one random block: packing takes the same time whatever the trits are.
BLOCK_BYTES = 16 << 20
HEADROOM_BYTES = 1 << 30


def overlay_config(vocab: int) -> dict:
    """The config.json of the overlay."""
    return {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "n_experts": EXPERTS,
        "top_k": TOP_K,
    }


def overlay_specs(config: dict) -> list[TensorSpec]:
    """Every tensor of the overlay, its base (bfloat16) among them."""
    shapes = base_shapes(parse_config(config, Defaults()))
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        specs.append(TensorSpec(f"{mlp}.router.weight", "BF16", (EXPERTS, HIDDEN)))
        for expert in range(EXPERTS):
            for name in PROJECTIONS:
                shape = (HIDDEN, FFN) if name == "down" else (FFN, HIDDEN)
                prefix = f"{mlp}.experts.{expert}.{name}"
                specs.append(TensorSpec(f"{prefix}_ternary", "I8", shape))
                specs.append(TensorSpec(f"{prefix}_scale", "F16", (1,)))
    return specs


def write_overlay(folder: Path, vocab: int) -> None:
    """Write the overlay, and have it on disk and in the page cache."""
    config = overlay_config(vocab)
    specs = overlay_specs(config)
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, BLOCK_BYTES, dtype=np.int8)
    floats = rng.standard_normal(BLOCK_BYTES // 2, dtype=np.float32) * np.float32(0.02)
    bfloats = (floats.view(np.uint32) >> 16).astype(np.uint16)
    blocks = {
        "I8": trits.view(np.uint8),
        "BF16": bfloats.view(np.uint8),
        "F16": np.array([0.01], np.float16).view(np.uint8),
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with ShardedWriter(folder, specs) as writer:
        for spec in specs:
            for start in range(0, spec.nbytes, BLOCK_BYTES):
                size = min(BLOCK_BYTES, spec.nbytes - start)
                writer.write(spec.name, blocks[spec.dtype][:size].data)
        writer.finish()
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            while handle.read(BLOCK_BYTES):
                pass


def memory(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes; the peak for both where there is no /proc."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(overlay: Path, out: Path, tier: str) -> dict:
    """Convert once in this process; seconds by kind of part, and peak memory over the imports'."""
    from outlier_mlx.checkpoints import open_overlay
    from outlier_mlx.checkpoints.base import join
    from outlier_mlx.tiers.convert import convert_tier
    from outlier_mlx.tiers.plan import make_plan
    from outlier_mlx.tiers.presets import RECIPES

    recipe = RECIPES[tier]
    parts = make_plan(join(open_overlay(overlay), None), recipe).parts
    ends = list(accumulate(part.source_bytes for part in parts))
    # Wall time, and time of all threads: the second hardly depends on what else the machine does.
    seconds = {part.kind: np.zeros(2) for part in parts}
    last = np.zeros(2)

    def clocks() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    def progress(done: int, total: int) -> None:
        # Called once the bytes are read, packed, hashed and written.
        nonlocal last
        now = clocks()
        seconds[parts[bisect_left(ends, done)].kind] += now - last
        last = now

    # A bench has no tokenizer; that it is missing is not news.
    warnings.simplefilter("ignore")
    before = memory("VmRSS")
    begin = last = clocks()
    report = convert_tier(overlay, None, out, recipe=recipe, progress=progress)
    took, took_cpu = clocks() - begin
    total = report.rows[-1]
    trits = sum(part.source_bytes for part in parts if part.kind == "experts")
    return {
        "seconds": took,
        "cpu_seconds": took_cpu,
        "source": ends[-1],
        "trits": trits,
        "expert_seconds": seconds["experts"][0],
        "expert_cpu_seconds": seconds["experts"][1],
        "peak": memory("VmHWM") - before,
        "before": before,
        "written": sum(file.stat().st_size for file in out.iterdir()),
        "bits_per_weight": total.bits_per_weight,
    }


def repeat(overlay: Path, out: Path, args: argparse.Namespace) -> Iterator[dict]:
    """Measure in fresh processes."""
    for _ in range(args.repeat):
        load = os.getloadavg()[0]
        command = [sys.executable, __file__, "--tier", args.tier, "--child", overlay, out]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        shutil.rmtree(out)
        yield json.loads(done.stdout) | {"load": load}


def run(args: argparse.Namespace) -> None:
    """Write, measure, print, remove."""
    specs = overlay_specs(overlay_config(args.vocab))
    source = sum(spec.nbytes for spec in specs)
    weights = sum(prod(spec.shape) for spec in specs)
    # Unquantized tiers take at most 4 bytes a weight.
    needed = source + (weights if args.tier.startswith("q") else 4 * weights) + HEADROOM_BYTES
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.work) as scratch:
        free = shutil.disk_usage(scratch).free
        if free < needed:
            sys.exit(f"{scratch}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        overlay, out = Path(scratch) / "overlay", Path(scratch) / "tier"
        write_overlay(overlay, args.vocab)
        print(
            f"{source / 1e9:.2f} GB of source, {weights / 1e9:.2f} B parameters, vocab"
            f" {args.vocab}, recipe {args.tier}, {os.cpu_count()} cores"
        )
        runs = []
        for run in repeat(overlay, out, args):
            run["expert_rate"] = run["trits"] / run["expert_seconds"] / 1e9
            run["expert_cost"] = run["expert_cpu_seconds"] / run["trits"] * 1e9
            run["rate"] = run["source"] / run["seconds"] / 1e9
            runs.append(run)
            print(
                f"  experts {run['expert_rate']:.2f} GB/s ({run['expert_cost']:.2f} core-seconds"
                f" a GB), whole {run['rate']:.2f} GB/s in {run['seconds']:.1f} s, peak"
                f" {run['peak'] / 1e6:.0f} MB over {run['before'] / 1e6:.0f} MB, load before"
                f" {run['load']:.1f}",
                flush=True,
            )

    def middle(name: str) -> float:
        return statistics.median(run[name] for run in runs)

    print(
        f"experts: median {middle('expert_rate'):.2f} GB/s of trits, best"
        f" {max(run['expert_rate'] for run in runs):.2f};"
        f" {middle('expert_cost'):.2f} core-seconds a GB"
    )
    print(f"whole:   median {middle('rate'):.2f} GB/s of source, {middle('seconds'):.1f} s")
    print(f"memory:  at most {max(run['peak'] for run in runs) / 1e6:.0f} MB over the imports'")
    print(
        f"output:  {runs[0]['written'] / 1e9:.2f} GB, {runs[0]['bits_per_weight']:.2f} bits/weight"
    )


def main() -> None:
    """Parse the command line; `--child OVERLAY OUT` measures one conversion."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vocab", type=int, default=2048, help=f"Qwen2.5-14B: {REAL_VOCAB}")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tier", default="q4", choices=["q4", "q8", "bf16", "f16", "f32"])
    parser.add_argument("--work", type=Path, help="folder for the temporary files")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        overlay, out = args.child
        print(json.dumps(measure(overlay, out, args.tier)))
    else:
        # Ended by a signal, it removes its gigabytes as well.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run(args)


if __name__ == "__main__":
    main()
