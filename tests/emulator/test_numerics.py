"""Arithmetic rounds as IEEE says, half and bfloat after each operation."""

import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import VirtualMetal

from .tools import launch, numbers

AT = "uint i = thread_position_in_grid.x; "


def test_every_half_and_bfloat(virtual_metal: VirtualMetal) -> None:
    source = (
        AT
        + """
        ushort bits = ushort(i);
        wide[i] = float(as_type<half>(bits));
        back[i] = as_type<ushort>(half(wide[i] * 1.0f));
        bwide[i] = float(as_type<bfloat>(bits));
        bback[i] = as_type<ushort>(bfloat(bwide[i] * 1.0f));
    """
    )
    source = source.replace("wide[i] * 1.0f", "float(as_type<half>(bits))", 1).replace(
        "bfloat(bwide[i] * 1.0f)", "bfloat(float(as_type<bfloat>(bits)))"
    )
    n = 1 << 16
    outputs = {
        "wide": ((n,), mx.float32), "back": ((n,), mx.uint16),
        "bwide": ((n,), mx.float32), "bback": ((n,), mx.uint16),
    }  # fmt: skip
    wide, back, bwide, bback = (
        np.array(a)
        for a in launch(virtual_metal, source, {}, outputs, grid=(n, 1, 1), threadgroup=(256, 1, 1))
    )
    bits = np.arange(n).astype(np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    assert np.array_equal(wide, expected, equal_nan=True)
    real = ~np.isnan(expected)
    assert np.array_equal(back[real], bits[real])
    assert np.isnan(back[~real].view(np.float16)).all()
    bexpected = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(bwide, bexpected, equal_nan=True)
    real = ~np.isnan(bexpected)
    assert np.array_equal(bback[real], bits[real])


def test_rounding_to_nearest_even(virtual_metal: VirtualMetal) -> None:
    # Half way between two halves, and one float beside it, over the whole range.
    halves = np.arange(0, 0x7C00, 7).astype(np.uint16).view(np.float16).astype(np.float64)
    upper = np.arange(1, 0x7C01, 7).astype(np.uint16)
    upper[-1] = min(upper[-1], 0x7BFF)
    middle = ((halves + upper[: len(halves)].view(np.float16).astype(np.float64)) / 2).astype(
        np.float32
    )
    around = [middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(0))]
    x = np.concatenate([*around, [65519.0, 65520.0, 1e30, -1e-8, -0.0]]).astype(np.float32)
    source = AT + "h[i] = half(x[i]); b[i] = bfloat(x[i]);"
    outputs = {"h": (x.shape, mx.float16), "b": (x.shape, mx.bfloat16)}
    h, b = launch(virtual_metal, source, {"x": mx.array(x)}, outputs, grid=(x.size, 1, 1))
    with np.errstate(over="ignore"):
        assert np.array_equal(np.array(h), x.astype(np.float16))
    assert np.array_equal(numbers(b), numbers(mx.array(x).astype(mx.bfloat16)))


def test_each_operation_rounds(virtual_metal: VirtualMetal) -> None:
    generator = np.random.default_rng(7)
    a, b, c = (generator.normal(size=4096).astype(np.float16) for _ in range(3))
    source = (
        AT
        + """
        h[i] = a[i] * b[i] + c[i];
        f[i] = fma(a[i], b[i], c[i]);
        d[i] = a[i] / b[i] - c[i];
        half4 v = half4(a[i], b[i], c[i], a[i]);
        v = v * v + v;
        w[i] = v.y;
        bfloat p = bfloat(float(a[i])), q = bfloat(float(b[i]));
        g[i] = p * q + q;
        x[i] = float(a[i]) * float(b[i]) + float(c[i]);
    """
    )
    outputs = dict.fromkeys(("h", "f", "d", "w"), ((4096,), mx.float16))
    outputs |= {"g": ((4096,), mx.bfloat16), "x": ((4096,), mx.float32)}
    inputs = {"a": mx.array(a), "b": mx.array(b), "c": mx.array(c)}
    h, f, d, w, g, x = launch(virtual_metal, source, inputs, outputs, grid=(4096, 1, 1))
    with np.errstate(all="ignore"):
        assert np.array_equal(np.array(h), a * b + c)
        exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        assert np.array_equal(np.array(f), exact.astype(np.float16))
        assert not np.array_equal(np.array(f), a * b + c)  # so the one above does not fuse
        assert np.array_equal(np.array(d), a / b - c)
        assert np.array_equal(np.array(w), b * b + b)
        f32 = [v.astype(np.float32) for v in (a, b, c)]
        assert np.array_equal(np.array(x), f32[0] * f32[1] + f32[2])
    p, q = (mx.array(v).astype(mx.bfloat16) for v in (a, b))
    assert mx.array_equal(g, p * q + q)


