"""The Metal kernels, run by the emulator from their own text, against exact arithmetic."""

from __future__ import annotations

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import VirtualMetal, virtual_metal
from outlier_mlx.runtime import kernels, launching
from outlier_mlx.runtime.affine2 import padded_width, row_bytes, rows_to_affine2
from outlier_mlx.runtime.kernel_text import kernel_names, kernel_text
from outlier_mlx.runtime.kernels import Variant
from tests.engine import as_array
from tests.kernel_cases import (
    Matrices,
    assert_within,
    mixed,
    products,
    random_experts,
    random_matrices,
    random_x,
    swiglu,
)
from tests.metal import Metal, any_metal, needs_emulator

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
DIGITS = np.arange(256)[:, None] * 3 ** np.arange(1, 6) // 256 % 3


# Decoding


def test_every_pair_of_bytes(metal: Metal):
    """Bytes 0 and 1 share a register, as do 2 and 3: all 65536 pairs of each.

    Products with powers of three: the ten trits can be read off them.
    """
    first, second = (b.astype(np.uint8) for b in np.divmod(np.arange(65536), 256))
    rows = np.full((65536, 16), 128, np.uint8)
    rows[:, [0, 2]], rows[:, [1, 3]] = first[:, None], second[:, None]
    powers = 3.0 ** np.arange(10, dtype=np.float32)
    x = np.zeros((2, 5, 16), np.float32)
    x[0, :, 0] = x[1, :, 2] = powers[:5]
    x[0, :, 1] = x[1, :, 3] = powers[5:]
    scales, experts = mx.ones((1, len(rows))), mx.zeros((2,), mx.uint32)
    y = kernels.tq1_0_qmv(mx.array(x.reshape(2, 80)), mx.array(rows[None]), scales, experts)
    expected = (np.concatenate([DIGITS[first], DIGITS[second]], axis=-1) - 1) @ powers
    np.testing.assert_array_equal(y, np.stack([expected] * 2))
    assert metal.names == ["tq1_0_qmv"]


def test_every_byte_becomes_its_codes(metal: Metal):
    rows = np.arange(256, dtype=np.uint8)
    rows = np.stack([np.roll(rows, 77 * i) ^ 85 * (i % 2) for i in range(16)], axis=-1)
    for width in (80, 65, 33):
        codes = kernels.tq1_0_to_affine2(mx.array(rows), width)
        expected = rows_to_affine2(mx.array(rows), mx.ones((256,)), width)[0]
        np.testing.assert_array_equal(codes, expected)


# Shapes and dtypes: hidden, width, tokens, experts, k


LAYERS: dict[str, tuple[int, int, int, int, int, str]] = {
    # Whole steps alone, then a step that a row ends in; rows of both matrices divide evenly.
    "even": (640, 1296, 1, 8, 2, "float16"),
    # Nothing divides anything: four elements of x, rows, simdgroups. All 64 experts, 8 a token.
    "odd": (44, 37, 3, 64, 8, "bfloat16"),
    # MLX passes arrays this small in another address space.
    "smallest": (5, 7, 1, 1, 1, "float32"),
    # Every expert for every token.
    "all": (651, 44, 5, 3, 3, "float16"),
}
MORE_LAYERS: dict[str, tuple[int, int, int, int, int, str]] = {
    "k3": (3, 3, 2, 2, 1, "float16"),
    "64-experts-a-token": (24, 9, 2, 64, 64, "float16"),
    "two-rows": (20, 2, 2, 2, 1, "float16"),
    "two-rows-tiny": (5, 2, 1, 1, 1, "bfloat16"),
    "one-word": (20, 20, 4, 5, 2, "float32"),
    "k6": (6, 6, 1, 1, 1, "float16"),
    "k7": (7, 19, 2, 3, 2, "bfloat16"),
    "k8": (8, 8, 1, 2, 2, "float16"),
    "k19": (19, 21, 1, 4, 3, "float32"),
    "k21": (21, 16, 2, 4, 4, "float16"),
    "k24": (24, 24, 2, 4, 4, "bfloat16"),
    "below-a-step": (636, 639, 2, 6, 2, "float16"),
    "above-a-step": (644, 641, 2, 6, 2, "bfloat16"),
    "two-steps": (1280, 1284, 1, 3, 2, "float32"),
    "many-tokens": (100, 72, 31, 16, 8, "float16"),
    "many-experts": (64, 48, 3, 64, 5, "float32"),
    "one-expert": (333, 250, 9, 1, 1, "bfloat16"),
    "tail-of-one": (1281, 641, 1, 2, 2, "float16"),
    # Two, three, four and all five digits of a row are used, some of them in part.
    "k32": (32, 64, 2, 2, 2, "float16"),
    "k40": (40, 36, 2, 2, 2, "bfloat16"),
    "k65": (65, 79, 2, 2, 2, "float32"),
    "k80": (80, 81, 2, 2, 2, "float16"),
    "k161": (161, 176, 2, 2, 2, "float16"),
}


