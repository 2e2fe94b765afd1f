"""Metal kernels, each in one file, and their emulator, which is not in the wheel."""
