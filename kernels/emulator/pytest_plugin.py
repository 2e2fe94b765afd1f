"""The fixture `virtual_metal`, for `pytest_plugins = ["kernels.emulator.pytest_plugin"]`."""

from collections.abc import Iterator

import pytest

from .virtual import VirtualMetal
from .virtual import virtual_metal as emulated


@pytest.fixture
def virtual_metal() -> Iterator[VirtualMetal]:
    """Runs the Metal kernels of a test on the CPU; yields the `VirtualMetal` with all launches."""
    with emulated() as metal:
        yield metal
