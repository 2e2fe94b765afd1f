"""The output of `bench`: results on stdout, remarks on stderr."""

import os
from dataclasses import replace

from rich.text import Text

from outlier_mlx.engine.buffers import VARIABLES, own_value
from outlier_mlx.engine.chips import Chip
from outlier_mlx.measure.bench import BenchResult, Runs
from outlier_mlx.measure.bench_kernels import FLOOR
from outlier_mlx.measure.bench_results import Arm, KernelBench, KernelResult, geometry
from outlier_mlx.measure.bench_settings import Setting, SettingsBench
from outlier_mlx.runtime.variants import DECODES
from outlier_mlx.terminal import Output, print_columns, print_heading, size, stderr, stdout


def print_result(name: str, result: BenchResult) -> None:
    """Print prompt and generation speed, memory, and the bandwidth that decoding used."""
    console, options = stdout(), result.options
    _print_heading(console, name, result.chip, result.dtype)
    batch = f" x {options.batch_size}" if options.batch_size > 1 else ""
    labels = f"pp{options.prompt_tokens}{batch}", f"tg{options.generation_tokens}{batch}"
    measured = zip(labels, (result.prompt_tps, result.generation_tps), strict=True)
    rows = [[label, f"{runs.median:.1f}", f"{runs.spread:.1%}"] for label, runs in measured]
    heads, expected = ["", "tokens/s", "spread"], result.expectation
    if expected.decode is not None:
        heads += ["expected\nat most", "of that"]
        limits = expected.prompt_tps, expected.decode.tokens_per_s
        for row, limit, share in zip(rows, limits, result.of_expected, strict=True):
            row += [
                "-" if limit is None else f"{limit:.1f}",
                "-" if share is None else f"{share:.0%}",
            ]
    print_columns(console, heads, rows)
    console.print(f"runs: {options.num_trials}, after one warm-up run", soft_wrap=True)
    console.print(f"peak memory: {result.peak_memory_gb:.3f} GB", soft_wrap=True)
    if result.paging is not None:
        console.print(str(result.paging), soft_wrap=True)
    if result.bytes_per_token is not None:
        read = (
            f"decoding reads {size(result.bytes_per_token)} a token: {result.decode_gb_s:.3g} GB/s"
        )
        console.print(read + _share(result.decode_gb_s, result.chip), soft_wrap=True)
    if expected.decode is not None:
        console.print(f"expected: {expected.about} ({expected.source})", soft_wrap=True)
    elif expected.about:
        stderr().print(expected.about, soft_wrap=True)
    if result.chip.note:
        stderr().print(result.chip.note, soft_wrap=True)


def print_settings(name: str, bench: SettingsBench) -> None:
    """Print speed and memory with each setting, and which is best."""
    console, options = stdout(), bench.options
    _print_heading(console, name, bench.chip, bench.settings[0].trials[0].dtype)
    heads = ["", f"pp{options.prompt_tokens}", f"tg{options.generation_tokens}", "of MLX's own"]
    rows = []
    for one in bench.settings:
        ratio = _ratio(one, bench.settings[0]) if one.value else ""
        speeds = [f"{runs.median:.1f}" for runs in (one.prompt_tps, one.generation_tps)]
        rows.append([one.name, *speeds, ratio, f"{one.peak_memory_gb:.3f} GB"])
    print_columns(console, [*heads, "peak memory"], rows)
    console.print(f"rounds: {options.num_trials}, each run in a process of its own", soft_wrap=True)
    if bench.best is not None:
        console.print(_verdict(bench.best, bench), soft_wrap=True)
        if bench.chip.device == "gpu":
            console.print(_use(bench.best, bench.chip), soft_wrap=True)


def _ratio(setting: Setting, own: Setting) -> str:
    """How many times as fast as MLX's own, with the range over rounds."""
    runs = setting.over(own)
    return f"{runs.median:.3f} ({min(runs.values):.3f} to {max(runs.values):.3f})"