FUNCTIONS: dict[str, tuple[Any, float, float]] = {
    "exp": (np.exp, -20, 20), "exp2": (np.exp2, -20, 20), "log": (np.log, 1e-3, 100),
    "log2": (np.log2, 1e-3, 100), "log10": (np.log10, 1e-3, 100), "sin": (np.sin, -9, 9),
    "cos": (np.cos, -9, 9), "tan": (np.tan, -1, 1), "asin": (np.arcsin, -1, 1),
    "acos": (np.arccos, -1, 1), "atan": (np.arctan, -9, 9), "sinh": (np.sinh, -5, 5),
    "cosh": (np.cosh, -5, 5), "tanh": (np.tanh, -5, 5), "asinh": (np.arcsinh, -9, 9),
    "acosh": (np.arccosh, 1, 9), "atanh": (np.arctanh, -0.9, 0.9), "sqrt": (np.sqrt, 0, 100),
    "rsqrt": (lambda v: 1 / np.sqrt(v), 1e-3, 100), "floor": (np.floor, -9, 9),
    "ceil": (np.ceil, -9, 9), "rint": (np.rint, -9, 9), "trunc": (np.trunc, -9, 9),
    "abs": (np.abs, -9, 9), "fabs": (np.abs, -9, 9), "exp10": (lambda v: 10**v, -5, 5),
    "fract": (lambda v: v - np.floor(v), -9, 9), "sign": (np.sign, -9, 9),
    "saturate": (lambda v: np.clip(v, 0, 1), -2, 2), "sinpi": (lambda v: np.sin(np.pi * v), -3, 3),
    "cospi": (lambda v: np.cos(np.pi * v), -3, 3),
    "round": (lambda v: np.trunc(v + np.copysign(0.5, v)), -9, 9),
}  # fmt: skip


def test_functions(virtual_metal: VirtualMetal) -> None:
    n = 512
    rows = [np.linspace(low, high, n) for _, low, high in FUNCTIONS.values()]
    x = mx.array(np.stack(rows).astype(np.float32))
    lines = []
    for k, name in enumerate(FUNCTIONS):
        lines.append(f"o[{k} * {n} + i] = metal::{name}(x[{k} * {n} + i]);")
        lines.append(f"h[{k} * {n} + i] = metal::precise::{name}(half(x[{k} * {n} + i]));")
    outputs = {"o": (x.shape, mx.float32), "h": (x.shape, mx.float16)}
    o, h = launch(virtual_metal, AT + "\n".join(lines), {"x": x}, outputs, grid=(n, 1, 1))
    given = numbers(x)
    for k, (name, (function, _, _)) in enumerate(FUNCTIONS.items()):
        assert np.allclose(numbers(o)[k], function(given[k]), rtol=1e-6, atol=2e-6), name
        # half(x) and the rounding of the result are one step of half precision each.
        with np.errstate(all="ignore"):
            expected = function(given[k].astype(np.float16).astype(np.float64)).astype(np.float16)
        assert np.allclose(numbers(h)[k], expected, rtol=2**-10, atol=2**-24), name


