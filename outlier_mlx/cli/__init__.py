"""The command line: parse, call, print. No logic.

Modules of commands import what is heavy inside the commands, so that `--help` answers at once.
"""

import io
import sys

from outlier_mlx.cli import (  # noqa: F401 - they register commands
    evaluating,
    making,
    measuring,
    running,
    sharing,
)
from outlier_mlx.cli.app import app


def main() -> None:
    """The entry point of `outlier-mlx`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Text that the terminal's encoding does not have must not end a generation.
        sys.stdout.reconfigure(errors="replace")
    app(prog_name="outlier-mlx")
