"""What a launch costs: kernels counted by hand, and MLX's own."""

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import LaunchError, VirtualMetal, mlx_kernels
from kernels.emulator.cost import TABLE, Cost

from .tools import fresh, launch, numbers

AT = "uint i = thread_position_in_grid.x;\n"


def cost_of(metal: VirtualMetal, source: str, **arguments: object) -> Cost:
    launch(metal, source, **arguments)  # type: ignore[arg-type]
    return metal.launches[-1].cost


def test_counted_by_hand(virtual_metal: VirtualMetal) -> None:
    # A lane loads x ten times, at nine of them from i plus a constant, and a once; it does ten
    # fma, a shift, a mask, a conversion, a sum over lanes and an addition. The loop is unrolled.
    source = (
        AT
        + """
        float sum = 0.0f;
        uint w = a[i];
        for (int k = 0; k < 10; k++) {
            sum = fma(x[i + 64 * k], 3.0f, sum);
        }
        o[i] = simd_sum(sum) + float((w >> 6) & 0x03FC03FC);
    """
    )
    x, a = mx.ones((640,)), mx.arange(64).astype(mx.uint32)
    outputs = {"o": ((64,), mx.float32)}
    cost = cost_of(
        virtual_metal, source, inputs={"x": x, "a": a}, outputs=outputs, grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
    )  # fmt: skip
    two = 2  # simdgroups
    assert cost.instructions == {
        "bitwise": 1 * two,
        "device load": 11 * two,
        "device store": 1 * two,
        "float arithmetic": (10 + 1) * two,
        "integer add": 9 * two,
        "integer to float or back": 1 * two,
        "shift": 1 * two,
        "simd reduction": 1 * two,
    }
    assert cost.cycles.main == two * (1 + 11 + 9)
    assert cost.cycles.second == two * (4 + 4 + 15)
    assert cost.read == {"x": 2560, "a": 256, "o": 0} and cost.written["o"] == 256
    assert cost.requested == {"x": 2560, "a": 256} and cost.loads == {"x": 20, "a": 2}
    assert cost.launches == 1 and (cost + cost).read["x"] == 5120


def test_branches_cost_what_lanes_take(virtual_metal: VirtualMetal) -> None:
    source = (
        AT
        + """
        float v = x[i];
        if (CONDITION) {
            for (int k = 0; k < n[0]; k++) { v = sqrt(v + x[k]); }
        }
        o[i] = v;
    """
    )
    inputs = {"x": mx.ones((64,)), "n": mx.array([3])}
    counts = {}
    for condition in ("i == 5", "i % 2 == 0", "i < 32", "i < 64"):
        cost = cost_of(
            virtual_metal, source.replace("CONDITION", condition), inputs=inputs,
            outputs={"o": ((64,), mx.float32)}, grid=(64, 1, 1),
        )  # fmt: skip
        counts[condition] = cost.instructions["square root"]
    assert counts == {"i == 5": 3, "i % 2 == 0": 6, "i < 32": 3, "i < 64": 6}


def test_a_switch_is_a_chain_of_compares_and_branches(virtual_metal: VirtualMetal) -> None:
    source = (
        AT
        + """
        float v = x[i];
        switch (n[0]) {
            case 0: v = sqrt(v + x[1]); break;
            case 1: v = exp(v); break;
            case 5: v = x[i + 1] / v; break;
        }
        o[i] = v;
    """
    )
    inputs = {"x": mx.ones((64,)), "n": mx.array([5])}
    found = cost_of(virtual_metal, source, inputs=inputs).instructions
    assert found["branch"] == found["integer compare or select"] == 4
    assert found["float divide"] == 1 and "square root" not in found


PRICES = {
    # One lane's work beyond one load and one store: expression of u (uint) or v (float).
    "u + (u << 1)": {"integer add": 1},
    "u * 9": {"integer add": 1},
    "u * 11": {"integer multiply": 1},
    "u << 3": {"integer add": 1},
    "u << 5": {"shift": 1},
    "u & 0x0C000C00": {"bitwise": 1},
    "(u >> 4) & 15": {"shift": 1},
    "u * u": {"integer multiply": 1},
    "max(u, 7u)": {"integer compare or select": 1},
    "u > 5 ? u : 9": {"integer compare or select": 1},
    "uint(float(u) * 3.0f)": {"integer to float or back": 2, "float arithmetic": 1},
    "as_type<uint>(as_type<float>(u) * 2.5f + 1.0f)": {"float arithmetic": 1},
    "as_type<uint>(floor(as_type<float>(u)))": {"round to integer": 1},
    "as_type<uint>(rsqrt(as_type<float>(u)))": {"reciprocal square root": 1},
    "as_type<uint>(fma(float(as_type<half2>(u).x), 2.0f, float(as_type<half2>(u).y)))": {
        "float arithmetic": 1
    },
    "as_type<uint>(half2(as_type<half2>(u) * as_type<half2>(u)))": {"float arithmetic": 2},
    "uint(ulong(u) * ulong(u + 1) >> 32)": {
        "integer add": 1,
        "integer multiply, 32 x 32 to 64 bits": 1,
    },
    "u / 7": {"integer divide by a constant": 1},
    "simd_shuffle_xor(u, 1)": {"simd shuffle": 1},
    "simd_max(u)": {"simd reduction": 1},
    "u >> 15": {"shift": 1},
    "u >> 16": {"integer add": 1},  # a register's upper half, moved
    "uint(ushort(u >> 16)) + 1": {"integer add": 1},
    "reverse_bits(u)": {"bit count or reversal": 1},
}


