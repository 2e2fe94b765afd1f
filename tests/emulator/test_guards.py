"""Each guard, with a kernel that breaks it."""

from typing import Any

import mlx.core as mx
import pytest

from kernels.emulator import (
    ArithmeticFault,
    BarrierError,
    Divergence,
    EmulatorError,
    Misaligned,
    OutOfBounds,
    RaceError,
    VirtualMetal,
)

from .tools import launch

AT = "uint i = thread_position_in_grid.x; "
BYTES = AT + "device char* c = (device char*)o; o[i] = 0; "

BROKEN: dict[str, tuple[type[EmulatorError], str, str]] = {
    "one element read behind": (
        OutOfBounds,
        AT + "o[i] = x[i + 1];",
        r"thread \(31, 0, 0\) of threadgroup \(0, 0, 0\) read x at byte 128; it has 128 bytes",
    ),
    "one element read before": (
        OutOfBounds,
        AT + "o[i] = x[int(i) - 1];",
        r"thread \(0, 0, 0\) of threadgroup \(0, 0, 0\) read x at byte -4; it has 128 bytes",
    ),
    "one byte written behind": (
        OutOfBounds,
        BYTES + "if (i == 7) c[128] = 1;",
        r"thread \(7, 0, 0\) .* wrote o at byte 128; it has 128 bytes",
    ),
    "one byte written before": (
        OutOfBounds,
        BYTES + "if (i == 9) c[-1] = 1;",
        r"thread \(9, 0, 0\) .* wrote o at byte -1; it has 128 bytes",
    ),
    "one byte read behind a buffer of odd size": (
        OutOfBounds,
        AT + "o[i] = odd[i == 5 ? 37 : 0];",
        r"thread \(5, 0, 0\) .* read odd at byte 37; it has 37 bytes",
    ),
    "half of a vector behind": (
        OutOfBounds,
        AT + "float4 v = *(const device float4*)(ten + (i == 31 ? 8 : 0)); o[i] = v.x + v.w;",
        r"thread \(31, 0, 0\) .* read ten at byte 4[0-7]; it has 40 bytes",
    ),
    "far away": (
        OutOfBounds,
        AT + "o[i] = x[i == 3 ? 1u << 31 : 0];",
        r"thread \(3, 0, 0\) .* accessed memory far from any buffer, at byte 85\d+ of \w+ .*line 5",
    ),
    "a constant behind its buffer": (
        OutOfBounds,
        AT + "o[i] = few[i == 6 ? 3 : 0];",
        r"thread \(6, 0, 0\) .* read few at byte 12; it has 12 bytes",
    ),
    "an input written": (
        OutOfBounds,
        AT + "o[i] = 0; if (i == 2) ((device float*)x)[4] = 1;",
        r"thread \(2, 0, 0\) .* wrote the input x at byte 16",
    ),
    "threadgroup memory behind": (
        OutOfBounds,
        AT + "threadgroup float b[32]; b[i] = x[i]; o[i] = b[i + 1];",
        r"read threadgroup array 0 at byte 128; it has 128 bytes",
    ),
    "a misaligned vector": (
        Misaligned,
        AT + "o[i] = ((const device float2*)(x + (i == 4 ? 3 : 0)))->x;",
        r"thread \(4, 0, 0\) .* accessed x at byte 12, which is not a multiple",
    ),
    "a simd operation in a branch": (
        Divergence,
        AT + "o[i] = 0;\nif (i < 20) o[i] = simd_sum(x[i]);",
        r"0-19 wait at a simd operation \(line 6: `if \(i < 20\).*`\); 20-31 have returned",
    ),
    "two different simd operations": (
        Divergence,
        AT + "float v;\nif (i % 2) v = simd_sum(x[i]);\nelse v = simd_max(x[i]);\no[i] = v;",
        r"0, 2, 4, .* wait at a simd operation \(line 7.*\); 1, 3, .* wait at .* \(line 6",
    ),
    "a lane that left": (
        Divergence,
        AT + "if (i == 13) return;\no[i] = simd_sum(x[i]);",
        r"0-12, 14-31 wait at a simd operation .*; 13 have returned",
    ),
    "a lane that is not there": (
        Divergence,
        AT + "o[i] = simd_shuffle(x[i], ushort(i + 1));",
        r"lane 31 .* reads the value of a lane that its simdgroup of 32 threads does not have",
    ),
    "a simd barrier in a branch": (
        Divergence,
        AT + "o[i] = 0; if (i > 2) simdgroup_barrier(mem_flags::mem_none);",
        r"0-2 have returned; 3-31 wait at a simd operation",
    ),
    "integers divided by zero": (
        ArithmeticFault,
        AT + "o[i] = float(int(i + 5) / (few[1] - 2));",
        "divided an integer by zero",
    ),
    "a write that all threads race for": (
        RaceError,
        AT + "o[i] = 0; o[5] = x[i];",
        r"o\[5\] depends on the order of threads",
    ),
    "a missing barrier": (
        RaceError,
        AT + "threadgroup float b[32]; b[i] = x[i]; o[i] = b[31 - i];",
        r"o\[\d+\] depends on the order of threads",
    ),
    "a sum without atomics": (
        RaceError,
        AT + "o[i] = 0; simdgroup_barrier(mem_flags::mem_device);\no[0] = o[0] + x[i] / 3;",
        r"o\[0\] depends on the order of threads",
    ),
    "a wait that never ends": (
        EmulatorError,
        "while (atomic_load_explicit(&o[0], memory_order_relaxed) != 3.0f) {}\n"
        "atomic_store_explicit(&o[0], 1.0f, memory_order_relaxed);",
        "waits at an atomic for something that never happens",
    ),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_guard(virtual_metal: VirtualMetal, mistake: str) -> None:
    kind, source, message = BROKEN[mistake]
    inputs = {
        "x": mx.arange(1, 33).astype(mx.float32),
        "few": mx.array([1, 2, 3]),
        "ten": mx.zeros((10,)),
        "odd": mx.zeros((37,), mx.uint8),
    }
    used = {name: array for name, array in inputs.items() if name in source}
    atomic = "atomic" in source
    with pytest.raises(kind, match=message) as caught:
        launch(virtual_metal, source, used, atomic_outputs=atomic, call={"init_value": 0})
    assert "tried" in str(caught.value) and type(caught.value) is kind
    # The process is none the worse.
    (o,) = launch(virtual_metal, AT + "o[i] = float(i);")
    assert o.tolist() == list(range(32))


def test_barriers(virtual_metal: VirtualMetal) -> None:
    half: dict[str, Any] = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1)}
    broken = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    with pytest.raises(BarrierError, match=r"0-31 wait at a barrier .*; 32-63 have returned"):
        launch(virtual_metal, AT + f"o[i % 32] = 0; if (i < 32) {broken}", **half)
    with pytest.raises(BarrierError, match=r"0-31 wait .*line 4.*; 32-63 wait .*line 5"):
        launch(
            virtual_metal, AT + f"o[i % 32] = 0; if (i < 32) {{ {broken} }}\nelse {broken}", **half
        )


