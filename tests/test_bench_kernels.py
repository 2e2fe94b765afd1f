"""`bench --kernels`: what is timed, what is kept of it, and what is found to be wrong."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels.emulator import virtual_metal
from outlier_mlx.engine.chips import Chip
from outlier_mlx.measure import bench_cases, bench_kernels, bench_tables
from outlier_mlx.measure.bench_cases import KERNELS, Layer
from outlier_mlx.measure.bench_kernels import Arm, KernelBench, KernelResult
from outlier_mlx.runtime import kernels, variants
from outlier_mlx.runtime.variants import Variant
from tests.engine import as_array, load
from tests.kernel_cases import random_matrices
from tests.program import run
from tests.test_bench import assert_summary

DOWN = KERNELS[1]


def test_without_metal_only_the_plain_path_is_timed(tier: Path):
    done = run("bench", "--model", tier, "--kernels", "-n", 2, "-b", 3, "--json")
    assert done.err.startswith("no Metal here, so there are no kernels to time")
    found = done.json
    assert [k["kernel"] for k in found["kernels"]] == ["tq1_0_swiglu", "tq1_0_down", "tq1_0_qmv"]
    for kernel in found["kernels"]:
        assert kernel["pairs"] == 6 and kernel["best"] is None
        (arm,) = kernel["arms"]
        assert arm["arm"] == "mlx" and arm["error"] is None
        assert_summary(arm["seconds"], 2)


def test_what_kernels_are_timed_on(tier: Path, monkeypatch: pytest.MonkeyPatch):
    """Layers until enough is read; experts and weights as when decoding."""
    model = load(tier)
    layers = bench_cases.decode_layers(model, 3, mx.float16)
    assert len(layers) == 2
    for layer in layers:
        assert layer.indices.shape == (3, 2) and layer.x.dtype == layer.shared.dtype == mx.float16
        assert all(len(set(experts)) == 2 for experts in as_array(layer.indices))
        assert layer.nbytes("gate") == 6 * 80 * (16 + 4)
        affine = [layer.transcoded("down", mx.float32)]
        mixed = DOWN.plain(layer, affine, layer.places, mx.float32)
        routed = as_array(mixed) - as_array(layer.shared)
        assert 0.5 < np.sqrt((routed**2).mean()) < 2
    own = {id(model.layers[n].mlp.switch_mlp.gate_proj.weight) for n in (1, 3)}
    assert {id(layer.gate[0]) for layer in layers} == own
    monkeypatch.setattr(bench_cases, "ENOUGH_BYTES", 1)
    assert len(bench_cases.decode_layers(model, 1, mx.float32)) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_the_plain_path_is_float32_on_the_cpu(dtype: str, tier: Path):
    found = bench_kernels.bench_kernels(load(tier, dtype), rounds=1)
    assert found.dtype == dtype and found.errors == []
    assert [result.arms[0].nbytes for result in found.results] == [
        2 * 2 * 80 * (64 // 4 + 2 * 4),  # two matrices of two experts; one group, in 4 bytes each
        2 * 64 * (96 // 4 + 3 * 2 * 4),
        2 * 80 * (64 // 4 + 2 * 4),
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
    def computed(layer: Layer, indices: mx.array, variant: Variant) -> mx.array:
        """Sound only as "signs"."""
        if variant.decode == "fast":
            raise RuntimeError("this GPU has too few\n  registers")
        affine = layer.transcoded("down", mx.float32)
        y = DOWN.plain(layer, [affine], layer.places, mx.float32)
        return y + (mx.nan if variant.decode == "wrong" else 0)

    monkeypatch.setattr(bench_kernels, "use_metal", lambda: True)
    monkeypatch.setattr(bench_kernels, "KERNELS", (replace(DOWN, ours=computed),))
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
    assert timed == ["MLX 2-bit", "signs", "floor"]
    assert result.best == Variant("signs", 8, 1)


def test_the_table_of_kernels(capsys: pytest.CaptureFixture[str]):
    """The best that may be chosen, beside the floor of its own geometry and MLX's."""
    times = {
        None: 200.0,
        Variant("signs"): 100.0,
        Variant("floor"): 80.0,
        Variant("signs", 4, 2): 120.0,
        Variant("floor", 4): 50.0,
    }
    arms = [Arm(variant, 12_000, None, [us / 1e6] * 2) for variant, us in times.items()]
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
        " 60% of the chip's 0.2 GB/s, 1.25 of its floor's time, 0.50 of MLX's time",
    ]


def test_wrong_variants_are_not_timed_and_the_best_is_kept(
    tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The launcher is made to run the floor, which only loads, where it is told "wrong"."""
    file = tmp_path / "settings" / "kernels.json"
    file.parent.mkdir()
    file.write_text('{"chips": {"Apple M1": {"tq1_0_qmv": {"rows": 4}}}}')
    monkeypatch.setenv(variants.VARIANTS_VARIABLE, str(file))
    monkeypatch.setattr(bench_kernels, "KERNELS", (DOWN,))
    monkeypatch.setattr(bench_kernels, "ROWS", (4, 8))
    monkeypatch.setattr(bench_kernels, "PIECES", (1,))
    monkeypatch.setattr(bench_kernels, "PASS_SECONDS", 0.0)
    monkeypatch.setattr(kernels, "DECODES", ("signs", "wrong"))
    order = []
    real = bench_kernels._pass

    def recorded(contender: Any, layers: int, launches: int) -> float:
        order.append(contender.arm.name)
        return real(contender, layers, launches)

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
    ours, wrong = [("signs", 4), ("signs", 8)], [("wrong", 4), ("wrong", 8)]
    assert list(arms) == [("mlx", None), *ours, *wrong]
    assert (kernel["out_features"], kernel["in_features"]) == (64, 80)
    for name in wrong:
        assert "its result is wrong" in arms[name]["error"]
        assert arms[name]["seconds"] is None
    assert "tq1_0_down, wrong, 4 rows, 1 piece: not timed" in done.err
    for name in (("mlx", None), *ours):
        assert_summary(arms[name]["seconds"], 4)
        assert arms[name]["error"] is None
    # The sound ones: two layers checked, one launch to see how long it takes, one in each round.
    # The wrong ones: the first layer.
    assert launched == 2 * (2 + 1 + 4) + 2
    rounds = [order[at : at + 3] for at in range(3, 15, 3)]
    assert all(sorted(turn) == sorted(order[:3]) for turn in rounds)
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