def _verdict(best: Setting, bench: SettingsBench) -> str:
    """Which setting is best."""
    if best.value is None:
        return "best: MLX's own: no other is faster beyond noise; all results are the same"
    ratio = best.over(bench.settings[0]).median
    times = f"{ratio:.3f} times as fast as MLX's own, and faster in each of the rounds"
    return f"best: {best.name}: {times}; all results are the same"


def _use(best: Setting, chip: Chip) -> str:
    """How the best setting is used; what the commands set has been set in this process, too."""
    used = [os.environ.get(name) for name in VARIABLES]
    if used == [None if best.value is None else str(best.value)] * len(used):
        return "it is in use"
    value = best.value or own_value(chip.name)
    return "to use it: export " + " ".join(f"{name}={value}" for name in VARIABLES)


def print_kernels(name: str, bench: KernelBench) -> None:
    """Print for each kernel the microseconds of every variant, and compare the best."""
    console = stdout()
    _print_heading(console, name, bench.chip, bench.dtype)
    for result in bench.results:
        about = f", {result.out_features} x {result.in_features}"
        about += f", {result.pairs} pairs of token and expert" if result.pairs else ""
        console.print()
        print_heading(console, result.name, about)
        if any(arm.variant for arm in result.arms):
            _print_variants(console, result)
        for arm in (*result.theirs, result.ours):
            if arm is not None and arm.runs is not None:
                console.print(_describe(arm, result, bench.chip), soft_wrap=True)
    if bench.chip.note:
        stderr().print(bench.chip.note, soft_wrap=True)


def _print_heading(console: Output, name: str, chip: Chip, dtype: str) -> None:
    about = [f"{chip.gpu_cores} GPU cores"] if chip.gpu_cores else []
    about += [f"{chip.memory_gb} GB"] if chip.memory_gb else []
    where = f"{chip.name} ({', '.join(about)})" if about else chip.name
    print_heading(console, name, f" on {where}, {chip.device.upper()}, {dtype}")


def _print_variants(console: Output, result: KernelResult) -> None:
    """Print medians in microseconds: geometries in rows, ways to decode in columns."""
    table: dict[str, dict[str, str | Text]] = {}
    for arm in result.arms:
        v = arm.variant
        if v is not None:
            cells = table.setdefault(geometry(v), {})
            cells.setdefault(v.decode, _cell(arm.runs, v == result.best))
    rows = [[name, *(cells.get(way, "-") for way in DECODES)] for name, cells in table.items()]
    print_columns(console, ["µs", *DECODES], rows)


def _cell(runs: Runs | None, best: bool) -> Text:
    text = "-" if runs is None else f"{runs.median * 1e6:.1f}"
    return Text(text, style="bold" if best else "")


def _describe(arm: Arm, result: KernelResult, chip: Chip) -> str:
    """Median, spread and GB/s of an arm; for ours, also relative to its floor and to MLX's."""
    assert arm.runs is not None and arm.gb_s is not None
    text = f"{arm.name}: {arm.runs.median * 1e6:.1f} µs, spread {arm.runs.spread:.1%}"
    text += f", {arm.gb_s:.3g} GB/s" + _share(arm.gb_s, chip)
    if arm in result.theirs:
        return text
    others = [(f"{other.name}'s", other) for other in result.theirs]
    if arm.variant is not None:
        floor = replace(arm.variant, decode=FLOOR)
        others = [("its floor's", a) for a in result.arms if a.variant == floor] + others
    for whose, other in others:
        if other.runs is not None:
            text += f", {arm.runs.median / other.runs.median:.2f} of {whose} time"
    return text


def _share(gb_s: float | None, chip: Chip) -> str:
    if gb_s is None or chip.bandwidth_gb_s is None:
        return ""
    return f", {gb_s / chip.bandwidth_gb_s:.0%} of the chip's {chip.bandwidth_gb_s:g} GB/s"
