"""`bench --kernels`: what is timed, what is kept of it, and what is found to be wrong."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from kernels.emulator import virtual_metal
from outlier_mlx.engine.chips import Chip
from outlier_mlx.measure import bench_cases, bench_inputs, bench_kernels, bench_tables
from outlier_mlx.measure.bench_cases import CONVERSION, DECODING, ROUTING, SORTING, Case, Kernel
from outlier_mlx.measure.bench_inputs import Layer, four_bits
from outlier_mlx.measure.bench_results import Arm, KernelBench, KernelResult
from outlier_mlx.runtime import kernels, variants
from outlier_mlx.runtime.variants import Variant
from tests.engine import as_array, load
from tests.kernel_cases import random_matrices
from tests.library import Library
from tests.program import run
from tests.test_bench import assert_summary

DOWN = DECODING[1]


def only(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time one kernel for one token, and nothing else."""

    def cases(model: nn.Module, tokens: int, dtype: mx.Dtype) -> list[Case]:
        return [Case(kernel, "", partial(bench_inputs.decode_layers, model, tokens, dtype))]

    monkeypatch.setattr(bench_kernels, "cases", cases)


def test_without_metal_only_the_plain_path_is_timed(tier: Path):
    done = run("bench", "--model", tier, "--kernels", "-n", 2, "-b", 3, "--json")
    assert done.err.startswith("no Metal here, so there are no kernels to time")
    found = done.json
    names = [kernel["kernel"] for kernel in found["kernels"]]
    decoding, others = found["kernels"][:3], found["kernels"][3:]
    assert names[:3] == ["tq1_0_swiglu", "tq1_0_down", "tq1_0_qmv"]
    linear = ["tq1_0_qmv_groups", *["tq1_0_linear"] * 2]
    assert names[3:] == ["tq1_0_route", *["tq1_0_sort"] * 2, *linear, "tq1_0_to_affine2"]
    linears = [kernel for kernel in others if kernel["kernel"] == "tq1_0_linear"]
    forms = [f"scales of {of}, 3 vectors" for of in ("rows", "groups of 64")]
    assert [kernel["form"] for kernel in linears] == forms
    for kernel in others:
        labels = ["MLX 2-bit", "MLX 4-bit"] if kernel["kernel"] in linear else ["MLX"]
        assert [arm["arm"] for arm in kernel["arms"]] == labels
    for kernel in decoding:
        assert kernel["pairs"] == 6 and kernel["best"] is None
        assert [arm["arm"] for arm in kernel["arms"]] == ["MLX 2-bit", "MLX 4-bit"]
        for arm in kernel["arms"]:
            assert arm["error"] is None
            assert_summary(arm["seconds"], 2)


def test_what_kernels_are_timed_on(tier: Path, monkeypatch: pytest.MonkeyPatch):
    """Layers until enough is read; experts and weights as when decoding."""
    model = load(tier)
    layers = bench_inputs.decode_layers(model, 3, mx.float16)
    assert len(layers) == 2
    for layer in layers:
        assert layer.indices.shape == (3, 2) and layer.x.dtype == layer.shared.dtype == mx.float16
        assert all(len(set(experts)) == 2 for experts in as_array(layer.indices))
        chosen = set(as_array(layer.indices).flatten().tolist())
        assert layer.nbytes("gate") == len(chosen) * 80 * (16 + 4)
        assert (np.array(layer.chosen)[as_array(layer.places)] == as_array(layer.indices)).all()
        affine = [layer.affine("down", 2, mx.float32)]
        mixed = DOWN.plain(layer, affine, mx.float32)
        assert isinstance(mixed, mx.array)
        routed = as_array(mixed) - as_array(layer.shared)
        assert 0.5 < np.sqrt((routed**2).mean()) < 2
    own = {id(model.layers[n].mlp.switch_mlp.gate_proj.weight) for n in (1, 3)}
    assert {id(layer.gate[0]) for layer in layers} == own
    monkeypatch.setattr(bench_inputs, "ENOUGH_BYTES", 1)
    assert len(bench_inputs.decode_layers(model, 1, mx.float32)) == 1
    (layer,) = bench_inputs.decode_layers(model, 4, mx.float32, alike=True)
    assert layer.pairs == 8 and len(layer.chosen) == 2
    assert (as_array(layer.indices) == as_array(layer.indices)[0]).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
