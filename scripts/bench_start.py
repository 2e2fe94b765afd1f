"""How long a short `outlier-mlx generate` takes beside `mlx_lm.generate`, from start to end.

    python scripts/bench_start.py [TIER] [--runs 15] [--tokens 20]

Both commands generate the same text from the same tier (without TIER: the demo's, made first), in
turns, so that a busy machine slows both. Printed are medians, and the median of the ratios of
neighbouring runs: of wall time, and of CPU time (user and system), which depends less on what else
the machine does. The first pair warms the disk's cache and is not counted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

PROMPT = "The schooner"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Run:
    """Seconds of one run of a command."""

    wall: float
    cpu: float


def run(command: list[str]) -> tuple[Run, str]:
    """Run a command to its end; its times, and what it printed on stdout."""
    # Bytecode is kept, as that of an installed package is.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    begun = time.perf_counter()
    with subprocess.Popen(command, env=env, **pipes) as process:
        assert process.stdout is not None
        text = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begun
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return Run(wall, usage.ru_utime + usage.ru_stime), text


def measure(tier: Path, runs: int, tokens: int) -> tuple[list[Run], list[Run]]:
    """Times of both commands, in turns; the order changes from pair to pair."""
    options = ["--prompt", PROMPT, "--max-tokens", str(tokens)]
    commands = [
        [str(BIN / "outlier-mlx"), "generate", "--model", str(tier), *options],
        [str(BIN / "mlx_lm.generate"), "--model", str(tier), "--trust-remote-code", *options],
    ]
    found: tuple[list[Run], list[Run]] = ([], [])
    for number in range(runs + 1):
        texts = {}
        for which in (0, 1) if number % 2 else (1, 0):
            timed, texts[which] = run(commands[which])
            if number:
                found[which].append(timed)
        if texts[0].strip() not in texts[1]:
            sys.exit("the commands generated different texts")
    return found


def main() -> None:
    """Measure, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tier", type=Path, nargs="?", help="folder of a tier; default: the demo's")
    parser.add_argument("--runs", type=int, default=15, help="pairs that are counted")
    parser.add_argument("--tokens", type=int, default=20, help="tokens to generate")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tier = given.tier
        if tier is None:
            tier = Path(scratch) / "tier"
            subprocess.run(
                [BIN / "outlier-mlx", "demo", "--out", tier, "--quiet"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        ours, theirs = measure(tier, given.runs, given.tokens)
    for kind in ("wall", "cpu"):
        mine, other = ([getattr(one, kind) for one in timed] for timed in (ours, theirs))
        ratios = [a / b for a, b in zip(mine, other, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(
            f"{kind}: outlier-mlx {median(mine):.3f} s, mlx_lm {median(other):.3f} s, ratio"
            f" {median(ratios):.3f} (quartiles {low:.3f} to {high:.3f}, {len(ratios)} pairs)"
        )


if __name__ == "__main__":
    main()
