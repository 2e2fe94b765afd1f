"""The kernel that is run is the one that MLX generates, with MLX's own checks."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import LaunchError, VirtualMetal

from .tools import launch, numbers

DTYPES = [
    mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64,
    mx.float16, mx.float32, mx.bfloat16, mx.complex64,
]  # fmt: skip


def test_templates_headers_and_constants(virtual_metal: VirtualMetal) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        T y = T(scaled(float(x[i])) * a + few[i % 3]) + T(N);
        o[i] = FLIP ? -y : y;
    """
    x = mx.arange(40).astype(mx.float16)
    few = mx.array([1.0, 2.0, 3.0])
    (o,) = launch(
        virtual_metal,
        source,
        {"x": x, "a": mx.array(0.5), "few": few},
        {"o": ((40,), mx.bfloat16)},
        grid=(40, 1, 1),
        header="inline float scaled(float v) { return v * 4; }\n",
        call={"template": [("T", mx.bfloat16), ("N", 7), ("FLIP", True)]},
    )
    expected = -(np.arange(40) * 2 + np.array([1, 2, 3])[np.arange(40) % 3] + 7)
    assert np.array_equal(numbers(o), expected)  # all of them small enough for bfloat16
    record = virtual_metal.launches[0]
    assert record.name == "tried" and record.grid == (40, 1, 1)
    assert record.template == {"T": mx.bfloat16, "N": 7, "FLIP": True}
    text = record.kernel.text
    assert "const constant float& a [[buffer(1)]]" in text
    assert "const constant float* few" in text and "const device float16_t* x" in text


def test_every_dtype(virtual_metal: VirtualMetal) -> None:
    source = "uint i = thread_position_in_grid.x;\n"
    source += "\n".join(f"o{n}[i] = x{n}[i];" for n in range(len(DTYPES)))
    raw = np.random.default_rng(3).integers(0, 2, (len(DTYPES), 40))
    arrays = [mx.array(row).astype(dtype) for row, dtype in zip(raw, DTYPES, strict=True)]
    outputs = launch(
        virtual_metal,
        source,
        {f"x{n}": array for n, array in enumerate(arrays)},
        {f"o{n}": ((40,), dtype) for n, dtype in enumerate(DTYPES)},
        grid=(40, 1, 1),
    )
    for array, output in zip(arrays, outputs, strict=True):
        assert output.dtype == array.dtype and mx.array_equal(array, output)


