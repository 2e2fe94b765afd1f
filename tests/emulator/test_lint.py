"""What Metal's compiler would reject is rejected here, by name."""

import mlx.core as mx
import pytest

from kernels.emulator import LintError, VirtualMetal

from .tools import launch, numbers

AT = "uint i = thread_position_in_grid.x; "

MISTAKES = {
    "mixed address spaces": (
        "threadgroup float b[4]; threadgroup float* p = b; p = o; b[0] = p[0];",
        "assigning .*device float.* to .*threadgroup float.* changes address space",
    ),
    "device pointer given as a threadgroup one": (
        "take(o);",
        "no matching function for call to 'take'",
    ),
    "pointer without an address space": (
        "float* p = o; p[0] = 1;",
        "pointer type must have an explicit address space: 'float\\*'",
    ),
    "reference without an address space": (
        "const float& r = o[0]; o[1] = r;",
        "reference type must have an explicit address space: 'float&'",
    ),
    "unknown function": (AT + "o[i] = erf(x[i]);", "use of undeclared identifier 'erf'"),
    "a function of OpenCL's": (
        "o[get_global_id(0)] = x[0];",
        "undeclared identifier 'get_global_id'",
    ),
    "a function of C's": (AT + "o[i] = fabsf(x[i]);", "undeclared identifier 'fabsf'"),
    "wrong vector width": (
        "float4 v = float2(x[0], x[1]); o[0] = v.x;",
        "no viable conversion from .*vec<float, 2>.* to .*vec<float, 4>",
    ),
    "too few components": ("o[0] = float4(x[0], x[1]).x;", "no matching constructor"),
    "component that is not there": ("o[0] = float2(x[0]).z;", "no member named 'z'"),
    "vector of another type": (
        "float4 v = int4(1); o[0] = v.x;",
        "no viable conversion from .*vec<int, 4>.* to .*vec<float, 4>",
    ),
    "narrowing to half": ("half h = x[0] * 3; o[0] = h;", "implicit conversion loses floating"),
    "narrowing to bfloat": ("bfloat h = x[0]; o[0] = h;", "implicit conversion loses floating"),
    "narrowing to an integer": ("int n = x[0]; o[n] = 1;", "implicit conversion turns floating"),
    "narrowing to char": (AT + "char c = i * 3; o[i] = c;", "implicit conversion loses integer"),
    "narrowing in braces": ("half2 h = {x[0], x[1]}; int n[1] = {x[0]}; o[n[0]] = h.x;", "narrow"),
    "misspelt buffer": ("o[0] = xs[0];", "use of undeclared identifier 'xs'"),
    "write to an input": ("x[0] = o[0];", "read-only|cannot assign|const"),
    "too much threadgroup memory": (
        "threadgroup float b[8193]; b[thread_index_in_threadgroup] = 1; "
        "threadgroup_barrier(mem_flags::mem_threadgroup); o[0] = b[0];",
        "32772 bytes of threadgroup memory; a threadgroup has 32768",
    ),
    "too much private memory": (
        "float z[40000]; for (int j = 0; j < 40000; j++) z[j * 7 % 40000] = x[j % 32];\n"
        "o[0] = z[int(x[3])];",
        "160000 bytes of private memory",
    ),
    "no such fma": (
        "half h = half(x[0]); o[0] = fma(h, x[1], x[2]);",
        "call to 'fma' is ambiguous",
    ),
    "ambiguous max": (AT + "o[i] = max(i, 3);", "call to 'max' is ambiguous"),
    "as_type of another size": ("o[0] = as_type<float>(half(1));", "two types of the same size"),
    "half from bfloat": ("half h = bfloat(1); o[0] = h;", "incompatible|cannot initialize"),
    "program scope variable": ("o[0] = COUNT;", "must reside in constant address space"),
    "a condition that is an assignment": ("int n = 3; if (n = 2) o[0] = 1;", "as a condition"),
    "a result that is not used": ("o[0]; o[1] = 1;", "result unused"),
    "double": ("double d = 1; o[0] = float(d);", "poisoned"),
    # Before Metal 4.1, such an object was in `thread` without saying so.
    "an object that may be anywhere": (
        "Held held; held.value = x[0]; o[0] = held.get();",
        "binding reference of type 'thread float' to value of type 'float' changes address space",
    ),
    "function pointer": ("float (*f)(float) = nullptr; o[0] = f(1);", "pointers to functions"),
}
HEADERS = {
    "device pointer given as a threadgroup one": "void take(threadgroup float* p) { p[0] = 1; }\n",
    "program scope variable": "static int COUNT = 3;\n",
    "an object that may be anywhere": (
        "struct Held { float value; thread float& get() { return value; } };\n"
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_rejects(virtual_metal: VirtualMetal, mistake: str) -> None:
    source, message = MISTAKES[mistake]
    with pytest.raises(LintError, match=message) as caught:
        launch(virtual_metal, source, {"x": mx.ones((32,))}, header=HEADERS.get(mistake, ""))
    assert "tried" in str(caught.value) or "kernel:" in str(caught.value)
    assert virtual_metal.launches == []


def test_says_where(virtual_metal: VirtualMetal) -> None:
    with pytest.raises(LintError) as caught:
        launch(virtual_metal, "int a = 1;\n\no[a] = nothing;\n")
    text = str(caught.value)
    assert "kernel:" in text and "o[a] = nothing;" in text


def test_accepts_what_metal_has(virtual_metal: VirtualMetal) -> None:
    header = """
        constant constexpr float TABLE[4] = {0.5f, 1.5f, 2.5f, 3.5f};
        template <typename U, int N> METAL_FUNC U total(const thread U* v) {
          U sum = 0;
          MLX_MTL_PRAGMA_UNROLL for (int i = 0; i < N; i++) { sum += v[i]; }
          return sum;
        }
        struct Pair {
          float a;
          float b;
          float both() const thread { return a + b; }
        };
        inline void fill(threadgroup float* to, const device float* from, uint i) {
          to[i] = from[i];
        }
        inline void swap_in(thread float& a, device float& b) { float t = a; a = b; b = t; }
    """
    source = """
        uint i = thread_position_in_grid.x;
        threadgroup float shared[32], other[2][4];
        threadgroup vec<half, 4> quads[8];
        fill(shared, x, i);
        if (i < 8) { other[i / 4][i % 4] = float(i); quads[i] = half4(half(i)); }
        threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
        float4 v = *(const device float4*)(x + (i & ~3u));
        v.xy += v.zw * 2;
        v.wzyx = v;
        half2 h = as_type<half2>(as_type<uint>(half2(1.0h, 2.0h)));
        packed_float3 p = packed_float3(1.0f, 2.0f, 3.0f);
        Pair pair = {v.x, float3(p).z};
        float values[4] = {v.x, v.y, v.z, v.w};
        auto twice = [&](float y) { return 2.0f * y; };
        float r = total<float, 4>(values) + pair.both() + float(h.y) + TABLE[i % 4] + p[1];
        r += twice(shared[31 - i]) + other[1][2] + float(quads[i % 8].w) + float(0.25bf);
        float old = r;
        swap_in(r, o[i]);
        r = metal::fast::exp(0.0f) + metal::precise::sqrt(4.0f) + select(0.0f, 1.0f, i > 3);
        bool4 big = v > float4(1e30);
        o[i] = any(big) ? 0 : old + r + clamp(float(i), 1.0f, 2.0f) + float(popcount(i));
    """
    x = mx.arange(32).astype(mx.float32)
    (o,) = launch(virtual_metal, source, {"x": x}, header=header)
    for i, got in enumerate(numbers(o)):
        a, b, c, d = range(i & ~3, (i & ~3) + 4)
        v = [d, c, b + 2 * d, a + 2 * c]
        r = sum(v) + v[0] + 3 + 2 + (0.5 + i % 4) + 2
        r += 2 * (31 - i) + 6 + i % 8 + 0.25
        assert got == r + 3 + (i > 3) + min(max(i, 1), 2) + i.bit_count()
