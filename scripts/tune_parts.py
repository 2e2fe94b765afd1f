"""Table of docs/tune.md: what tuning each part of the embedded pair's int4 tier gives.

The divergence from the tier's unquantized twin on held-out windows, before and after. Text is new
stories from the grammar of the base's training text. Takes some minutes; on Linux, with OpenBLAS:

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 python scripts/tune_parts.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import demo_text

from outlier_mlx.measure.tuning import split

DEMO = Path(__file__).parent.parent / "outlier_mlx" / "demo"
ROWS = ("alphas,rows,routers,base", "base", "rows", "routers", "alphas")
WINDOWS, BATCH = 30, 2
OPTIONS = f"--window 128 --windows {WINDOWS} --batch {BATCH} --learning-rate 0.004 --epochs 1"


def stories(seed: int = 7, length: int = 25_000) -> str:
    """New stories like those that the base was trained on, `length` characters or a few more."""
    found = ""
    for story in demo_text.documents("old", seed):
        if len(found) >= length:
            break
        found += " ".join(story) + "\n\n"
    return found


def program(folder: Path, command: str) -> str:
    """Run a command of outlier-mlx; what it prints. A tune that is not better exits with 1."""
    words = [sys.executable, "-m", "outlier_mlx", *command.split()]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if not done.stdout and done.returncode:
        sys.exit(f"{command}: {done.stderr}")
    return done.stdout


def main() -> None:
    """Print the table, a row after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=ROWS, help="rows; default: all")
    rows = parser.parse_args().parts
    steps = -(-len(split([[]] * WINDOWS)[0]) // BATCH)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "stories.txt").write_text(stories(), encoding="utf-8")
        for tier, out in (("q4", "my-tier"), ("f32", "twin")):
            pair = f"{DEMO / 'overlay'} --base {DEMO / 'base'}"
            program(folder, f"convert {pair} --tier {tier} --out {out}")
        print("| `--parts` | steps | KL before | KL after | change |")
        print("| --- | ---: | ---: | ---: | ---: |", flush=True)
        for parts in rows:
            command = f"tune my-tier --teacher twin --parts {parts} --text stories.txt {OPTIONS}"
            figures = json.loads(program(folder, f"{command} --out tuned --force --json"))
            before, after = (figures[when]["kl"] for when in ("before", "after"))
            change = f"{after / before - 1:+.1%}"
            print(f"| `{parts}` | {steps} | {before:.4f} | {after:.4f} | {change} |", flush=True)


if __name__ == "__main__":
    main()
