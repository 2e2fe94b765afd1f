"""Estimates of registers, of the threads that fit, and of the size of loops."""

import json

import mlx.core as mx
import pytest

from kernels.emulator import VirtualMetal
from kernels.emulator.__main__ import main
from kernels.emulator.cost import Cost
from kernels.emulator.registers import UNSEEN, threads

from . import sign_lanes
from .tools import launch

AT = 'uint i = thread_position_in_grid.x;\n#define UNROLL _Pragma("clang loop unroll(full)")\n'


def cost_of(metal: VirtualMetal, source: str) -> Cost:
    inputs = {
        "x": mx.ones((4096,)),
        "h": mx.ones((4096,), mx.float16),
        "b": mx.ones((4096,), mx.uint8),
        "l": mx.ones((4096,), mx.uint64),
        "s": mx.array([3, 4]),  # so small that it is in constant memory
    }
    launch(metal, AT + source, inputs, {"o": ((64,), mx.float32)})
    return metal.launches[-1].cost


# Loads keep their order, and the first one is needed last: so all values live at the same time.
BACKWARDS = """
    TYPE v[COUNT];
    UNROLL for (int k = 0; k < COUNT; k++) v[k] = FROM;
    float sum = 0.0f;
    UNROLL for (int k = COUNT - 1; k >= 0; k--) sum = fma(sum, 3.0f, float(v[k]));
    o[i] = sum;
"""
WIDTHS = [
    ("float", "x[i + 64 * k]", 2),
    ("half", "h[i + 64 * k]", 1),
    ("uchar", "b[i + 64 * k]", 1),
    ("ulong", "l[i + 64 * k]", 4),
    ("float2", "*(const device float2*)(x + 2 * i + 64 * k)", 4),
    ("float", "float(s[0] + k)", 0),  # the same for all threads
]


@pytest.mark.parametrize(("kind", "loaded", "width"), WIDTHS)
def test_widths(virtual_metal: VirtualMetal, kind: str, loaded: str, width: int) -> None:
    """Registers of 16 bits that one more value takes."""
    source = BACKWARDS.replace("TYPE", kind).replace("FROM", loaded)
    if kind == "float2":
        source = source.replace("float(v[k])", "v[k].x * v[k].y")
    few, many = (cost_of(virtual_metal, source.replace("COUNT", str(n))).registers for n in (4, 12))
    assert many - few == 8 * width


def test_counted_by_hand(virtual_metal: VirtualMetal) -> None:
    """Eight floats, the index that also the store needs, and the base of the loads."""
    source = BACKWARDS.replace("TYPE", "float").replace("FROM", "x[i + 64 * k]")
    cost = cost_of(virtual_metal, source.replace("COUNT", "8"))
    assert cost.registers == 8 * 2 + 2 + UNSEEN


def test_values_wait_until_they_are_needed(virtual_metal: VirtualMetal) -> None:
    """Values that are computed early in the source, from one that lives anyway."""
    source = """
        float v[8], one = x[i], sum = 0.0f;
        UNROLL for (int k = 0; k < 8; k++) v[k] = sqrt(one + float(k));
        UNROLL for (int k = 7; k >= 0; k--) sum = fma(sum, one, v[k]);
        o[i] = sum;
    """
    assert cost_of(virtual_metal, source).registers <= 8 + UNSEEN


def test_sums_of_a_loop(virtual_metal: VirtualMetal) -> None:
    source = """
        float sums[COUNT] = {};
        for (uint at = i; at < 1024; at += 32) {
            UNROLL for (int k = 0; k < COUNT; k++) sums[k] = fma(x[at], x[at + k], sums[k]);
        }
        float all = 0.0f;
        UNROLL for (int k = 0; k < COUNT; k++) all = fma(all, 3.0f, sums[k]);
        o[i] = all;
    """
    few, many = (cost_of(virtual_metal, source.replace("COUNT", n)).registers for n in ("4", "12"))
    assert many - few == 16


def test_threads_of_a_core() -> None:
    fits = {104: 1024, 112: 896, 135: 768, 139: 704, 155: 640, 185: 512, 223: 448, 255: 384}
    assert {registers: threads(registers) for registers in fits} == fits
    assert threads(105) == 896 and threads(1000) == 384


LOOP = "for (uint at = i; at < s[0]; at += 32) { BODY } o[i] = sum;"


def test_bytes_of_loops(virtual_metal: VirtualMetal) -> None:
    """Eight for an fma; a loop that contains another does not count."""

    def bytes_of(body: str) -> int:
        return cost_of(virtual_metal, "float sum = 0.0f;" + LOOP.replace("BODY", body)).loop_bytes

    def steps(count: int) -> str:
        return f"UNROLL for (int k = 0; k < {count}; k++) sum = fma(sum, sum, 3.0f);"

    small, large = bytes_of(steps(10)), bytes_of(steps(40))
    assert large - small == 30 * 8
    inner = f"for (uint to = at; to < s[1]; to++) {{ {steps(10)} }} {steps(40)}"
    assert small <= bytes_of(inner) < large
    two = f"for (uint to = 0; to < s[1]; to++) {{ {steps(10)} }} {steps(40)}"
    assert bytes_of(two) == bytes_of(two + two)
    assert cost_of(virtual_metal, "o[i] = x[i];").loop_bytes == 0


def test_several_launches_need_the_most_of_them(virtual_metal: VirtualMetal) -> None:
    many, few = (
        cost_of(virtual_metal, source) for source in ("o[i] = x[i] + x[i + 1];", "o[i] = 1.0f;")
    )
    assert many.registers > few.registers
    assert (few + many).registers == many.registers


@pytest.mark.parametrize("counted", sign_lanes.COUNTED)
def test_strided_rows_need_what_machine_code_did(
    virtual_metal: VirtualMetal, counted: sign_lanes.Counted
) -> None:
    cost = sign_lanes.product(virtual_metal, counted.tokens, counted.rows)[2].cost
    assert cost.registers == pytest.approx(counted.registers, abs=2)
    assert cost.threads == counted.threads
    assert cost.loop_bytes == pytest.approx(counted.loop_bytes, rel=0.015)


def test_command(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    body = tmp_path_factory.mktemp("kernel") / "scale.metal"
    body.write_text("uint i = thread_position_in_grid.x; y[i] = 2.0f * x[i];")
    command = [str(body), "--input", "x=float32:64", "--output", "y=float32:64", "--grid", "64,1,1"]
    assert main(command) == 0
    assert "registers of 16 bits, so 1024 threads a core" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["threads"] == 1024 and found["loop_bytes"] == 0
    assert UNSEEN < found["registers"] < UNSEEN + 8
