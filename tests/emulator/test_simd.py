"""Operations across a simdgroup and a threadgroup compute what Metal says they do."""

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import VirtualMetal

from .tools import launch, numbers

X = np.array([(7 * i + 3) % 32 for i in range(32)])
REDUCTIONS = {
    "sum": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def lanes_of_one(
    metal: VirtualMetal, expressions: list[str], dtype: mx.Dtype = mx.int32, lanes: int = 32
) -> list[np.ndarray]:
    """The value of each expression in each lane, where x is X in `dtype` and i the lane."""
    stores = "\n".join(f"o{n}[i] = {text};" for n, text in enumerate(expressions))
    outputs = launch(
        metal,
        f"uint i = thread_position_in_grid.x; T x = v[i];\n{stores}",
        {"v": mx.array(X[:lanes]).astype(dtype)},
        {f"o{n}": ((lanes,), dtype) for n in range(len(expressions))},
        grid=(lanes, 1, 1),
        call={"template": [("T", dtype)]},
    )
    return [numbers(one) for one in outputs]


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.int16, mx.float32, mx.float16])
def test_reductions(virtual_metal: VirtualMetal, dtype: mx.Dtype) -> None:
    integer = mx.issubdtype(dtype, mx.integer)
    names = [n for n in REDUCTIONS if integer or n in ("sum", "min", "max")]
    texts = [f"{group}_{name}(x)" for name in names for group in ("simd", "quad")]
    texts += ["simd_prefix_inclusive_sum(x)", "simd_prefix_exclusive_sum(x)"]
    texts += [
        "simd_product(T(x % 3 == 0 ? 2 : 1))" if integer else "simd_product(T(i < 9 ? 2 : 1))"
    ]
    found = iter(lanes_of_one(virtual_metal, texts, dtype))
    bits = dtype.size * 8 - mx.issubdtype(dtype, mx.signedinteger)
    for name in names:
        whole = REDUCTIONS[name].reduce(X)
        assert set(next(found)) == {whole % 2**bits if integer else whole}
        quads = [REDUCTIONS[name].reduce(X[i : i + 4]) for i in range(0, 32, 4)]
        assert next(found).tolist() == np.repeat(quads, 4).tolist()
    sums = np.cumsum(X)
    expected = sums % 2**bits if integer else sums
    assert next(found).tolist() == expected.tolist()
    expected = (sums - X) % 2**bits if integer else sums - X
    assert next(found).tolist() == expected.tolist()
    product = 2 ** int(np.sum(X % 3 == 0)) % 2**bits if integer else 2**9
    assert set(next(found)) == {product}