def test_functions_of_two(virtual_metal: VirtualMetal) -> None:
    a = mx.array(np.linspace(0.1, 9, 64).astype(np.float32))
    b = mx.array(np.linspace(-3, 3, 64).astype(np.float32))
    cases: dict[str, Any] = {
        "pow(a[i], b[i])": lambda x, y: x**y,
        "atan2(b[i], a[i])": lambda x, y: np.arctan2(y, x),
        "fmod(a[i], 0.7f)": lambda x, y: np.fmod(x, np.float32(0.7)),
        "max(a[i], b[i]) - min(a[i], b[i])": lambda x, y: np.abs(x - y),
        "copysign(a[i], b[i])": np.copysign,
        "mix(a[i], b[i], 0.25f)": lambda x, y: x + (y - x) * 0.25,
        "clamp(b[i], -1.0f, 2.0f)": lambda x, y: np.clip(y, -1, 2),
        "fma(a[i], b[i], 1.0f)": lambda x, y: x * y + 1,
        "dot(float3(a[i], b[i], 1), float3(2, 3, 4))": lambda x, y: 2 * x + 3 * y + 4,
        "length(float2(a[i], b[i]))": np.hypot,
        "ldexp(a[i], 3)": lambda x, y: x * 8,
        "select(a[i], b[i], b[i] > 0)": lambda x, y: np.where(y > 0, y, x),
        "step(0.5f, b[i]) + smoothstep(0.0f, 1.0f, 0.5f)": lambda x, y: (y >= 0.5) + 0.5,
    }
    body = AT + "\n".join(f"o[{k} * 64 + i] = {text};" for k, text in enumerate(cases))
    (o,) = launch(
        virtual_metal, body, {"a": a, "b": b}, {"o": ((len(cases), 64), mx.float32)},
        grid=(64, 1, 1),
    )  # fmt: skip
    x, y = numbers(a), numbers(b)
    for row, (text, function) in zip(numbers(o), cases.items(), strict=True):
        assert np.allclose(row, function(x, y), rtol=1e-6, atol=1e-6), text


def test_integers(virtual_metal: VirtualMetal) -> None:
    x = np.random.default_rng(2).integers(0, 2**32, 64, np.uint32)
    x[:3] = [0, 1, 2**32 - 1]
    cases = {
        "popcount(x[i])": [int(v).bit_count() for v in x],
        "clz(x[i])": [32 - int(v).bit_length() for v in x],
        "ctz(x[i])": [(int(v) & -int(v)).bit_length() - 1 if v else 32 for v in x],
        "reverse_bits(x[i])": [int(f"{int(v):032b}"[::-1], 2) for v in x],
        "mulhi(x[i], 0x9E3779B9u)": [int(v) * 0x9E3779B9 >> 32 for v in x],
        "rotate(x[i], 7u)": [(int(v) << 7 | int(v) >> 25) % 2**32 for v in x],
        "extract_bits(x[i], 5, 9)": [int(v) >> 5 & 511 for v in x],
        "insert_bits(x[i], 3u, 4, 8)": [int(v) & ~0xFF0 | 0x30 for v in x],
        "addsat(x[i], 0x80000000u)": [min(int(v) + 2**31, 2**32 - 1) for v in x],
        "absdiff(x[i], 1000u)": [abs(int(v) - 1000) for v in x],
        "uint(uchar(x[i])) + (x[i] << 3 >> 5)": [
            (int(v) % 256 + ((int(v) << 3) % 2**32 >> 5)) % 2**32 for v in x
        ],
    }
    body = AT + "\n".join(f"o[{k} * 64 + i] = {text};" for k, text in enumerate(cases))
    (o,) = launch(
        virtual_metal, body, {"x": mx.array(x)}, {"o": ((len(cases), 64), mx.uint32)},
        grid=(64, 1, 1),
    )  # fmt: skip
    for row, (text, expected) in zip(np.array(o), cases.items(), strict=True):
        assert row.tolist() == expected, text


@pytest.mark.slow
def test_without_help_from_the_processor() -> None:
    """The same on a machine without half instructions, switching stacks by the C library."""
    environment = os.environ | {"KERNEL_EMULATOR_PORTABLE": "1"}
    chosen = "every_half or nearest_even or rounds or reductions or guard"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/emulator", "-q", "-k", chosen, "-m", "not slow"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_choice_among_many_values(virtual_metal: VirtualMetal) -> None:
    """clang makes a switch of it, whose cases are lines of their own in the IR."""
    cases = " ".join(f"case {n}: o[i] = {n}.5f * x[31 - i]; break;" for n in range(1, 9))
    source = AT + f"switch (i) {{ {cases} default: o[i] = x[i] - 2.0f; }}"
    x = np.arange(32, dtype=np.float32)
    (found,) = launch(virtual_metal, source, {"x": mx.array(x)})
    expected = np.where((x >= 1) & (x < 9), (x + 0.5) * (31 - x), x - 2)
    np.testing.assert_array_equal(found, expected)