def run_layer(
    hidden: int,
    width: int,
    tokens: int,
    experts: int,
    k: int,
    dtype: str,
    variant: Variant | None = None,
) -> list[mx.array]:
    """All three decode kernels on the matrices of one layer; returns their results."""
    x = random_x(hidden, (tokens, hidden), DTYPES[dtype])
    gate, up = (random_matrices(seed, experts, width, hidden) for seed in (1, 2))
    down = random_matrices(3, experts, hidden, width)
    chosen = random_experts(4, tokens, k, experts)
    indices = mx.array(chosen)

    h = kernels.tq1_0_swiglu(x, *gate.packed, *up.packed, indices, variant=variant)
    assert h.dtype == mx.float32
    assert_within(h, swiglu(x, gate, up, chosen))

    weights = random_x(5, (tokens, k), mx.float32)
    shared = random_x(6, (tokens, hidden), DTYPES[dtype])
    y = kernels.tq1_0_down(h, *down.packed, indices, weights, shared, variant=variant)
    assert y.dtype == shared.dtype
    assert_within(y, mixed(h, down, chosen, np.array(weights), shared))

    z = kernels.tq1_0_qmv(x, *gate.packed, indices.flatten(), variant=variant)
    assert z.dtype == mx.float32 and z.shape == (tokens * k, width)
    assert_within(z.reshape(tokens, k, width), products(as_array(x), gate, chosen))
    return [h, y, z]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str, metal: Metal):
    run_layer(*LAYERS[name])
    assert metal.names == ["tq1_0_swiglu", "tq1_0_down", "tq1_0_qmv"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_LAYERS)
def test_more_layers(name: str, metal: Metal):
    run_layer(*MORE_LAYERS[name])


VARIANTS = {
    "2-rows": Variant(rows=2),
    "16-rows": Variant(rows=16),
    "two-pieces": Variant(pieces=2),
    "two-pieces-4-rows": Variant(pieces=2, rows=4),
    "one-simdgroup": Variant(simdgroups=1),
    "four-simdgroups": Variant(simdgroups=4, rows=2),
}


def assert_same_bits(name: str, dtype: str, width: int) -> None:
    layer = (1320, width, 2, 3, 2, dtype)
    for one, other in zip(run_layer(*layer, VARIANTS[name]), run_layer(*layer), strict=True):
        np.testing.assert_array_equal(as_array(one), as_array(other))


@pytest.mark.parametrize("name", ["16-rows", "two-pieces-4-rows"])
def test_variants_give_the_same_bits(name: str, metal: Metal):
    """Rows of an odd number of pieces, and of one; additions have one order in all variants."""
    assert_same_bits(name, "float16", 44)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_all_variants_give_the_same_bits(name: str, dtype: str, metal: Metal):
    assert_same_bits(name, dtype, 1348)


def test_variants_that_do_not_fit_are_made_to():
    assert Variant(rows=16).fitted(640, 5).rows == 4
    assert Variant(pieces=2).fitted(641, 64).pieces == 2
    assert Variant(pieces=2).fitted(640, 64).pieces == 1  # a row is one piece


def test_experts_that_tokens_share(metal: Metal):
    """Each row of the result depends on its own token and expert alone."""
    hidden, width, *_ = LAYERS["odd"]
    gate, up = (random_matrices(seed, 64, width, hidden) for seed in (1, 2))
    x = random_x(9, (4, hidden), mx.bfloat16)
    chosen = np.array([[3, 3, 3], [3, 0, 63], [63, 3, 3], [0, 0, 3]], np.uint32)
    h = kernels.tq1_0_swiglu(x, *gate.packed, *up.packed, mx.array(chosen))
    assert_within(h, swiglu(x, gate, up, chosen))
    np.testing.assert_array_equal(h[0, 0], h[0, 2])
    np.testing.assert_array_equal(h[2, 1], h[2, 2])


