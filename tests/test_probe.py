"""scripts/probe_metal.py: a GPU is called usable only if its results are right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from kernels.emulator import VirtualMetal
from tests.program import load_script, run_command

probe_metal = load_script("probe_metal")


def test_what_a_gpu_should_compute(virtual_metal: VirtualMetal, monkeypatch: pytest.MonkeyPatch):
    assert probe_metal.wrong_result() is None
    assert virtual_metal.names == ["probe"]
    make = virtual_metal.metal_kernel

    def computing_nothing(**arguments: Any) -> Callable[..., list[mx.array]]:
        kernel = make(**arguments)
        return lambda **call: [0 * y for y in kernel(**call)]

    monkeypatch.setattr(mx.fast, "metal_kernel", computing_nothing)
    assert probe_metal.wrong_result() == "a custom kernel computed [0.0, 0.0, 0.0] and so on"


def test_without_a_device():
    done = run_command(sys.executable, probe_metal.__file__, code=1)
    assert done.out == "MLX finds no Metal device\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("pass", (True, "Apple M1")),
        ("sys.exit('it computed 0')", (False, "Apple M1: it computed 0")),
        ("os.abort()", (False, "Apple M1: ended with -6")),
        ("time.sleep(60)", (False, "Apple M1: a launch did not end within 2 s")),
    ],
)
def test_what_is_said_of_a_device(
    program: str, found: tuple[bool, str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    """Launches end in every way in which they may."""
    file = tmp_path / "launch.py"
    file.write_text(f"import os, sys, time\nassert sys.argv[1:] == ['--launch']\n{program}\n")
    monkeypatch.setattr(probe_metal, "__file__", str(file))
    monkeypatch.setattr(probe_metal, "SECONDS", 2)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: {"device_name": "Apple M1"})
    assert probe_metal.probe() == found