def test_formats_of_mlx_hold_the_same_weights(dtype: mx.Dtype, tier: Path):
    """In 2 and 4 bits, as MLX itself decodes them; 80 columns are padded to 96."""
    (layer, _) = bench_inputs.decode_layers(load(tier), 1, dtype)
    weights = {}
    for bits in (2, 4):
        affine = layer.affine("down", bits, dtype)
        assert affine.nbytes == layer.copied("down", bits, dtype)
        settings: Any = {"group_size": affine.group_size, "bits": bits}
        weights[bits] = as_array(mx.dequantize(*affine.arrays, **settings).astype(mx.float32))
    assert weights[2].shape == (2, 64, 96) and (weights[2] == weights[4]).all()
    scales = as_array(layer.down[1][mx.array(layer.chosen)].astype(dtype).astype(mx.float32))
    trits = weights[2][..., :80] / scales[..., None]
    assert set(np.unique(trits)) == {-1, 0, 1}


def test_codes_of_two_bits_as_four():
    codes = np.random.default_rng(0).integers(0, 4, (3, 64))
    words = (codes.reshape(3, 4, 16) << (2 * np.arange(16))).sum(-1).astype(np.uint32)
    found = as_array(four_bits(mx.array(words)))
    assert ((found[..., None] >> (4 * np.arange(8)) & 15).reshape(3, 64) == codes).all()


def test_for_one_token_there_are_also_tokens_that_share_experts(tier: Path):
    model = load(tier)
    found = bench_cases.cases(model, 1, mx.float16)
    forms = [case.form for case in found if case.kernel is DOWN]
    assert forms == ["", *(f"{m} tokens for the same experts" for m in (2, 4, 8))]
    assert [case.build()[0].pairs for case in found if case.kernel is DOWN] == [2, 4, 8, 16]
    few = bench_cases.cases(model, 3, mx.float16)
    assert {case.form for case in few if case.kernel in DECODING} == {""}


@pytest.mark.parametrize("group", [0, 64])
def test_linear_layers_are_experts_matrices(group: int, tier: Path):
    found = bench_inputs.linears(load(tier), 2, group, mx.float16)
    assert len(found) == 8  # of two layers with four experts
    one = found[0]
    assert one.sizes("rows") == (80, 64) and one.x.shape == (2, 64)
    assert one.nbytes("rows") == 80 * 16 + (10 * 1 * 8 * 2 if group else 80 * 4)
    for bits in (2, 4):
        affine = one.affine("rows", bits, mx.float16)
        assert affine.group_size == 64
        assert affine.nbytes == one.copied("rows", bits, mx.float16) == 80 * (8 * bits + 2 * 2)