@needs_emulator
def test_expert_offsets_beyond_32_bits(metal: Metal):
    """An expert's bytes, and its scales, lie further than 2**32 behind the buffer's start."""
    assert isinstance(metal, VirtualMetal)
    hidden, width, tokens, _, k, dtype = LAYERS["even"]
    far = (1 << 32) - 1  # the largest number that an index holds
    gate, up = (random_matrices(seed, 1, width, hidden) for seed in (1, 2))
    down = random_matrices(3, 1, hidden, width)
    x, here = random_x(1, (tokens, hidden), DTYPES[dtype]), np.zeros((tokens, k), np.uint32)
    there = mx.full((tokens, k), far, mx.uint32)

    gate_bytes, down_bytes = far * width * row_bytes(hidden), far * hidden * row_bytes(width)
    metal.base_offsets = {
        "gate": gate_bytes,
        "up": gate_bytes,
        "gate_scales": far * width * 4,
        "up_scales": far * width * 4,
    }
    h = kernels.tq1_0_swiglu(x, *gate.packed, *up.packed, there)
    assert_within(h, swiglu(x, gate, up, here))

    metal.base_offsets = {"down": down_bytes, "scales": far * hidden * 4}
    weights, shared = mx.ones((tokens, k)), random_x(2, (tokens, hidden), DTYPES[dtype])
    y = kernels.tq1_0_down(h, *down.packed, there, weights, shared)
    assert_within(y, mixed(h, down, here, np.ones((tokens, k)), shared))

    metal.base_offsets = {"rows": gate_bytes, "scales": far * width * 4}
    z = kernels.tq1_0_qmv(x, *gate.packed, there.flatten())
    assert_within(z.reshape(tokens, k, width), products(as_array(x), gate, here))


# What callers hand over


def test_inputs_that_are_not_contiguous(metal: Metal):
    hidden, width, _, experts, k, dtype = LAYERS["odd"]
    gate, up = (random_matrices(seed, experts, width, hidden) for seed in (1, 2))
    x = random_x(1, (6, 2 * hidden), DTYPES[dtype])
    chosen = random_experts(2, 3, 2 * k, experts)
    views = x[::2, ::2], mx.array(chosen)[:, ::2]
    h = kernels.tq1_0_swiglu(
        views[0],
        mx.array(np.asfortranarray(np.array(gate.rows))),
        mx.array(np.repeat(gate.scales, 2, axis=0))[::2],
        up.rows[::-1][::-1],
        mx.array(np.ascontiguousarray(up.scales.T)).T,
        views[1],
    )
    copies = mx.array(as_array(views[0])).astype(DTYPES[dtype])
    assert_within(h, swiglu(copies, gate, up, chosen[:, ::2]))


def test_no_tokens(metal: Metal):
    gate, down = random_matrices(1, 3, 9, 20), random_matrices(2, 3, 20, 9)
    none = mx.zeros((0, 2), mx.uint32)
    h = kernels.tq1_0_swiglu(mx.zeros((0, 20)), *gate.packed, *gate.packed, none)
    assert h.shape == (0, 2, 9)
    shared = mx.zeros((0, 20), mx.float16)
    y = kernels.tq1_0_down(h, *down.packed, none, mx.zeros((0, 2)), shared)
    assert y.shape == (0, 20) and y.dtype == mx.float16
    z = kernels.tq1_0_qmv(mx.zeros((0, 20)), *gate.packed, none.flatten())
    assert z.shape == (0, 9)
    assert kernels.tq1_0_to_affine2(mx.zeros((0, 16), mx.uint8), 20).shape == (0, 2)
    assert metal.launches == []


def test_the_limits_themselves(metal: Metal):
    """The widest row and the most experts in an array that are allowed work."""
    experts, wide = launching.LIMITS["stored experts"][1], launching.LIMITS["in features"][1]
    m = random_matrices(1, experts, 2, 5)
    chosen = np.array([[0], [experts - 1]], np.uint32)
    x = random_x(1, (2, 5), mx.float32)
    y = kernels.tq1_0_qmv(x, *m.packed, mx.array(chosen.flatten()))
    assert_within(y[:, None], products(as_array(x), m, chosen))
    m = random_matrices(1, 1, 2, wide)
    x = random_x(1, (1, wide), mx.float16)
    y = kernels.tq1_0_qmv(x, *m.packed, mx.array([0], mx.uint32))
    assert_within(y[:, None], products(as_array(x), m, np.zeros((1, 1), np.uint32)))


