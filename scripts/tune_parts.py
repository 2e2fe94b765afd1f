"""Table of docs/tune.md: what tuning each part of the embedded pair's int4 tier gives.

The divergence from the tier's unquantized twin on held-out windows, before and after. Text is that
of the grammar which the base was trained on. Takes a few minutes; on Linux, with OpenBLAS:

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 python scripts/tune_parts.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import demo_text

DEMO = Path(__file__).parent.parent / "outlier_mlx" / "demo"
ROWS = ("alphas", "rows", "routers", "base", "alphas,rows,routers,base")
OPTIONS = "--window 128 --windows 30 --batch 4 --learning-rate 0.004 --epochs 1"
SEED, NBYTES = 7, 25_000


def text(seed: int = SEED, nbytes: int = NBYTES) -> str:
    """Stories of the base's training text, `nbytes` characters or a little more."""
    found = ""
    for story in demo_text.documents("old", seed):
        if len(found) >= nbytes:
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "stories.txt").write_text(text(), encoding="utf-8")
        pair = f"convert {DEMO / 'overlay'} --base {DEMO / 'base'}"
        program(folder, f"{pair} --out my-tier --quiet")
        program(folder, f"{pair} --tier f32 --out twin --quiet")
        print("| `--parts` | steps | KL before | KL after | change | seconds |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for parts in rows:
            command = f"tune my-tier --teacher twin --text stories.txt --parts {parts} {OPTIONS}"
            began = time.monotonic()
            figures = json.loads(program(folder, f"{command} --out tuned --force --json --quiet"))
            before, after = (figures[when]["kl"] for when in ("before", "after"))
            print(
                f"| `{parts}` | 6 | {before:.4f} | {after:.4f} | {after / before - 1:+.1%} |"
                f" {time.monotonic() - began:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