def test_a_race_between_simdgroups(virtual_metal: VirtualMetal) -> None:
    # Written for the next step before everybody has read this one's.
    source = """
        threadgroup float b[2];
        uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
        if (lane == 0) b[group] = x[group];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float other = b[1 - group];
        BARRIER
        if (lane == 0) b[group] = 100;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        o[group * 32 + lane] = other + b[1 - group];
    """
    call: dict[str, Any] = {
        "grid": (64, 1, 1),
        "threadgroup": (64, 1, 1),
        "outputs": {"o": ((64,), mx.float32)},
    }
    x = mx.array([1.0, 2.0])
    with pytest.raises(RaceError):
        launch(virtual_metal, source.replace("BARRIER", ""), {"x": x}, **call)
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    (o,) = launch(virtual_metal, source.replace("BARRIER", barrier), {"x": x}, **call)
    assert o.tolist() == [102.0] * 32 + [101.0] * 32


def test_offset_base_pointers(virtual_metal: VirtualMetal) -> None:
    rows = mx.arange(64).astype(mx.float32).reshape(4, 16)
    source = "uint i = thread_position_in_grid.x; o[i] = rows[size_t(indices[0]) * 16 + i % 16];"
    index = 2**28  # of a row: 2**34 bytes in, 2**32 elements
    virtual_metal.base_offsets = {"rows": index * 64}
    (o,) = launch(virtual_metal, source, {"rows": rows, "indices": mx.array([index + 2])})
    assert o.tolist() == [float(32 + i % 16) for i in range(32)]
    with pytest.raises(OutOfBounds, match=r"read rows at byte (256|316); it has 256 bytes"):
        launch(virtual_metal, source, {"rows": rows, "indices": mx.array([index + 4])})
    wrong = source.replace("size_t(indices[0])", "uint(indices[0])")  # 32 bits are not enough
    with pytest.raises(OutOfBounds, match="far from any buffer"):
        launch(virtual_metal, wrong, {"rows": rows, "indices": mx.array([index + 2])})