@pytest.mark.slow
def test_the_limits_of_a_grid(metal: Metal):
    """The most tokens and the most rows that are allowed work."""
    tokens, rows = launching.LIMITS["tokens"][1], launching.LIMITS["out features"][1]
    m = random_matrices(1, 3, 2, 5)
    chosen = (np.arange(tokens, dtype=np.uint32) % 3)[:, None]
    x = random_x(1, (tokens, 5), mx.float32)
    y = kernels.tq1_0_qmv(x, *m.packed, mx.array(chosen.flatten()))
    assert_within(y[:, None], products(as_array(x), m, chosen))
    m = random_matrices(1, 1, rows, 5)
    x = random_x(2, (1, 5), mx.float32)
    y = kernels.tq1_0_qmv(x, *m.packed, mx.array([0], mx.uint32))
    assert_within(y[:, None], products(as_array(x), m, np.zeros((1, 1), np.uint32)))


# Transcoding


def assert_transcodes(width: int) -> None:
    rng = np.random.default_rng(width)
    rows = mx.array(rng.integers(0, 256, (2, 3, row_bytes(width)), dtype=np.uint8))
    codes = kernels.tq1_0_to_affine2(rows, width)
    assert codes.shape == (2, 3, padded_width(width) // 16)
    np.testing.assert_array_equal(codes, rows_to_affine2(rows, mx.ones((2, 3)), width)[0])


@pytest.mark.parametrize("width", [1, 79, 81, 704])
def test_transcoding(width: int, metal: Metal):
    assert_transcodes(width)


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 16, 31, 32, 33, 40, 60, 64, 80, 100, 128, 155, 160, 161, 240])
def test_more_transcoding(width: int, metal: Metal):
    assert_transcodes(width)


# How kernels are built


def test_a_kernel_is_built_once_by_each_device():
    x, m = mx.ones((1, 20)), random_matrices(1, 1, 4, 20)

    def launch() -> None:
        kernels.tq1_0_qmv(x, *m.packed, mx.zeros((1,), mx.uint32))

    made = []
    for _ in range(2):
        with any_metal() as device:
            launch()
            built = launching._built[1]["tq1_0_qmv"]
            launch()
            assert launching._built[1]["tq1_0_qmv"] is built
            assert device.names == ["tq1_0_qmv"] * 2
        made.append(built)
    assert made[0] is not made[1]


def test_the_variant_in_use_is_the_one_launched(metal: Metal, monkeypatch: pytest.MonkeyPatch):
    m = random_matrices(1, 1, 8, 20)
    call = mx.ones((1, 20)), *m.packed, mx.zeros((1,), mx.uint32)
    kernels.tq1_0_qmv(*call)
    monkeypatch.setitem(kernels.VARIANTS, "tq1_0_qmv", replace(Variant(), rows=4))
    kernels.tq1_0_qmv(*call)
    assert [launch.template["ROWS"] for launch in metal.launches] == [8, 4]


def test_rows_are_computed_alike_wherever_they_lie(metal: Metal):
    """The last simdgroup's rows overlap its neighbour's, and each is written once: bit for bit."""
    m = random_matrices(1, 1, 19, 44)
    x, expert = random_x(1, (1, 44), mx.bfloat16), mx.zeros((1,), mx.uint32)
    whole = kernels.tq1_0_qmv(x, *m.packed, expert)
    some = Matrices(m.trits[:, 11:], m.scales[:, 11:])
    np.testing.assert_array_equal(kernels.tq1_0_qmv(x, *some.packed, expert), whole[:, 11:])


@needs_emulator
def test_no_array_of_a_thread_is_in_memory():
    """Registers cannot be indexed: an array that is would be spilled to memory on a GPU."""
    with virtual_metal() as metal:
        run_layer(*LAYERS["odd"])
        kernels.tq1_0_to_affine2(mx.zeros((2, row_bytes(704)), mx.uint8), 704)
    for launch in metal.launches:
        assert not {"private load", "private store"} & set(launch.cost.instructions), launch.name


def test_member_functions_name_their_address_space():
    """Without it, Metal 4.1 takes objects for generic; see MLX's pull request 3963."""
    member = re.compile(r"^  METAL_FUNC [^{]*?\)( const)?( thread)? \{", re.MULTILINE)
    found = [m for name in kernel_names() for m in member.finditer(kernel_text(name))]
    assert len(found) > 10
    assert [m[0] for m in found if not m[2]] == []
