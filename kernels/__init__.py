"""Metal kernels, one a file, and their emulator (not in the wheel)."""
