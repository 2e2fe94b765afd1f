"""Measure a model with `outlier-mlx bench` and `doctor`, and keep figures with where they are from.

    python scripts/figures.py TIER --out FOLDER

Other options are those of `bench`. FOLDER gets machine.json (chip, macOS, MLX, commit), and the
JSON that each command prints. Kernels are measured, too, and checked against plain MLX, where there
is a GPU that computes correctly.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import probe_metal

from outlier_mlx.engine.chips import this_chip
from outlier_mlx.measure.environment import environment

ROOT = Path(__file__).parents[1]


def machine(usable: bool, about: str) -> dict[str, Any]:
    """Where the figures are from.

    Args:
        usable: whether there is a GPU that computes correctly.
        about: its name, or why it does not.
    """
    return {
        **environment(this_chip()),
        "gpu": {"usable": usable, "about": about},
        "system": platform.platform(),
        "macos": platform.mac_ver()[0] or None,
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit that is checked out, with a "+" if files were changed; None without git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def measure(model: Path, out: Path, kernels: bool, options: list[str]) -> int:
    """Run the commands; the first exit code that is not 0.

    Args:
        model: the model's folder.
        out: gets a .json of each command.
        kernels: whether kernels are measured.
        options: further options of `bench`.
    """
    bench = ["bench", "--model", str(model), *options]
    commands = {"doctor": ["doctor", str(model)], "bench": bench}
    if kernels:
        commands["kernels"] = [*bench, "--kernels"]
    status = 0
    for name, command in commands.items():
        with (out / f"{name}.json").open("wb") as file:
            program = [sys.executable, "-m", "outlier_mlx", *command, "--json"]
            done = subprocess.run(program, stdout=file)
        status = status or done.returncode
    return status


def main() -> None:
    """Write the folder; the exit code is that of the first command that fails."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args, options = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    usable, about = probe_metal.probe()
    text = json.dumps(machine(usable, about), indent=2)
    (args.out / "machine.json").write_text(text + "\n", encoding="utf-8")
    sys.exit(measure(args.model, args.out, usable, options))


if __name__ == "__main__":
    main()
