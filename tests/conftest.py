"""Fixtures for every test, and what keeps tests apart from their user's settings."""

import os

pytest_plugins = ["kernels.emulator.pytest_plugin"]

# No kernel variants that were chosen on this machine.
os.environ["OUTLIER_MLX_KERNELS"] = ""

# A terminal's own width counts, not what a parent process has exported.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
