"""Clean virtual environments, as on a machine that never saw this project."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.program import run_command

# What would lead a program back to this checkout.
_LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def make_environment(folder: Path, *requirements: str) -> Path:
    """A new virtual environment with these requirements from the package index; its Python."""
    run_command(sys.executable, "-m", "venv", folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    # Python compiles what is used; all of transformers takes half a minute.
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run_command(*pip, "--no-compile", *requirements, env=clean_variables())
    return python


def pinned(*packages: str) -> list[str]:
    """Requirements for the versions that are installed here."""
    return [f"{name}=={version(name.split('[')[0])}" for name in packages]


def mlx_package() -> str:
    """What MLX is called here: with its CPU backend on Linux."""
    return "mlx" if sys.platform == "darwin" else "mlx[cpu]"


def clean_variables() -> dict[str, str]:
    """This process's environment without what points back here; no hub is asked."""
    kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    return kept | {"HF_HUB_OFFLINE": "1"}


def run(*command: Any, cwd: Path) -> str:
    """Run a program elsewhere than in the checkout, and give what it prints; stderr if it fails."""
    return run_command(*command, cwd=cwd, env=clean_variables()).out