def test_classes(virtual_metal: VirtualMetal) -> None:
    wrong: dict[str, object] = {}
    for text, expected in PRICES.items():
        cost = cost_of(
            virtual_metal, AT + f"uint u = x[i]; o[i] = {text};",
            inputs={"x": mx.arange(1, 33).astype(mx.uint32)}, outputs={"o": ((32,), mx.uint32)},
        )  # fmt: skip
        rest = {k: n for k, n in cost.instructions.items() if not k.startswith("device")}
        moved = [cost.instructions[f"device {kind}"] for kind in ("load", "store")]
        if rest != expected or moved != [1, 1]:
            wrong[text] = rest, moved
    assert wrong == {}


def test_every_class_has_a_price(virtual_metal: VirtualMetal) -> None:
    assert TABLE["float arithmetic"] == (1, 0) and TABLE["shift"] == (0, 4)
    assert all(cycles.main >= 0 and cycles.second >= 0 for cycles in TABLE.values())


CASES = [(2, 128, 5120, 512), (4, 64, 5120, 64), (2, 64, 320, 20), (4, 32, 96, 12)]


@pytest.mark.parametrize(("bits", "group", "wide", "rows"), CASES)
def test_mlx_gathered_product(bits: int, group: int, wide: int, rows: int) -> None:
    """MLX's own kernel computes here what `mx.gather_qmm` does on the CPU."""
    keys = mx.random.split(mx.random.key(bits), 2)
    weight = mx.random.normal((3, rows, wide), key=keys[0])
    x = mx.random.normal((2, wide), key=keys[1])
    packed = mx.quantize(weight, group_size=group, bits=bits)
    indices = mx.array([[2, 0], [1, 2]], dtype=mx.uint32)
    every = (mx.float32, mx.float16, mx.bfloat16)
    for dtype in every if group == 128 else (mx.float16,):
        w, scales, biases = packed[0], packed[1].astype(dtype), packed[2].astype(dtype)
        got = mlx_kernels.gather_qmv(
            x.astype(dtype), w, scales, biases, indices, group_size=group, bits=bits
        )
        exact = mx.gather_qmm(
            x.astype(dtype).astype(mx.float32)[:, None, None], w, scales.astype(mx.float32),
            biases.astype(mx.float32), rhs_indices=indices, transpose=True, group_size=group,
            bits=bits,
        )[:, :, 0]  # fmt: skip
        assert got.y.dtype == dtype and got.weights == 4 * rows * wide
        step = {mx.float32: 2.0**-18, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]
        error = np.abs(numbers(got.y) - numbers(exact)).max()
        assert error <= step * np.abs(numbers(exact)).max()


@pytest.mark.parametrize(("bits", "group", "wide", "rows"), [(2, 128, 1024, 64), (4, 64, 320, 20)])
def test_mlx_product(bits: int, group: int, wide: int, rows: int) -> None:
    """MLX's own kernel computes here what `mx.quantized_matmul` does on the CPU."""
    weight = mx.random.normal((rows, wide), key=mx.random.key(bits))
    x = mx.random.normal((2, wide), key=mx.random.key(7))
    packed = mx.quantize(weight, group_size=group, bits=bits)
    got = mlx_kernels.qmv(x, *packed, group_size=group, bits=bits)
    exact = numbers(mx.quantized_matmul(x, *packed, group_size=group, bits=bits))
    assert np.abs(numbers(got.y) - exact).max() <= 2.0**-18 * np.abs(exact).max()
    with pytest.raises(LaunchError, match="one floating dtype"):
        mlx_kernels.qmv(x.astype(mx.float16), *packed, group_size=group, bits=bits)


