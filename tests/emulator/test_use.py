"""The fixture, the command and the cache."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import (
    CompilerMissing,
    EmulatorError,
    VirtualMetal,
    mlx_kernels,
    virtual_metal,
)
from kernels.emulator import compiler as compilers
from kernels.emulator.__main__ import main

from .tools import launch

ROOT = Path(__file__).parents[2]
BODY = "uint i = thread_position_in_grid.x; o[i] = T(N) * x[i];"
SUM = """
#include <metal_stdlib>
using namespace metal;
template <typename T, int N>
[[kernel]] void total(
    const device T* x [[buffer(0)]],
    device float* o [[buffer(1)]],
    const constant int& n [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  float sum = 0;
  for (int k = 0; k < n; k++) {
    sum += float(x[i * uint(n) + uint(k)]) * N;
  }
  o[i] = sum;
}
"""


def test_metal_is_there_only_inside() -> None:
    real = mx.fast.metal_kernel, mx.metal.is_available
    before = mx.metal.is_available()
    with virtual_metal(count=False) as metal:
        assert mx.metal.is_available() is True
        kernel: Any = mx.fast.metal_kernel("late", ["x"], ["o"], BODY)
        launch(metal, "o[thread_position_in_grid.x] = 1;")
        with pytest.raises(EmulatorError, match="virtual_metal\\(count=True\\)"):
            _ = metal.launches[0].cost
    assert (mx.fast.metal_kernel, mx.metal.is_available) == real
    assert mx.metal.is_available() is before
    (late,) = kernel(  # made inside, called later
        inputs=[mx.ones((4,))], template=[("T", mx.float32), ("N", 3)], grid=(4, 1, 1),
        threadgroup=(4, 1, 1), output_shapes=[(4,)], output_dtypes=[mx.float32],
    )  # fmt: skip
    assert late.tolist() == [3.0] * 4


def test_the_record(virtual_metal: VirtualMetal) -> None:
    for n in (2, 3):
        call = {"template": [("T", mx.float32), ("N", n)]}
        launch(virtual_metal, BODY, {"x": mx.ones((32,))}, call=call)
    assert virtual_metal.names == ["tried", "tried"]
    one, two = virtual_metal.launches
    assert one.template["N"] == 2 and two.template["N"] == 3
    assert one.inputs == {"x": ((32,), mx.float32)} and one.outputs == {"o": ((32,), mx.float32)}
    assert one.threadgroup == (32, 1, 1)
    assert one.cost.read["x"] == one.cost.written["o"] == 128
    virtual_metal.clear()
    assert virtual_metal.launches == []


def test_a_gathered_product_takes_seconds() -> None:
    weight = mx.random.normal((2, 512, 5120), key=mx.random.key(1)).astype(mx.float16)
    packed = mx.quantize(weight, group_size=128, bits=2)
    x = mx.random.normal((1, 5120), key=mx.random.key(2)).astype(mx.float16)
    indices = mx.array([[1]], dtype=mx.uint32)
    mlx_kernels.gather_qmv(x, *packed, indices, group_size=128, bits=2)  # compiles
    start = time.perf_counter()
    mlx_kernels.gather_qmv(x, *packed, indices, group_size=128, bits=2)
    assert time.perf_counter() - start < 5


def test_command_on_the_body_of_a_kernel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scale.metal"
    file.write_text(BODY)
    arguments = [str(file), "--input", "x=float16:64", "--output", "o=float16:64"]
    arguments += ["--template", "T=float16", "--template", "N=3", "--grid", "64,1,1"]
    assert main([*arguments, "--weights", "64", "--weight", "x", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["read"] == {"x": 128, "o": 0} and found["written"]["o"] == 128
    assert found["instructions"]["float arithmetic"] == 2
    assert found["per_weight"] == {"main": 1.0, "second": 0.0, "bytes": 2.0, "loads": 1.0}
    assert main(arguments) == 0
    assert "float arithmetic" in capsys.readouterr().out
    file.write_text(BODY.replace("x[i]", "y[i]"))
    assert main(arguments) == 1
    assert "undeclared identifier 'y'" in capsys.readouterr().err


def test_command_on_metal_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "total.metal"
    file.write_text(SUM)
    arguments = [str(file), "--kernel", "total<half, 2>"]
    assert main(arguments) == 0
    assert "no errors" in capsys.readouterr().err
    arguments += ["--input", "x=float16:32x10", "--input", "n=int32@10", "--output", "o=float32:32"]
    assert main([*arguments, "--grid", "32,1,1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["read"]["x"] == 640 and found["loads"]["x"] == 10
    assert main([*arguments[:-2], "--grid", "32,1,1"]) == 1
    assert "no --input or --output for o" in capsys.readouterr().err


def test_compiled_kernels_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "scale.metal"
    file.write_text(BODY)
    command = [sys.executable, "-m", "kernels.emulator", str(file), "--input", "x=float32:32"]
    command += ["--output", "o=float32:32", "--template", "T=float32", "--template", "N=3"]
    command += ["--grid", "32,1,1", "--json"]
    folder = tmp_path / "cache"
    environment = os.environ | {"KERNEL_EMULATOR_CACHE": str(folder)}
    seen = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        seen.append((done.stdout, files))
    assert seen[0] == seen[1]
    assert not [path for path in folder.iterdir() if path.name.startswith("new-")]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL_EMULATOR_CLANG", "true")
    with pytest.raises(CompilerMissing, match="KERNEL_EMULATOR_CLANG=true is not clang"):
        compilers._system_clang()


def test_slices(virtual_metal: VirtualMetal) -> None:
    # A contiguous slice starts inside its array; the kernel may not look before it.
    whole = mx.arange(64).astype(mx.float32)
    source = "uint i = thread_position_in_grid.x; o[i] = x[i];"
    (o,) = launch(virtual_metal, source, {"x": whole[32:]})
    assert np.array_equal(np.array(o), np.arange(32, 64))
