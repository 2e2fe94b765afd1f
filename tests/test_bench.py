"""`bench`: what it counts and divides, which arms it times, and what it keeps."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import outlier_mlx
from kernels.emulator import virtual_metal
from outlier_mlx import bench, bench_cases, bench_kernels, bench_tables, chips
from outlier_mlx.bench import BenchOptions, BenchResult, Runs
from outlier_mlx.bench_cases import KERNELS, Layer
from outlier_mlx.bench_kernels import Arm, KernelBench, KernelResult
from outlier_mlx.chips import BANDWIDTHS, Chip, parse_gpu_cores, published_bandwidth
from outlier_mlx.cli import app
from outlier_mlx.runtime import kernels, variants
from outlier_mlx.runtime.variants import Variant
from tests.builders import Dims, write_overlay
from tests.engine import as_array, load, tier_of
from tests.kernel_cases import random_matrices

DOCS = Path(__file__).resolve().parents[1] / "docs" / "bench.md"
DOWN = KERNELS[1]


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    return tier_of(write_overlay(folder / "overlay").path, None, folder / "tier")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def assert_summary(found: dict[str, Any], count: int) -> None:
    """Median and extremes are those of the runs."""
    runs = found["runs"]
    assert len(runs) == count and min(runs) > 0
    assert (found["min"], found["median"], found["max"]) == (min(runs), median(runs), max(runs))


# Reading and writing


@pytest.mark.parametrize("batch", [1, 2])
def test_json(tier: Path, batch: int):
    done = run("--model", tier, "-p", 24, "-g", 8, "-n", 3, "-b", batch, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["model"] == "tier" and found["dtype"] == "float32"
    assert found["options"] == {
        "prompt_tokens": 24,
        "generation_tokens": 8,
        "batch_size": batch,
        "num_trials": 3,
        "prefill_step_size": 2048,
        "delay": 0,
    }
    assert found["chip"]["device"] == "cpu" and found["chip"]["bandwidth_gb_s"] is None
    assert_summary(found["prompt_tokens_per_s"], 3)
    assert_summary(found["generation_tokens_per_s"], 3)
    weights = sum(f.stat().st_size for f in tier.glob("*.safetensors"))
    assert weights < found["peak_memory_gb"] * 1e9 < 20 * weights
    decode = found["decode"]
    assert decode["of_bandwidth"] is None
    if batch == 1:
        per_second = found["generation_tokens_per_s"]["median"] * 7 / 8
        assert decode["gb_per_s"] == pytest.approx(decode["bytes_per_token"] * per_second / 1e9)
    else:
        assert decode["bytes_per_token"] is decode["gb_per_s"] is None


def test_every_run_has_its_full_length(tier: Path, monkeypatch: pytest.MonkeyPatch):
    """No token ends a text, one run more than are counted, and the same prompt for all."""
    model, tokenizer = outlier_mlx.load(tier)
    every = set(range(288))
    tokenizer.eos_token_ids = every
    prompts: list[list[int]] = []
    lengths: list[tuple[int, int]] = []
    speeds: list[tuple[float, float]] = []

    def recorded(model: Any, tokenizer: Any, prompt: list[int], **options: Any) -> Any:
        prompts.append(prompt)
        responses = list(real(model, tokenizer, prompt, **options))
        lengths.append((responses[-1].prompt_tokens, responses[-1].generation_tokens))
        speeds.append((responses[-1].prompt_tps, responses[-1].generation_tps))
        yield from responses

    real = bench.stream_generate
    monkeypatch.setattr(bench, "stream_generate", recorded)
    done: list[tuple[int, int]] = []
    options = BenchOptions(prompt_tokens=9, generation_tokens=6, num_trials=2)
    found = bench.bench_model(model, tokenizer, options, lambda *counts: done.append(counts))
    counted = zip(found.prompt_tps.values, found.generation_tps.values, strict=True)
    assert list(counted) == speeds[1:]
    assert lengths == [(9, 6)] * 3
    assert prompts[0] == prompts[1] == prompts[2] and set(prompts[0]) <= every
    assert done == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert tokenizer.eos_token_ids == every


def weights_read(dims: Dims, expert_bytes: int) -> int:
    """Bytes of an unquantized float32 model that a token reads, from its dimensions alone."""
    kv = dims.hidden // dims.heads * dims.kv_heads
    attention = 2 * dims.hidden**2 + 2 * dims.hidden * kv + dims.hidden + 2 * kv
    ffn = 3 * dims.hidden * dims.intermediate
    layer = attention + ffn + 2 * dims.hidden
    routed = len(dims.routed_layers) * (dims.hidden + 1) * dims.experts  # routers and alphas
    embedding = dims.hidden * ((0 if dims.tied else 1) + dims.vocab)  # one row, and the output
    params = dims.layers * layer + routed + embedding + dims.hidden
    return 4 * params + len(dims.routed_layers) * dims.top_k * expert_bytes


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_token(tied: bool, tmp_path: Path):
    built = write_overlay(tmp_path / "overlay", tied=tied)
    dims, tier = built.dims, tier_of(built.path, None, tmp_path / "tier")
    hidden, width = dims.hidden, dims.expert_intermediate
    cache = 2 * 4 * dims.layers * dims.hidden // dims.heads * dims.kv_heads * 100

    # Rows of 64 trits take 16 bytes and rows of 80 take 16 too; a scale each.
    packed = 2 * width * (16 + 4) + hidden * (16 + 4)
    with virtual_metal(count=False):
        model = load(tier)
        assert bench.decode_bytes(model, 0) == weights_read(dims, packed)
        assert bench.decode_bytes(model, 100) == weights_read(dims, packed) + cache
    # MLX's copy: 2 bits a weight, 80 padded to 96; a group of 64 or three of 32, 8 bytes each.
    copied = 2 * width * (hidden // 4 + 8) + hidden * (96 // 4 + 3 * 8)
    assert bench.decode_bytes(load(tier), 0) == weights_read(dims, copied)
    assert bench.decode_bytes(nn.Linear(2, 2), 0) is None


# Bandwidth


def result_on(chip: Chip) -> BenchResult:
    """9 steps of 1 GB for the 10 tokens that a second has in the median: 9 GB/s."""
    speeds = Runs((20.0, 10.0, 8.0))
    options = BenchOptions(generation_tokens=10, num_trials=3)
    return BenchResult(chip, "float16", options, speeds, speeds, 1.5, 1_000_000_000)


def test_share_of_the_bandwidth(capsys: pytest.CaptureFixture[str]):
    known = result_on(Chip("Apple M1", "gpu", 8, 16, 12.0))
    assert (known.decode_gb_s, known.of_bandwidth) == (9.0, 0.75)
    bench_tables.print_result("tier", known)
    shown = capsys.readouterr()
    assert "9 GB/s, 75% of the chip's 12 GB/s" in shown.out
    assert ["tg10", "10.0", "120.0%"] in [line.split() for line in shown.out.splitlines()]
    assert shown.err == ""

    note = "no bandwidth is known for Apple M99"
    unknown = result_on(Chip("Apple M99", "gpu", note=note))
    assert (unknown.decode_gb_s, unknown.of_bandwidth) == (9.0, None)
    bench_tables.print_result("tier", unknown)
    shown = capsys.readouterr()
    assert "of the chip" not in shown.out and shown.err == note + "\n"


def test_published_bandwidth():
    assert published_bandwidth("Apple M1 Max", 24, 32) == (400, None)
    assert published_bandwidth("Apple M3 Max", 30, 36) == (300, None)
    assert published_bandwidth("Apple M3 Max", 40, 48) == (400, None)
    assert published_bandwidth("Apple M6", None, 16) == (153, None)
    assert published_bandwidth("Apple M6", 12, 24) == (170, None)
    for cores in (None, 35):
        figure, why = published_bandwidth("Apple M3 Max", cores, 64)
        assert figure is None and why is not None and "300 or 400" in why
    assert published_bandwidth("Apple M6", 12, 48)[0] is None
    for name in ("Apple M1 (Virtual)", "Apple Paravirtual device", "Intel"):
        assert published_bandwidth(name, 8, 8) == (None, f"no bandwidth is known for {name}")


def test_every_bandwidth_has_a_source():
    """The table in docs/bench.md is the one that is used, with a link in each line."""
    table = DOCS.read_text().partition("## Bandwidths")[2]
    lines = [line for line in table.splitlines() if line.startswith("| M")]
    documented = []
    for line in lines:
        name, configuration, figure, source = (c.strip() for c in line.strip("|").split("|"))
        assert "](https://" in source, line
        documented.append((name, configuration, figure))
    used = []
    for row in BANDWIDTHS:
        which = f"{row.gpu_cores} GPU cores" if row.gpu_cores else ""
        which = which or (f"{' or '.join(map(str, row.memory))} GB" if row.memory else "all")
        used.append((row.name.removeprefix("Apple "), which, f"{row.gb_s:g}"))
    assert documented == used


def test_gpu_cores():
    report = {"SPDisplaysDataType": [{"_name": "a display"}, {"sppci_cores": "38"}]}
    assert parse_gpu_cores(json.dumps(report)) == 38
    for text in ("", "[]", '{"SPDisplaysDataType": []}', '{"SPDisplaysDataType": [3]}'):
        assert parse_gpu_cores(text) is None
    assert parse_gpu_cores('{"SPDisplaysDataType": [{"sppci_cores": "many"}]}') is None


def test_this_chip_is_a_cpu():
    chip = chips.this_chip()
    assert chip.device == "cpu" and chip.bandwidth_gb_s is None
    assert chip.note is not None and "CPU" in chip.note


# Kernels


def test_without_metal_only_the_plain_path_is_timed(tier: Path):
    done = run("--model", tier, "--kernels", "-n", 2, "-b", 3, "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("no Metal here, so there are no kernels to time")
    found = json.loads(done.stdout)
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
        """Sound only as "exponent"."""
        if variant.decode == "exact":
            raise RuntimeError("this GPU has too few\n  registers")
        affine = layer.transcoded("down", mx.float32)
        y = DOWN.plain(layer, [affine], layer.places, mx.float32)
        return y + (mx.nan if variant.decode == "telescoped" else 0)

    monkeypatch.setattr(bench_kernels, "use_metal", lambda: True)
    monkeypatch.setattr(bench_kernels, "KERNELS", (replace(DOWN, ours=computed),))
    monkeypatch.setattr(bench_kernels, "ROWS", (8,))
    monkeypatch.setattr(bench_kernels, "LOAD_BITS", (64,))
    found = bench_kernels.bench_kernels(load(tier), rounds=2)
    (result,) = found.results
    assert found.errors == [
        "tq1_0_down, exact, 8 rows, 64-bit loads: not timed: this GPU has too few registers",
        "tq1_0_down, telescoped, 8 rows, 64-bit loads: not timed: its result is wrong: "
        "inf times the error allowed",
    ]
    timed = [arm.name.split(",")[0] for arm in result.arms if arm.runs]
    assert timed == ["MLX 2-bit", "exponent", "floor"]
    assert result.best == Variant("exponent", 8, 64)


def test_the_table_of_kernels(capsys: pytest.CaptureFixture[str]):
    """The best that may be chosen, beside the floor of its own geometry and MLX's."""
    times = {
        None: 200.0,
        Variant("exponent"): 110.0,
        Variant("exact"): 100.0,
        Variant("telescoped"): 90.0,
        Variant("floor"): 80.0,
        Variant("exact", 4): 120.0,
        Variant("floor", 4): 50.0,
    }
    arms = [Arm(variant, 12_000, None, [us / 1e6] * 2) for variant, us in times.items()]
    result = KernelResult("tq1_0_down", 64, 80, 2, 1, arms)
    chip = Chip("Apple M1", "gpu", bandwidth_gb_s=0.2)
    bench_tables.print_kernels("tier", KernelBench(chip, "float16", [result]))
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines]
    assert ["µs", "exponent", "exact", "telescoped", "floor"] in cells
    assert ["8", "rows,", "32", "bits", "110.0", "100.0", "90.0", "80.0"] in cells
    assert ["4", "rows,", "32", "bits", "-", "120.0", "-", "50.0"] in cells
    assert lines[-2:] == [
        "MLX 2-bit: 200.0 µs, spread 0.0%, 0.06 GB/s, 30% of the chip's 0.2 GB/s",
        "exact, 8 rows, 32-bit loads: 100.0 µs, spread 0.0%, 0.12 GB/s,"
        " 60% of the chip's 0.2 GB/s, 1.25 of its floor's time, 0.50 of MLX's time",
    ]


