"""The command line: parse, call, print. No logic.

Modules of commands import what is heavy inside the commands, so that `--help` answers at once.
"""

import io
import sys

try:
    # They register their commands, in the order in which the program's help lists them.
    # isort: off
    from outlier_mlx.cli import making, upcycling, tuning, running, serving, keeping  # noqa: F401
    from outlier_mlx.cli import measuring, studying, diagnosing, evaluating, sharing  # noqa: F401

    # isort: on
    from outlier_mlx.cli.app import app
except KeyboardInterrupt:  # Ctrl-C before there is an app that could tell it
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def main() -> None:
    """The entry point of `outlier-mlx`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Text that the terminal's encoding does not have must not end a generation.
        sys.stdout.reconfigure(errors="replace")
    app(prog_name="outlier-mlx")