def test_mlx_two_bit_needs_what_machine_code_did() -> None:
    """At best 3.35 main and 4.08 second cycles a weight; 79 registers of 16 bits."""
    weight = mx.random.normal((64, 5120), key=mx.random.key(1)).astype(mx.float16)
    x = mx.random.normal((1, 5120), key=mx.random.key(2)).astype(mx.float16)
    packed = mx.quantize(weight, group_size=128, bits=2)
    got = mlx_kernels.qmv(x, *packed, group_size=128, bits=2)
    one = got.cost.per_weight(got.weights)
    assert one.main == pytest.approx(3.35, rel=0.03)
    assert one.second == pytest.approx(4.08, rel=0.03)
    assert got.cost.registers == pytest.approx(79, abs=6)
    assert got.cost.threads == 1024


def test_cost_of_mlx_two_bit() -> None:
    """3.3 main and 4.1 second cycles a weight, 0.281 bytes, for rows of 5120 and groups of 128."""
    weight = mx.random.normal((2, 64, 5120), key=mx.random.key(1)).astype(mx.float16)
    w, scales, biases = mx.quantize(weight, group_size=128, bits=2)
    x = mx.random.normal((1, 5120), key=mx.random.key(2)).astype(mx.float16)
    indices = mx.array([[1, 0]], dtype=mx.uint32)
    got = mlx_kernels.gather_qmv(x, w, scales, biases, indices, group_size=128, bits=2)
    one = got.cost.per_weight(got.weights, ("w", "scales", "biases"))
    assert one.main == pytest.approx(3.3, abs=0.15)
    assert one.second == pytest.approx(4.1, abs=0.3)  # the gather's 64-bit strides are 0.2 of it
    assert one.bytes == 0.28125
    assert "private load" not in got.cost.instructions


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("runs", [(16, 16), (5, 0, 33, 1)])
def test_mlx_matrix_product_of_sorted_pairs(runs: tuple[int, ...], dtype: mx.Dtype) -> None:
    """Whole and partial tiles give what `mx.gather_qmm` does on the CPU."""
    indices = mx.array(np.repeat(np.arange(len(runs)), runs).astype(np.uint32))
    keys = mx.random.split(mx.random.key(1), 2)
    w, scales, biases = mx.quantize(
        mx.random.normal((len(runs), 64, 256), key=keys[0]), group_size=128, bits=2
    )
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    x = mx.random.normal((indices.size, 256), key=keys[1]).astype(dtype)
    got = mlx_kernels.gather_qmm(x, w, scales, biases, indices, group_size=128, bits=2)
    exact = mx.gather_qmm(
        x.astype(mx.float32)[:, None], w, scales.astype(mx.float32), biases.astype(mx.float32),
        rhs_indices=indices, transpose=True, group_size=128, bits=2,
    )[:, 0]  # fmt: skip
    error = np.abs(numbers(got.y) - numbers(exact)).max()
    step = {mx.float32: 2.0**-18, mx.float16: 2.0**-10}[dtype]
    assert error <= step * np.abs(numbers(exact)).max()


def test_cost_of_mlx_matrix_product() -> None:
    """A tile costs 23.4 main and 4.1 second cycles a weight, however many pairs it has.

    20 are the products of simdgroup matrices: two simdgroups multiply 8 x 8 x 8 four times for 256
    weights. 3 are a mask, a conversion (4 second) and an fma to make a weight.
    """
    w, scales, biases = mx.quantize(
        mx.random.normal((2, 32, 5120), key=mx.random.key(1)), group_size=128, bits=2
    )
    weights = 2 * 32 * 5120
    for runs in ((16, 16), (1, 5)):
        indices = mx.array(np.repeat([0, 1], runs).astype(np.uint32))
        x = mx.zeros((indices.size, 5120))
        got = mlx_kernels.gather_qmm(x, w, scales, biases, indices, group_size=128, bits=2)
        tile = got.cost.per_weight(weights, ("w", "scales", "biases"))
        assert got.cost.instructions["simdgroup matrix multiply"] * 32 == weights
        assert tile.main == pytest.approx(23.5, abs=0.3)
        assert tile.second == pytest.approx(4.1, abs=0.1)
        assert tile.bytes == 0.3125
        assert "private load" not in got.cost.instructions


def test_cost_of_bitlinear(virtual_metal: VirtualMetal) -> None:
    """3.1 main and 7.0 second cycles a weight, 0.25 bytes."""
    module = fresh("mlx_lm.models.bitlinear_layers")
    layer = module.BitLinear(5120, 64, bias=False)
    layer.weight_scale = mx.array([1.0]).astype(mx.float16)
    layer(mx.zeros((1, 5120), mx.float16))
    one = virtual_metal.launches[0].cost.per_weight(5120 * 64, ("packed_weights", "weight_scale"))
    assert one.main == pytest.approx(3.1, abs=0.2)
    assert one.second == pytest.approx(7.0, abs=0.2)
    assert one.bytes == pytest.approx(0.25, abs=1e-3)
