"""Price rules that were confirmed by machine code, each with a tiny kernel."""

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import VirtualMetal

from . import sign_lanes
from .tools import launch

AT = "uint i = thread_position_in_grid.x;\n"


def classes(metal: VirtualMetal, source: str, header: str = "") -> dict[str, int]:
    """The instructions of one simdgroup, beyond loads and stores."""
    inputs = {
        "u": mx.arange(1, 65).astype(mx.uint32),
        "b": mx.arange(4096).astype(mx.uint8),
        "x": mx.ones((4096,), mx.float16),
    }
    launch(metal, AT + source, inputs, {"o": ((128,), mx.uint32)}, header=header)
    found = metal.launches[-1].cost.instructions
    return {kind: n for kind, n in found.items() if not kind.startswith("device")}


ONE = [
    "~a & 0xC000C000u",
    "(a & 0xC000C000u) ^ 0xC000C000u",
    "~a | 0xC000C000u",
    "~(a & 0xC000C000u)",
    "(a & 0xC000C000u) | 0x3FFF3FFFu",
    "a & ~c",
    "~(a | c)",
    "~(a ^ c)",
    "(a & ~c) | (~a & c)",
    "(a | c) & ~(a & c)",
]
MORE = {
    "(a & 0xFFu) | 0x100u": 2,  # two different masks
    "(a & c) ^ 0xFFu": 2,  # three values
    "(a & c) + (~a & c)": 2,
}


def test_functions_of_two_values(virtual_metal: VirtualMetal) -> None:
    got = {}
    for text in [*ONE, *MORE]:
        found = classes(virtual_metal, f"uint a = u[i], c = u[i + 32]; o[i] = {text};")
        got[text] = found.get("bitwise", 0)
        assert not set(found) - {"bitwise", "integer add"}
    assert got == {text: MORE.get(text, 1) for text in got}


def test_functions_of_two_values_in_vectors(virtual_metal: VirtualMetal) -> None:
    """One instruction for each component, also if a mask is not known to the compiler."""
    source = "uint2 a = uint2(u[i], u[i + 1]), r = ~a & MASK; o[i] = r.x; o[i + 64] = r.y;"
    for mask in ("0xC000C000u", "u[0]"):
        assert classes(virtual_metal, source.replace("MASK", mask))["bitwise"] == 2


def test_a_chain_whose_middle_is_needed(virtual_metal: VirtualMetal) -> None:
    source = "uint a = u[i], d = a & 0xFF00u; o[i] = d; o[i + 64] = d ^ 0xFF00u;"
    assert classes(virtual_metal, source)["bitwise"] == 2


LOADS = "uint at = 4 * i; uint s = 0; for (int r = 0; r < 8; r++) s += LOAD; o[i] = s;"


def test_constant_offsets_of_vectors(virtual_metal: VirtualMetal) -> None:
    """A vector is loaded by way of a cast of its address; it costs what a scalar does."""
    row = "b + at + 256 * r"
    scalar = LOADS.replace("LOAD", f"*(const device uint*)({row})")
    vector = LOADS.replace("LOAD", f"as_type<uint>(ushort4(*(const device uchar4*)({row})).xy)")
    one, two = (classes(virtual_metal, source) for source in (scalar, vector))
    assert one["address"] == two["address"] == 3  # the base and the index; the rest are constants
    assert one == two


def test_a_constant_offset_of_one_vector(virtual_metal: VirtualMetal) -> None:
    load = (
        "half4 v = *(const device half4*)(x + 4 * i + OFFSET); o[i] = uint(as_type<ushort>(v.x));"
    )
    for offset, additions in (("0", 0), ("1024", 1)):
        found = classes(virtual_metal, load.replace("OFFSET", offset))
        assert found.get("address", 0) == additions


def test_bytes_in_registers_of_their_own(virtual_metal: VirtualMetal) -> None:
    """Four bytes are loaded into four registers of 16 bits; two of these are a 32-bit register."""
    source = "ushort4 w = ushort4(*(const device uchar4*)(b + 4 * i)); "
    source += "o[i] = as_type<uint>(w.xy); o[i + 64] = as_type<uint>(w.zw);"
    assert not {"bitwise", "shift", "unpack merged bytes"} & set(classes(virtual_metal, source))
    assert virtual_metal.launches[-1].cost.loads["b"] == 1
    times = source.replace("w.xy)", "w.xy) * 192u")
    assert classes(virtual_metal, times)["integer multiply"] == 1


def test_half_of_a_vector_of_bytes(virtual_metal: VirtualMetal) -> None:
    """LLVM loads two registers of 16 bits instead, so the bytes have to be taken out of these."""
    source = "uchar4 w = *(const device uchar4*)(b + 4 * i); "
    source += "o[i] = as_type<uint>(ushort2(w.xy)); o[i + 64] = as_type<uint>(ushort2(w.zw));"
    assert classes(virtual_metal, source)["bitwise"] == 4


@pytest.mark.parametrize(("apart", "merged"), [(4, 2), (8, 0), (128, 0)])
def test_adjacent_loads_of_bytes_are_merged(
    virtual_metal: VirtualMetal, apart: int, merged: int
) -> None:
    source = f"""
        const device uchar4* one = (const device uchar4*)(b + 8 * i);
        const device uchar4* two = (const device uchar4*)(b + 8 * i + {apart});
        o[i] = as_type<uint>(ushort4(*one).xy) + as_type<uint>(ushort4(*two).xy);
    """
    assert classes(virtual_metal, source).get("unpack merged bytes", 0) == merged


def test_half_operands(virtual_metal: VirtualMetal) -> None:
    source = "half2 a = as_type<half2>(~u[i] & 0xC000C000u); "
    source += "o[i] = as_type<uint>(fma(float(a.x), float(x[i]), float(a.y)));"
    assert classes(virtual_metal, source) == {"bitwise": 1, "float arithmetic": 1}


def test_times_three(virtual_metal: VirtualMetal) -> None:
    source = "uint c = u[i] & 0x3FFF3FFFu; c += c << 1; o[i] = c;"
    assert classes(virtual_metal, source) == {"bitwise": 1, "integer add": 1}
    # A factor of 3 with a shift that an addition does not do is one multiplication.
    assert classes(virtual_metal, "o[i] = u[i] * 192u;") == {"integer multiply": 1}


def test_what_is_the_same_for_all_threads_costs_nothing(virtual_metal: VirtualMetal) -> None:
    """It is computed once, before the launch."""
    uniform = "uint n = threads_per_grid.x * 5 / 3; "
    assert classes(virtual_metal, uniform + "o[i] = u[i] + n;") == {"integer add": 1}
    assert classes(virtual_metal, uniform + "o[i] = n * n;") == {}
    group = uniform.replace("threads_per_grid", "threadgroup_position_in_grid")
    assert "integer divide by a constant" in classes(virtual_metal, group + "o[i] = u[i] + n;")


@pytest.mark.parametrize("counted", sign_lanes.COUNTED)
def test_sign_lanes_cost_what_machine_code_did(
    virtual_metal: VirtualMetal, counted: sign_lanes.Counted
) -> None:
    got, exact, made = sign_lanes.product(virtual_metal, counted.tokens, counted.rows)
    assert np.abs(got - exact).max() <= 1e-5 * np.abs(exact).max()
    one = made.cost.per_weight(sign_lanes.N * sign_lanes.K, ("rows", "scales"))
    assert one.main == pytest.approx(counted.main, rel=0.03)
    if counted.tokens == 1:
        assert one.second == pytest.approx(0.41, abs=0.02)