@pytest.mark.slow
@pytest.mark.parametrize("together", [(2,), (4, 8)], ids=str)
def test_every_kernel_and_form_is_right_in_the_emulator(
    together: tuple[int, ...], library: Library, monkeypatch: pytest.MonkeyPatch
):
    """Also those that need a hidden size of a real model."""
    small = {"layers": 1, "moe_layers": (0,), "experts": 2, "expert_intermediate": 48}
    wide = library.tier(library.overlay(hidden=512, heads=4, intermediate=64, **small))
    monkeypatch.setattr(bench_cases, "TOGETHER", together)
    monkeypatch.setattr(bench_kernels, "ROWS", (8,))
    monkeypatch.setattr(bench_kernels, "PIECES", (1,))
    monkeypatch.setattr(bench_kernels, "PASS_SECONDS", 0.0)
    monkeypatch.setattr(bench_kernels, "DECODES", bench_kernels.DECODES[:1])
    with virtual_metal(count=False) as metal:
        found = bench_kernels.bench_kernels(load(wide, "float16"), rounds=1)
        launched = set(metal.names)
        blocks = {one.template["M"] for one in metal.launches if one.name == "tq1_0_swiglu"}
    assert found.errors == []
    assert blocks == {1, *together}
    timed = {(result.kernel, result.form): result for result in found.results}
    # With blocks, the products of down are weighted in a launch of their own.
    assert launched == {kernel for kernel, _ in timed} | {"tq1_0_mix"}
    for (kernel, _), result in timed.items():
        assert result.ours is not None and result.ours.runs is not None, kernel
        assert all(arm.runs for arm in result.theirs) and result.theirs
    assert ("tq1_0_rotate", "blocks of 512") in timed
    assert ("tq1_0_qmv_groups", "groups of 64") in timed
    for m in together:
        assert ("tq1_0_swiglu", f"{m} tokens for the same experts") in timed
        assert ("tq1_0_linear", f"scales of groups of 128, {m} vectors") in timed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_the_plain_path_is_float32_on_the_cpu(
    dtype: str, tier: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench_cases, "TOGETHER", ())
    found = bench_kernels.bench_kernels(load(tier, dtype), rounds=1)
    assert found.dtype == dtype and found.errors == []
    assert [result.arms[0].nbytes for result in found.results] == [
        2 * 2 * 80 * (64 // 4 + 2 * 4),  # two matrices of two experts; one group, in 4 bytes each
        2 * 64 * (96 // 4 + 3 * 2 * 4),
        2 * 80 * (64 // 4 + 2 * 4),
        4 * 64 * 4,  # the router
        *(tokens * 2 * 4 for tokens in (8, 32)),  # the numbers of experts, to sort
        2 * 80 * (64 // 4 + 2 * 4),
        *[80 * (64 // 4 + 2 * 4)] * 2,  # a matrix with scales of rows, then of groups
        4 * 80 * (16 + 64 // 4),  # all four experts, read and written
    ]


def test_launches_wait_for_one_another():
    indices = mx.array([[3, 1]], mx.uint32)
    for value in (0.0, 1.5, float("nan")):
        previous = mx.exp(mx.array([value, 2.0]))
        after = bench_kernels._after(previous, indices)
        graph = io.StringIO()
        mx.export_to_dot(graph, after)
        assert "Exp" in graph.getvalue()
        assert after.dtype == mx.uint32 and after.tolist() == [[3, 1]]
    assert bench_kernels._after(None, indices) is indices


def test_what_fails_is_said_and_not_timed(tier: Path, monkeypatch: pytest.MonkeyPatch):
    def computed(layer: Layer, variant: Variant) -> mx.array:
        """Sound only as "signs"."""
        if variant.decode == "fast":
            raise RuntimeError("this GPU has too few\n  registers")
        affine = layer.affine("down", 2, mx.float32)
        y = DOWN.plain(layer, [affine], mx.float32)
        assert isinstance(y, mx.array)
        return y + (mx.nan if variant.decode == "wrong" else 0)

    monkeypatch.setattr(bench_kernels, "use_metal", lambda: True)
    only(replace(DOWN, ours=computed), monkeypatch)
    monkeypatch.setattr(bench_kernels, "DECODES", ("signs", "fast", "wrong", "floor"))
    monkeypatch.setattr(bench_kernels, "ROWS", (8,))
    monkeypatch.setattr(bench_kernels, "PIECES", (1,))
    found = bench_kernels.bench_kernels(load(tier), rounds=2)
    (result,) = found.results
    assert found.errors == [
        "tq1_0_down, fast, 8 rows, 1 piece: not timed: this GPU has too few registers",
        "tq1_0_down, wrong, 8 rows, 1 piece: not timed: its result is wrong: "
        "inf times the error allowed",
    ]
    timed = [arm.name.split(",")[0] for arm in result.arms if arm.runs]
    assert timed == ["MLX 2-bit", "MLX 4-bit", "signs", "floor"]
    assert result.best == Variant("signs", 8, 1)


@pytest.mark.parametrize("kernel", [CONVERSION, ROUTING, SORTING], ids=lambda kernel: kernel.name)
def test_one_wrong_number_is_found(
    kernel: Kernel, tier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Codes and experts have to be equal; a kernel without variants is told as ours."""
    model = load(tier)
    case = next(one for one in bench_cases.cases(model, 3, mx.float32) if one.kernel is kernel)

    def wrong(inputs: Any) -> mx.array | tuple[mx.array, ...]:
        found = kernel.plain(inputs, [], mx.float32)
        numbers, *others = [found] if isinstance(found, mx.array) else found
        flat = numbers.flatten()
        numbers = mx.concatenate([flat[:-1], flat[-1:] ^ 1]).reshape(numbers.shape)
        return (numbers, *others) if others else numbers

    def timed(ours: Any) -> KernelBench:
        given = [replace(case, kernel=replace(kernel, ours=ours))]
        monkeypatch.setattr(bench_kernels, "cases", lambda *_: given)
        return bench_kernels.bench_kernels(model, rounds=2)

    monkeypatch.setattr(bench_kernels, "use_metal", lambda: True)
    found = timed(wrong)
    reason = "not timed: its result is wrong: inf times the error allowed"
    assert found.errors == [f"{case.name}, ours: {reason}"]
    found = timed(lambda inputs: kernel.plain(inputs, [], mx.float32))
    assert found.errors == []
    bench_tables.print_kernels("tier", found)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("ours: ") and last.endswith(" of MLX's time")


def test_the_table_of_kernels(capsys: pytest.CaptureFixture[str]):
    """The best that may be chosen, beside the floor of its own geometry and MLX's."""
    times = {
        None: 200.0,
        Variant("signs"): 100.0,
        Variant("floor"): 80.0,
        Variant("signs", 4, 2): 120.0,
        Variant("floor", 4): 50.0,
    }
    arms = [Arm(None, 24_000, None, [400 / 1e6] * 2, "MLX 4-bit")]
    for variant, us in times.items():
        arms.append(Arm(variant, 12_000, None, [us / 1e6] * 2, own=variant is not None))
    result = KernelResult("tq1_0_down", 64, 80, 2, 1, arms)
    chip = Chip("Apple M1", "gpu", bandwidth_gb_s=0.2)
    bench_tables.print_kernels("tier", KernelBench(chip, "float16", [result]))
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines]
    assert ["µs", "signs", "floor"] in cells
    assert ["8", "rows,", "1", "piece", "100.0", "80.0"] in cells
    assert ["4", "rows,", "2", "pieces", "120.0", "-"] in cells
    assert lines[-2:] == [
        "MLX 2-bit: 200.0 µs, spread 0.0%, 0.06 GB/s, 30% of the chip's 0.2 GB/s",
        "signs, 8 rows, 1 piece: 100.0 µs, spread 0.0%, 0.12 GB/s,"
        " 60% of the chip's 0.2 GB/s, 1.25 of its floor's time, 0.25 of MLX 4-bit's time,"
        " 0.50 of MLX 2-bit's time",
    ]


def test_wrong_variants_are_not_timed_and_the_best_is_kept(
    tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The launcher is made to run the floor, which only loads, where it is told "wrong"."""
    file = tmp_path / "settings" / "kernels.json"
    file.parent.mkdir()
    file.write_text('{"chips": {"Apple M1": {"tq1_0_qmv": {"rows": 4}}}}')
    monkeypatch.setenv(variants.VARIANTS_VARIABLE, str(file))
    only(DOWN, monkeypatch)
    monkeypatch.setattr(bench_kernels, "ROWS", (4, 8))
    monkeypatch.setattr(bench_kernels, "PIECES", (1,))
    monkeypatch.setattr(bench_kernels, "PASS_SECONDS", 0.0)
    monkeypatch.setattr(kernels, "DECODES", ("signs", "wrong"))
    order = []
    real = bench_kernels._pass

    def recorded(contender: Any, inputs: Any, launches: int) -> float:
        order.append(contender.arm.name)
        return real(contender, inputs, launches)

    monkeypatch.setattr(bench_kernels, "_pass", recorded)
    with virtual_metal(count=False) as metal:
        monkeypatch.setattr(bench_kernels, "DECODES", ("signs", "wrong"))
        assert variants.saved_variant("tq1_0_down") is None
        done = run("bench", "--model", tier, "--kernels", "--save", "-n", 4, "--json", code=1)
        found = done.json
        launched = len(metal.launches)
        assert variants.saved_variant("tq1_0_down") is not None
        m = random_matrices(1, 2, 64, 80)
        call = mx.ones((1, 1, 80)), *m.packed, mx.zeros((1, 1), mx.uint32), mx.ones((1, 1))
        kernels.tq1_0_down(*call, mx.zeros((1, 64)))
    (kernel,) = found["kernels"]
    arms = {(arm["arm"], (arm["variant"] or {}).get("rows")): arm for arm in kernel["arms"]}
    theirs: list[Any] = [("MLX 2-bit", None), ("MLX 4-bit", None)]
    ours: list[Any] = [("signs", 4), ("signs", 8)]
    wrong: list[Any] = [("wrong", 4), ("wrong", 8)]
    assert list(arms) == [*theirs, *ours, *wrong]
    assert (kernel["out_features"], kernel["in_features"]) == (64, 80)
    for name in wrong:
        assert "its result is wrong" in arms[name]["error"]
        assert arms[name]["seconds"] is None
    assert "tq1_0_down, wrong, 4 rows, 1 piece: not timed" in done.err
    for name in (*theirs, *ours):
        assert_summary(arms[name]["seconds"], 4)
        assert arms[name]["error"] is None
    # The sound ones: two layers checked, one launch to see how long it takes, one in each round.
    # The wrong ones: the first layer.
    assert launched == 2 * (2 + 1 + 4) + 2
    rounds = [order[at : at + 4] for at in range(4, 20, 4)]
    assert all(sorted(turn) == sorted(order[:4]) for turn in rounds)
    assert len(set(map(tuple, rounds))) > 2

    best = min(ours, key=lambda name: arms[name]["seconds"]["median"])
    assert kernel["best"] == arms[best]["variant"]
    chip = variants.chip_name()
    assert json.loads(file.read_text())["chips"] == {
        "Apple M1": {"tq1_0_qmv": {"rows": 4}},
        chip: {"tq1_0_down": kernel["best"]},
    }
    assert list(file.parent.iterdir()) == [file]
    template = metal.launches[-1].template
    assert (template["DECODE"], template["ROWS"]) == (0, best[1])


def test_variants_that_do_not_fit_are_not_timed():
    """Rows of 640 trits are one piece of 128 bytes; 5 rows do not hold 8."""
    fit = bench_kernels.variants_to_time("tq1_0_qmv", 640, 5)
    assert {(v.rows, v.pieces) for v in fit} == {(4, 1)} and len(fit) == 2
    assert len(bench_kernels.variants_to_time("tq1_0_qmv", 641, 16)) == 2 * 3 * 2
    assert {v.rows for v in bench_kernels.variants_to_time("tq1_0_qmv", 641, 16, 4)} == {2, 4}


def test_the_default_is_launched_unless_another_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    m = random_matrices(1, 1, 8, 20)
    call = mx.ones((1, 20)), *m.packed, mx.zeros((1,), mx.uint32)
    file = tmp_path / "kernels.json"
    kept = {"chips": {variants.chip_name(): {"tq1_0_qmv": {"rows": 2, "simdgroups": 1}}}}
    file.write_text(json.dumps(kept))
    with virtual_metal(count=False) as metal:
        kernels.tq1_0_qmv(*call)
        monkeypatch.setenv(variants.VARIANTS_VARIABLE, str(file))
        kernels.tq1_0_qmv(*call)
        kernels.tq1_0_qmv(*call, variant=Variant())
    default = kernels.VARIANTS["tq1_0_qmv"]
    shapes = [(one.template["ROWS"], one.template["SIMDGROUPS"]) for one in metal.launches]
    assert shapes == [(default.rows, default.simdgroups), (2, 1), (8, 2)]


def test_a_file_that_is_not_sound_is_ignored(tmp_path: Path):
    def of_this_chip(**fields: Any) -> str:
        return json.dumps({"chips": {variants.chip_name(): {"tq1_0_qmv": fields}}})

    sound = of_this_chip(decode="signs", rows=16, pieces=2, simdgroups=4)
    file = tmp_path / "sound.json"
    file.write_text(sound)
    assert variants.saved_variants(file) == {"tq1_0_qmv": Variant("signs", 16, 2, 4)}
    for number, text in enumerate(
        (
            *("", "{", "[]", "{}", '{"chips": 3}', "[" * 100_000, "\x00"),
            *(of_this_chip(decode=decode) for decode in ("floor", "exponent", "exact", 1, None)),
            *(of_this_chip(rows=rows) for rows in (0, 3, 32, "8", True, 8.0, [8])),
            *(
                of_this_chip(pieces=3),
                of_this_chip(load_bits=32),
                of_this_chip(simdgroups=33),
                of_this_chip(threads=1),
            ),
        )
    ):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        with pytest.warns(UserWarning, match=f"{number}.json: ignored: not a file of kernel"):
            assert variants.saved_variants(file) == {}
    assert variants.saved_variants(tmp_path / "none.json") == {}


def test_where_variants_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variants.VARIANTS_VARIABLE, "")
    assert variants.variants_file() is None
    monkeypatch.delenv(variants.VARIANTS_VARIABLE)
    monkeypatch.setattr(variants.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert variants.variants_file() == tmp_path / "outlier-mlx" / "kernels.json"
    monkeypatch.setattr(variants.sys, "platform", "darwin")
    monkeypatch.setenv("HOME", str(tmp_path))
    support = tmp_path / "Library" / "Application Support"
    assert variants.variants_file() == support / "outlier-mlx" / "kernels.json"


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_one_wrong_trit_is_found(dtype: mx.Dtype):
    """In every row of the widest matrix there is, after rounding to what a kernel returns."""
    m = random_matrices(1, 1, 64, 13824)
    x = mx.random.normal((13824,), key=mx.random.key(1))
    exact = m.trits[0].astype("float32") @ mx.array(x)
    wrong = m.trits.copy()
    for row in range(64):
        wrong[0, row, row] = (wrong[0, row, row] + 2) % 3 - 1
    tolerance = bench_kernels.TOLERANCE, bench_kernels.ROUNDING[dtype]
    expected = mx.array(exact)
    assert bench_kernels.excess(expected.astype(dtype), expected, tolerance) <= 1
    found = mx.array(wrong[0].astype("float32") @ mx.array(x)).astype(dtype)
    assert bench_kernels.excess(found, expected, tolerance) > 1
    nothing = mx.zeros((3,))
    assert bench_kernels.excess(nothing, nothing, tolerance) == 0
    assert bench_kernels.excess(nothing + mx.nan, nothing, tolerance) == mx.inf
