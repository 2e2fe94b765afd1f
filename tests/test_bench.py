"""`bench`: what it counts and divides, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.nn as nn
import pytest

import outlier_mlx
from kernels.emulator import virtual_metal
from outlier_mlx.engine import chips
from outlier_mlx.engine.buffers import MAX_MB, MAX_OPS
from outlier_mlx.engine.chips import (
    BANDWIDTHS,
    Chip,
    named_chip,
    parse_gpu_cores,
    published_bandwidth,
)
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure import bench, bench_tables, perplexity, speeds
from outlier_mlx.measure.bench import BenchOptions, BenchResult, Runs
from outlier_mlx.measure.disk import DiskSpeed
from outlier_mlx.measure.expected import Machine, work_of
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.runtime import variants
from outlier_mlx.storage.shards import read_shards
from tests.builders import Dims, write_overlay
from tests.engine import load, tier_of
from tests.program import ROOT, run

DOCS = ROOT / "docs" / "bench.md"


def assert_summary(found: dict[str, Any], count: int) -> None:
    """Median and extremes are those of the runs."""
    runs = found["runs"]
    assert len(runs) == count and min(runs) > 0
    assert (found["min"], found["median"], found["max"]) == (min(runs), median(runs), max(runs))


# Reading and writing


@pytest.mark.parametrize("batch", [1, 2])
def test_json(tier: Path, batch: int):
    command = "bench", "--model", tier, "-p", 24, "-g", 8, "-n", 3, "-b", batch, "--json"
    found = run(*command, env={MAX_OPS: "70"}).json
    assert found["command_buffers"] == {MAX_OPS: "70", MAX_MB: None}
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

    note = "no published bandwidth for Apple M99"
    unknown = result_on(Chip("Apple M99", "gpu", note=note))
    assert (unknown.decode_gb_s, unknown.of_bandwidth) == (9.0, None)
    bench_tables.print_result("tier", unknown)
    shown = capsys.readouterr()
    assert "of the chip" not in shown.out and shown.err == note + "\n"


@pytest.mark.parametrize(
    ("text", "gb_s", "cores", "memory"),
    [
        ("M2 Pro", 200, None, None),
        (" apple  m2 PRO", 200, None, None),
        ("M3 Max 40", 400, 40, None),
        ("M3 Max 30-core", 300, 30, None),
        ("Apple M6 16GB", 153, None, 16),
    ],
)
def test_a_chip_is_named(text: str, gb_s: float, cores: int | None, memory: int | None):
    chip = named_chip(text)
    assert (chip.bandwidth_gb_s, chip.gpu_cores, chip.memory_gb) == (gb_s, cores, memory)
    assert chip.name.startswith("Apple M") and chip.device == "gpu"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("M9", "no chip 'M9' is known; known: M1, M1 Pro"),
        ("", "no chip '' is known"),
        ("M2 4x", "no chip 'M2 4x' is known"),
        ("M3 Max", "300 or 400 GB/s.* name that, too, such as 'M3 Max 40'"),
        ("M3 Max 7", "such as 'M3 Max 40'"),
        ("M6", "153 or 170 GB/s.* such as 'M6 32GB'"),
    ],
)
def test_what_names_no_chip(text: str, reason: str):
    with pytest.raises(OutlierError, match=reason):
        named_chip(text)


def test_memory_known_otherwise():
    assert named_chip("M6", 24).bandwidth_gb_s == 170
    assert named_chip("M6 16GB", 24).bandwidth_gb_s == 153


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
        assert published_bandwidth(name, 8, 8) == (None, f"no published bandwidth for {name}")


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


# What is refused


@pytest.mark.parametrize(
    "flags",
    ["--save", "-g 1", "-p 0", "-n 0", "-b 0", "--delay -1", "--prefill-step-size 0", "--dtype f8"],
)
def test_flags(flags: str, tier: Path):
    done = run("bench", "--model", tier, *flags.split(), code=2)
    assert flags.split()[0] in done.err and done.out == ""


def test_no_kernels_to_choose_from(tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "kernels.json"
    monkeypatch.setenv(variants.VARIANTS_VARIABLE, str(file))
    done = run("bench", "--model", tier, "--kernels", "--save", code=1)
    assert done.out == ""
    assert done.err == "error: --save: no Metal here, so there are no kernels to choose from\n"
    assert not file.exists()


def test_no_ternary_experts(tier: Path, tmp_path: Path):
    built = write_overlay(tmp_path / "overlay", expert_intermediate=96)
    other = tier_of(built.path, None, tmp_path / "tier", experts="affine2")
    done = run("bench", "--model", other, "--kernels", "-n", 1, code=1)
    assert done.err.endswith("error: this model has no ternary experts to time kernels on\n")
    run("bench", "--model", other, "-p", 4, "-g", 2, "-n", 1)


def test_more_tokens_than_the_context(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "context_length", lambda config: 12)
    told = "prompt and text have 13 tokens, but the model's context length is 12"
    bench = "bench", tier, "-p", 9, "-n", 1
    assert told in run(*bench, "-g", 4).err
    assert "context length" not in run(*bench, "-g", 3).err


def test_defaults_are_those_of_mlx_lm():
    from mlx_lm.benchmark import setup_arg_parser

    theirs = vars(setup_arg_parser().parse_args([]))
    ours = vars(BenchOptions())
    assert {name: theirs[name] for name in ours if theirs[name] != ours[name]} == {
        "generation_tokens": 1024
    }
    assert replace(BenchOptions(), generation_tokens=1024) == BenchOptions(512, 1024, 1, 5, 2048, 0)


# What was to be expected


def test_expected_beside_measured(tier: Path, monkeypatch: pytest.MonkeyPatch):
    """In the table and in JSON; here from products that are measured."""
    monkeypatch.setattr(speeds, "speed_here", lambda chip, quantized: FAST)
    command = "bench", "--model", tier, "-p", 24, "-g", 8, "-n", 2
    found = run(*command, "--json").json
    expected = found["expected"]
    work = work_of(read_shards(tier), describe(raw_config(tier)), 28, "tier")
    assert work is not None
    seconds = {"memory": work.weights / 1e9, "launches": work.launches * 1e-6, "disk": 0.0}
    assert expected["decode"]["seconds"] == pytest.approx(seconds)
    per_second = 1 / sum(seconds.values())
    assert expected["decode"]["tokens_per_s"] == pytest.approx(per_second)
    steps = found["generation_tokens_per_s"]["median"] * 7 / 8
    assert expected["of_decode"] == pytest.approx(steps / per_second)
    assert expected["prompt_tokens_per_s"] == pytest.approx(2e9 / work.prompt_weights)
    prompt = found["prompt_tokens_per_s"]["median"] / expected["prompt_tokens_per_s"]
    assert expected["of_prompt"] == pytest.approx(prompt)
    assert (expected["source"], expected["about"]) == ("given", "as fast as said")

    lines = run(*command).out.splitlines()
    rows = {words[0]: words for words in map(str.split, lines) if words}
    assert rows["tokens/s"] == ["tokens/s", "spread", "at", "most", "of", "that"]
    assert rows["tg8"][3] == f"{per_second:.1f}" and rows["tg8"][4].endswith("%")
    assert rows["pp24"][3] == f"{2e9 / work.prompt_weights:.1f}"
    assert "expected: as fast as said (given)" in lines


FAST = speeds.Speed(Machine(None, 1e9, 2e9, 1e-6), "given", "as fast as said")


def test_expected_of_a_chip(tier: Path):
    """By the published bandwidth; nothing is known of prompts."""
    expected = speeds.expectation(tier, Chip("Apple M1", "gpu", 8, 16, 68.25), 100, 1)
    work = work_of(read_shards(tier), describe(raw_config(tier)), 100, "tier")
    assert work is not None and expected.decode is not None and expected.prompt_tps is None
    assert expected.decode.seconds == work.nbytes / 68.25e9 + work.launches * 2e-6
    assert (expected.source, expected.about) == ("published", "Apple M1 has 68.25 GB/s")


@pytest.mark.slow
def test_expected_of_paged_experts(tier: Path, monkeypatch: pytest.MonkeyPatch):
    """The bytes that were missing are read at the disk's speed, which is measured."""
    monkeypatch.setattr(speeds, "speed_here", lambda chip, quantized: FAST)
    slow = DiskSpeed({1: 1e-6}, 1, 1, "")  # so that all but the disk counts for little
    how = "-p", 8, "-g", 32, "-n", 2, "--expert-memory", "60%"
    with monkeypatch.context() as patch:
        patch.setattr(speeds, "are_enough", lambda pieces: True)
        patch.setattr(speeds, "measure_pieces", lambda pieces, what: slow)
        found = run("bench", tier, *how, "--json").json
    missing = found["decode"]["missing_bytes_per_token"]
    assert 0 < missing * 31 * 2 <= found["paging"]["bytes_read"]
    expected = found["expected"]
    work = work_of(read_shards(tier), describe(raw_config(tier)), 24, "tier")
    assert work is not None
    waited = missing / 1e3 - work.shared_share * work.weights / 1e9
    assert expected["decode"]["seconds"]["disk"] == pytest.approx(waited)
    assert expected["about"] == "as fast as said; the disk reads 1e-06 GB/s of experts"

    found = run("bench", tier, *how, "--json").json["expected"]
    assert found["decode"]["seconds"]["disk"] == 0
    assert found["about"].endswith("too few or small to measure the disk, whose time is left out")