def test_wrong_variants_are_not_timed_and_the_best_is_kept(
    tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The launcher is made to run the floor, which only loads, where it is told "telescoped"."""
    file = tmp_path / "settings" / "kernels.json"
    file.parent.mkdir()
    file.write_text('{"chips": {"Apple M1": {"tq1_0_qmv": {"rows": 4}}}}')
    monkeypatch.setenv(variants.VARIANTS_VARIABLE, str(file))
    monkeypatch.setattr(bench_kernels, "KERNELS", (DOWN,))
    monkeypatch.setattr(bench_kernels, "ROWS", (4,))
    monkeypatch.setattr(bench_kernels, "LOAD_BITS", (32,))
    monkeypatch.setattr(bench_kernels, "PASS_SECONDS", 0.0)
    monkeypatch.setattr(kernels, "DECODES", ("exponent", "exact", "none", "telescoped"))
    order = []
    real = bench_kernels._pass

    def recorded(contender: Any, layers: int, launches: int) -> float:
        order.append(contender.arm.name)
        return real(contender, layers, launches)

    monkeypatch.setattr(bench_kernels, "_pass", recorded)
    with virtual_metal(count=False) as metal:
        monkeypatch.setattr(bench_kernels, "DECODES", ("exponent", "exact", "telescoped"))
        assert variants.saved_variant("tq1_0_down") is None
        done = run("--model", tier, "--kernels", "--save", "-n", 4, "--json")
        assert done.exit_code == 1, done.output
        found = json.loads(done.stdout)
        launched = len(metal.launches)
        assert variants.saved_variant("tq1_0_down") is not None
        m = random_matrices(1, 2, 64, 80)
        call = mx.ones((1, 1, 80)), *m.packed, mx.zeros((1, 1), mx.uint32), mx.ones((1, 1))
        kernels.tq1_0_down(*call, mx.zeros((1, 64)))
    (kernel,) = found["kernels"]
    arms = {arm["arm"]: arm for arm in kernel["arms"]}
    assert list(arms) == ["mlx", "exponent", "exact", "telescoped"]
    assert (kernel["out_features"], kernel["in_features"]) == (64, 80)
    assert "its result is wrong" in arms["telescoped"]["error"]
    assert arms["telescoped"]["seconds"] is None
    assert "tq1_0_down, telescoped, 4 rows, 32-bit loads: not timed" in done.stderr
    sound = ("mlx", "exponent", "exact")
    for name in sound:
        assert_summary(arms[name]["seconds"], 4)
        assert arms[name]["error"] is None
    # The sound ones: two layers checked, one launch to see how long it takes, one in each round.
    # The wrong one: the first layer.
    assert launched == 2 * (2 + 1 + 4) + 1
    rounds = [order[at : at + 3] for at in range(3, 15, 3)]
    assert all(sorted(turn) == sorted(order[:3]) for turn in rounds)
    assert len(set(map(tuple, rounds))) > 2

    best = min(("exponent", "exact"), key=lambda name: arms[name]["seconds"]["median"])
    assert kernel["best"] == arms[best]["variant"]
    chip = variants.chip_name()
    assert json.loads(file.read_text())["chips"] == {
        "Apple M1": {"tq1_0_qmv": {"rows": 4}},
        chip: {"tq1_0_down": kernel["best"]},
    }
    assert list(file.parent.iterdir()) == [file]
    template = metal.launches[-1].template
    assert template["ROWS"] == 4
    assert template["DECODE"] == ("exponent", "exact").index(best)


def test_variants_that_do_not_fit_are_not_timed():
    """Rows of 60 trits take 12 bytes, no whole number of 64-bit loads; nor do 5 rows hold 8."""
    fit = bench_kernels.variants_to_time("tq1_0_qmv", 60, 5)
    assert {(v.rows, v.load_bits) for v in fit} == {(4, 32)} and len(fit) == 4
    assert len(bench_kernels.variants_to_time("tq1_0_qmv", 80, 16)) == 4 * 3 * 2


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

    sound = of_this_chip(decode="exact", rows=16, load_bits=64, simdgroups=4)
    file = tmp_path / "sound.json"
    file.write_text(sound)
    assert variants.saved_variants(file) == {"tq1_0_qmv": Variant("exact", 16, 64, 4)}
    for number, text in enumerate(
        (
            *("", "{", "[]", "{}", '{"chips": 3}', "[" * 100_000, "\x00"),
            *(of_this_chip(decode=decode) for decode in ("floor", "telescoped", "fast", 1, None)),
            *(of_this_chip(rows=rows) for rows in (0, 3, 32, "8", True, 8.0, [8])),
            *(of_this_chip(load_bits=128), of_this_chip(simdgroups=33), of_this_chip(threads=1)),
        )
    ):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        with pytest.warns(UserWarning, match=f"{number}.json: ignored, not a file of kernel"):
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


# What is refused


@pytest.mark.parametrize(
    "flags",
    ["--save", "-g 1", "-p 0", "-n 0", "-b 0", "--delay -1", "--prefill-step-size 0", "--dtype f8"],
)
def test_flags(flags: str, tier: Path):
    done = run("--model", tier, *flags.split())
    assert done.exit_code == 2 and flags.split()[0] in done.stderr and done.stdout == ""


def test_no_kernels_to_choose_from(tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "kernels.json"
    monkeypatch.setenv(variants.VARIANTS_VARIABLE, str(file))
    done = run("--model", tier, "--kernels", "--save")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: --save: no Metal here, so there are no kernels to choose from\n"
    assert not file.exists()


def test_no_ternary_experts(tier: Path, tmp_path: Path):
    built = write_overlay(tmp_path / "overlay", expert_intermediate=96)
    other = tier_of(built.path, None, tmp_path / "tier", experts="affine2")
    done = run("--model", other, "--kernels", "-n", 1)
    assert done.exit_code == 1
    assert done.stderr.endswith("error: this model has no ternary experts to time kernels on\n")
    assert run("--model", other, "-p", 4, "-g", 2, "-n", 1).exit_code == 0


def test_defaults_are_those_of_mlx_lm():
    from mlx_lm.benchmark import setup_arg_parser

    theirs = vars(setup_arg_parser().parse_args([]))
    ours = vars(BenchOptions())
    assert {name: theirs[name] for name in ours if theirs[name] != ours[name]} == {
        "generation_tokens": 1024
    }
    assert replace(BenchOptions(), generation_tokens=1024) == BenchOptions(512, 1024, 1, 5, 2048, 0)