def test_every_thread_attribute(virtual_metal: VirtualMetal) -> None:
    vectors = [
        "thread_position_in_grid", "thread_position_in_threadgroup",
        "threadgroup_position_in_grid", "threads_per_threadgroup",
        "dispatch_threads_per_threadgroup", "threads_per_grid", "grid_size",
        "threadgroups_per_grid", "grid_origin",
    ]  # fmt: skip
    scalars = [
        "thread_index_in_threadgroup", "thread_index_in_simdgroup",
        "simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup",
        "dispatch_simdgroups_per_threadgroup", "thread_index_in_quadgroup",
        "quadgroup_index_in_threadgroup", "quadgroups_per_threadgroup",
        "dispatch_quadgroups_per_threadgroup",
        "threads_per_simdgroup", "thread_execution_width",
    ]  # fmt: skip
    per = 3 * len(vectors) + len(scalars)
    grid, group = (10, 6, 3), (4, 4, 2)  # the last threadgroups are smaller
    lines = ["uint3 p = thread_position_in_grid;"]
    lines.append(f"device uint* q = o + ((p.z * 6 + p.y) * 10 + p.x) * {per};")
    for n, name in enumerate(vectors):
        lines += [f"q[{3 * n + d}] = {name}.{'xyz'[d]};" for d in range(3)]
    lines += [f"q[{3 * len(vectors) + n}] = {name};" for n, name in enumerate(scalars)]
    (o,) = launch(
        virtual_metal,
        "\n".join(lines),
        outputs={"o": ((3, 6, 10, per), mx.uint32)},
        grid=grid,
        threadgroup=group,
    )
    seen = np.array(o)
    for z, y, x in np.ndindex(3, 6, 10):
        at = np.array([x, y, z])
        groups = at // group
        inside = at % group
        size = np.minimum(group, grid - groups * group)
        index = inside[0] + size[0] * (inside[1] + size[1] * inside[2])
        threads = int(size.prod())
        expected: list[Any] = [
            at, inside, groups, size, group, grid, grid, -(-np.array(grid) // group), [0, 0, 0],
        ]  # fmt: skip
        rest = [index, index % 32, index // 32, -(-threads // 32), 1, index % 4, index // 4,
                -(-threads // 4), 8, 32, 32]  # fmt: skip
        assert seen[z, y, x].tolist() == [int(v) for e in expected for v in e] + rest


def test_strided_inputs(virtual_metal: VirtualMetal) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        o[i] = x[elem_to_loc(int64_t(i), x_shape, x_strides, x_ndim)];
        s[i] = int(x_strides[i % 2]);
    """
    outputs = {"o": ((32,), mx.float32), "s": ((32,), mx.int32)}
    base = mx.arange(64).astype(mx.float32).reshape(8, 8)
    views = [
        base[:, ::2],  # gaps
        base[::-1, ::-2],  # backwards
        base[:4].T,  # transposed
        mx.broadcast_to(base[0, :4], (8, 4)),
    ]
    for view in views:
        for contiguous in (False, True):
            o, s = launch(
                virtual_metal, source, {"x": view}, outputs, ensure_row_contiguous=contiguous
            )
            assert mx.array_equal(o, view.flatten())
            if contiguous:
                assert s[:2].tolist() == [view.shape[1], 1]
    # What lies between the elements of a strided view belongs to it; what lies around does not.
    assert virtual_metal.launches[0].kernel.signature.buffers[0].name == "x"


def test_initial_values_atomic_outputs_and_python_numbers(virtual_metal: VirtualMetal) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&o[i % 4], int(x[i]) * n, memory_order_relaxed);
    """
    (o,) = launch(
        virtual_metal,
        source,
        {"x": mx.arange(64), "n": 3},
        {"o": ((4,), mx.int32)},
        grid=(64, 1, 1),
        atomic_outputs=True,
        call={"init_value": 5},
    )
    assert "atomic<int" in virtual_metal.launches[0].kernel.text
    assert o.tolist() == [5 + 3 * sum(range(k, 64, 4)) for k in range(4)]
    (empty,) = launch(
        virtual_metal, "if (thread_position_in_grid.x == 0) o[0] = x_shape[0];",
        {"x": mx.zeros((0, 3))}, {"o": ((1,), mx.float32)},
    )  # fmt: skip
    assert empty.item() == 0


def test_outputs_start_as_nan(virtual_metal: VirtualMetal) -> None:
    outputs = {f"o{n}": ((32,), d) for n, d in enumerate([mx.float32, mx.float16, mx.bfloat16])}
    source = (
        "uint i = thread_position_in_grid.x; if (i != 3) { o0[i] = 1; o1[i] = 1; o2[i] = T(1); }"
    )
    for one in launch(
        virtual_metal, source, outputs=outputs, call={"template": [("T", mx.bfloat16)]}
    ):
        assert np.flatnonzero(np.isnan(numbers(one))).tolist() == [3]


def test_rejected_calls(virtual_metal: VirtualMetal) -> None:
    with pytest.raises(ValueError, match=r"inputs"):
        kernel = virtual_metal.metal_kernel("tried", ["x", "y"], ["o"], "o[0] = x[0];")
        kernel(
            inputs=[mx.zeros((4,))],
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
    with pytest.raises(LaunchError, match="a threadgroup of 2048 threads; Metal allows 1024"):
        launch(virtual_metal, "o[0] = 1;", threadgroup=(1024, 2, 1))
    with pytest.raises(LaunchError, match="grid"):
        launch(virtual_metal, "o[0] = 1;", grid=(0, 1, 1))


def test_prints_when_asked(virtual_metal: VirtualMetal, capsys: pytest.CaptureFixture[str]) -> None:
    launch(virtual_metal, "o[thread_position_in_grid.x] = 1;", call={"verbose": True})
    printed = capsys.readouterr().out
    assert printed.startswith("Generated source code for `tried`:") and "[[kernel]]" in printed
