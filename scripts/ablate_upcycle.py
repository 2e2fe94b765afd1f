"""Train small overlays on the demo's base, each with one setting changed, and print a table.

    python scripts/ablate_upcycle.py --work ./ablations

Each row is one ``outlier-mlx upcycle``, of which the changed options are shown; the options that
all have are printed first. Rows that are done are not trained again. With a system's OpenBLAS in
``LD_PRELOAD``, it takes half an hour on a slow core; without, far longer.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import demo_text
from demo_corpora import write_corpora

BASE = Path(__file__).resolve().parents[1] / "outlier_mlx" / "demo" / "base"
COMMON = (
    "--layers 1-3 --window 96 --batch 9 --learning-rate 0.25 --held-out 0.01 --no-grad-checkpoint"
)
STEPS = "--steps 40 --joint-steps 40"
ROWS = {
    "as described": STEPS,
    "begin with nothing": f"{STEPS} --init nothing",
    "absmean scales": f"{STEPS} --scales absmean",
    "no straight-through stage": f"{STEPS} --no-straight-through",
    "2 experts a domain": f"{STEPS} --experts-per-domain 2",
    "4 experts a domain": f"{STEPS} --experts-per-domain 4",
    "4 small experts a domain": f"{STEPS} --experts-per-domain 4 --expert-size 64",
    "stickiness 0.3": f"{STEPS} --stickiness 0.3",
    "no joint stage": "--steps 40 --joint-steps 0",
    "joint stage trains weights": f"{STEPS} --joint-weights",
    "only a joint stage, of weights": "--steps 0 --joint-steps 120 --joint-weights",
}


def events(log: Path) -> list[dict[str, Any]]:
    """The lines of a training's log."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def run(options: str, texts: Path, out: Path) -> list[dict[str, Any]]:
    """Train an overlay, unless that was done before; the events of its training."""
    log = out.with_suffix(".jsonl")
    if log.exists() and events(log)[-1:] and events(log)[-1]["event"] == "done":
        return events(log)
    given = [f"--domain={d}={texts / f'{d}.jsonl'}" for d in demo_text.NEW_DOMAINS]
    keep = f"--keep={texts / 'old.jsonl'}"
    options = f"{COMMON} {options} --json --force"
    command = [sys.executable, "-m", "outlier_mlx", "upcycle", str(BASE), *given, keep]
    with log.open("w", encoding="utf-8") as file:
        subprocess.run([*command, f"--out={out}", *shlex.split(options)], stdout=file, check=True)
    return events(log)


def row(name: str, options: str, found: list[dict[str, Any]]) -> str:
    """A row of the table."""
    stages = [event for event in found if event["event"] == "stage"]
    done, last = found[-1], stages[-1]
    of_domains = [f"{done['after'][domain]:.1f}" for domain in demo_text.NEW_DOMAINS]
    change = done["after"]["keep"] / done["before"]["keep"] - 1
    rate = f"{100 * last['hit_rate']:.0f} %" if "hit_rate" in last else "–"
    cells = [name, f"`{options}`", *of_domains, f"{100 * change:+.1f} %", rate]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse the command line, train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for texts and overlays")
    args = parser.parse_args()
    texts = args.work / "texts"
    if not texts.exists():
        write_corpora(texts, 3000)
    print(f"options of all rows: {COMMON}\n")
    heads = ["", "options", *demo_text.NEW_DOMAINS, "keep", "hit rate"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for number, (name, options) in enumerate(ROWS.items()):
        print(row(name, options, run(options, texts, args.work / f"row{number}")), flush=True)


if __name__ == "__main__":
    main()