def test_shuffles(virtual_metal: VirtualMetal) -> None:
    i = np.arange(32)
    cases = {
        "simd_shuffle(x, ushort(31 - i))": X[31 - i],
        "simd_shuffle_xor(x, 5)": X[i ^ 5],
        "simd_shuffle_up(x, 3)": np.where(i < 3, X, X[i - 3]),
        "simd_shuffle_down(x, 3)": np.where(i > 28, X, X[(i + 3) % 32]),
        "simd_shuffle_rotate_up(x, 3)": X[(i - 3) % 32],
        "simd_shuffle_rotate_down(x, 3)": X[(i + 3) % 32],
        "simd_shuffle_and_fill_up(x, T(100 + i), 2)": np.where(i < 2, 100 + i, X[i - 2]),
        "simd_shuffle_and_fill_down(x, T(100 + i), 2, 8)": np.where(
            i % 8 > 5, 100 + i, X[(i + 2) % 32]
        ),
        "simd_broadcast(x, 9)": np.full(32, X[9]),
        "simd_broadcast_first(x)": np.full(32, X[0]),
        "quad_shuffle_xor(x, 1)": X[i ^ 1],
        "quad_broadcast(x, 2)": X[i // 4 * 4 + 2],
        "quad_shuffle_down(x, 1)": np.where(i % 4 == 3, X, X[(i + 1) % 32]),
        "T(ulong(simd_ballot(x > 15)) & 0x7FFFFFFF)": np.full(
            32, sum(1 << k for k in range(31) if X[k] > 15)
        ),
        "T(simd_all(x >= 0)) * 2 + T(simd_any(x > 40))": np.full(32, 2),
        "T(simd_is_first())": (i == 0).astype(int),
        "simd_sum(vec<T, 2>(x, 1)).y": np.full(32, 32),
    }
    for dtype in (mx.int32, mx.float32, mx.float16):
        if dtype != mx.int32:
            cases = {k: v for k, v in cases.items() if "ballot" not in k}
        found = lanes_of_one(virtual_metal, list(cases), dtype)
        for (text, expected), got in zip(cases.items(), found, strict=True):
            assert got.tolist() == expected.tolist(), text


def test_a_simdgroup_that_is_not_full(virtual_metal: VirtualMetal) -> None:
    total, inclusive = lanes_of_one(
        virtual_metal, ["simd_sum(x)", "simd_prefix_inclusive_sum(x)"], lanes=19
    )
    assert set(total) == {X[:19].sum()} and inclusive.tolist() == np.cumsum(X[:19]).tolist()


def test_sums_add_as_a_butterfly(virtual_metal: VirtualMetal) -> None:
    x = mx.random.normal((32,), key=mx.random.key(1))
    source = """
        uint i = thread_position_in_grid.x;
        float y = x[i];
        for (ushort step = 1; step < 32; step *= 2) { y += simd_shuffle_xor(y, step); }
        o[i] = y;
        p[i] = simd_sum(x[i]);
    """
    outputs = {"o": ((32,), mx.float32), "p": ((32,), mx.float32)}
    o, p = launch(virtual_metal, source, {"x": x}, outputs)
    assert mx.array_equal(o, p) and len(set(o.tolist())) == 1  # type: ignore[arg-type]


def test_threadgroup_memory_over_many_simdgroups(virtual_metal: VirtualMetal) -> None:
    source = """
        threadgroup float sums[32];
        uint t = thread_index_in_threadgroup, g = threadgroup_position_in_grid.x;
        float v = simd_sum(x[thread_position_in_grid.x]);
        if (thread_index_in_simdgroup == 0) sums[simdgroup_index_in_threadgroup] = v;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        v = simd_sum(t % 32 < simdgroups_per_threadgroup ? sums[t % 32] : 0.0f);
        if (t == 0) o[g] = v;
    """
    x = mx.arange(2500).astype(mx.float32)
    outputs = {"o": ((3,), mx.float32)}
    (o,) = launch(
        virtual_metal, source, {"x": x}, outputs, grid=(2500, 1, 1), threadgroup=(1000, 1, 1)
    )
    parts = [np.arange(a, min(a + 1000, 2500)).sum() for a in (0, 1000, 2000)]
    assert numbers(o).tolist() == parts


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_simdgroup_matrices(virtual_metal: VirtualMetal, dtype: mx.Dtype) -> None:
    source = """
        simdgroup_matrix<T, 8, 8> x, y, z;
        simdgroup_load(x, a, 16, ulong2(8, 0));
        simdgroup_load(y, b, 8, ulong2(0, 0), true);
        simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(2.0f);
        simdgroup_multiply_accumulate(sum, x, y, sum);
        simdgroup_store(sum, o);
        simdgroup_multiply(z, x, simdgroup_matrix<T, 8, 8>(T(3.0f)));
        threadgroup T shared[64];
        simdgroup_store(z, shared);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        uint i = thread_index_in_simdgroup;
        p[i] = shared[i];
        p[i + 32] = shared[i + 32];
        thread auto& own = x.thread_elements();
        q[2 * i] = float(own[0]);
        q[2 * i + 1] = float(own[1]);
    """.replace(
        "simdgroup_multiply(z, x, simdgroup_matrix<T, 8, 8>(T(3.0f)));",
        "simdgroup_matrix<T, 8, 8> three(T(3.0f)); simdgroup_multiply(z, x, three);",
    )
    keys = mx.random.split(mx.random.key(2))
    a = mx.random.randint(-8, 8, (8, 16), key=keys[0]).astype(dtype)
    b = mx.random.randint(-8, 8, (8, 8), key=keys[1]).astype(dtype)
    o, p, q = launch(
        virtual_metal,
        source,
        {"a": a, "b": b},
        {"o": ((8, 8), mx.float32), "p": ((8, 8), dtype), "q": ((32, 2), mx.float32)},
        call={"template": [("T", dtype)]},
    )
    left = numbers(a)[:, 8:]
    assert np.array_equal(numbers(o), left @ numbers(b).T + 2)
    assert np.array_equal(numbers(p), left * 3)
    lane = np.arange(32)
    row, col = (lane // 16) * 4 + lane // 2 % 4, lane // 8 % 2 * 4 + lane % 2 * 2
    assert np.array_equal(numbers(q), np.stack([left[row, col], left[row, col + 1]], axis=1))


def test_atomics(virtual_metal: VirtualMetal) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        threadgroup atomic_uint ticket;
        if (thread_index_in_threadgroup == 0) {
            atomic_store_explicit(&ticket, 0u, memory_order_relaxed);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint mine = atomic_fetch_add_explicit(&ticket, 1u, memory_order_relaxed);
        atomic_fetch_add_explicit(&o[0], int(i), memory_order_relaxed);
        atomic_fetch_sub_explicit(&o[1], 2, memory_order_relaxed);
        atomic_fetch_max_explicit(&o[2], int(i), memory_order_relaxed);
        atomic_fetch_min_explicit(&o[3], -int(i), memory_order_relaxed);
        atomic_fetch_or_explicit(&o[4], 1 << (i % 8), memory_order_relaxed);
        atomic_fetch_xor_explicit(&o[5], 1 << (i % 32), memory_order_relaxed);
        int seen = atomic_load_explicit(&o[6], memory_order_relaxed);
        while (!atomic_compare_exchange_weak_explicit(
            &o[6], &seen, seen + 3, memory_order_relaxed, memory_order_relaxed)) {}
        atomic_fetch_add_explicit(&o[7], int(mine), memory_order_relaxed);
    """
    (o,) = launch(
        virtual_metal,
        source,
        outputs={"o": ((8,), mx.int32)},
        grid=(96, 1, 1),
        threadgroup=(48, 1, 1),
        atomic_outputs=True,
        call={"init_value": 0},
    )
    tickets = 2 * sum(range(48))
    assert o.tolist() == [4560, -192, 95, -95, 255, -1, 288, tickets]
    floats = "atomic_fetch_add_explicit(&o[0], x[thread_position_in_grid.x], memory_order_relaxed);"
    x = mx.random.normal((256,), key=mx.random.key(5))
    (sums,) = launch(
        virtual_metal,
        floats,
        {"x": x},
        {"o": ((1,), mx.float32)},
        grid=(256, 1, 1),
        atomic_outputs=True,
        call={"init_value": 0},
    )
    # The order of additions is not fixed, so the last bits are not either.
    assert abs(sums.item() - numbers(x).sum()) < 1e-4


def test_waiting_for_another_thread_by_an_atomic(virtual_metal: VirtualMetal) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        if (i < 63) {
            while (atomic_load_explicit(&o[i + 1], memory_order_relaxed) == 0) {}
        }
        atomic_store_explicit(&o[i], 64 - int(i), memory_order_relaxed);
    """
    (o,) = launch(
        virtual_metal,
        source,
        outputs={"o": ((64,), mx.int32)},
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        atomic_outputs=True,
        call={"init_value": 0},
    )
    assert o.tolist() == list(range(64, 0, -1))
