"""The command line: parse, call, print. No logic.

Modules of commands import what is heavy inside the commands, so that `--help` answers at once.
"""

from outlier_mlx.cli import making, measuring, running  # noqa: F401 - they register commands
from outlier_mlx.cli.app import app


def main() -> None:
    """The entry point of `outlier-mlx`."""
    app(prog_name="outlier-mlx")