def test_nothing_is_expected_of_batches(tier: Path):
    command = "bench", "--model", tier, "-p", 8, "-g", 4, "-n", 1, "-b", 2
    found = run(*command, "--json").json["expected"]
    assert found["decode"] is found["of_decode"] is found["of_prompt"] is None
    done = run(*command)
    assert "at most" not in done.out and "no speed is expected of batches" in done.err


def test_speeds_here_are_measured(monkeypatch: pytest.MonkeyPatch):
    """Of a CPU as it multiplies, and of a GPU without a published bandwidth as it reads."""
    for quantized in (True, False):
        cpu = speeds.speed_here(Chip("some chip", "cpu"), quantized)
        assert cpu.source == "measured here" and "multiplies" in cpu.about
        one, several = cpu.machine.weights_per_s, cpu.machine.prompt_weights_per_s
        assert one is not None and several is not None
        assert 1e7 < one < 1e13 and 1e7 < several < 1e14
        assert 1e-8 < cpu.machine.launch_seconds < 1e-2
    monkeypatch.setattr(speeds, "READ_MATRIX", (64, 256))
    monkeypatch.setattr(speeds, "_seconds", lambda compute: 1e-6)
    gpu = speeds.speed_here(Chip("Apple M99", "gpu"))
    assert gpu.source == "measured here" and gpu.machine.weights_per_s is None
    # Half a byte a weight, and a scale and a bias of two bytes for every 64.
    nbytes = 4 * 64 * 256 * (0.5 + 4 / 64)
    assert gpu.machine.bandwidth_gb_s == pytest.approx(nbytes / 1e9 / 1e-6)
