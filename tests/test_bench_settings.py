"""`bench --settings`: how runs are paired, what counts as better, and what a run is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from outlier_mlx.engine.buffers import MAX_MB, MAX_OPS, own_value
from outlier_mlx.engine.chips import Chip
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure import bench_settings as module
from outlier_mlx.measure import bench_tables
from outlier_mlx.measure.bench import BenchOptions
from outlier_mlx.measure.bench_settings import (
    SettingsBench,
    Trial,
    bench_settings,
    logits_digest,
    run_apart,
)
from tests.engine import load
from tests.program import run

OPTIONS = BenchOptions(8, 4, 1, 3, 2048, 0)
Speeds = dict[int | None, Sequence[float]]


def benched(speeds: Speeds, digests: dict[int | None, Sequence[str]] | None = None) -> Any:
    """A benchmark whose runs have these speeds and digests, by round."""
    rounds: dict[int | None, int] = dict.fromkeys(speeds, 0)

    def run(value: int | None) -> Trial:
        turn = rounds[value]
        rounds[value] += 1
        digest = "same" if digests is None else digests[value][turn]
        return Trial(500.0, speeds[value][turn], 1.0 + turn, "float16", digest)

    return bench_settings(run, OPTIONS)


def best(own: Sequence[float], larger: Sequence[float], largest: Sequence[float]) -> int | None:
    """The value that is best for these speeds."""
    setting = benched({None: own, 1000: larger, 2000: largest}).best
    return setting.value


def test_each_round_has_all_settings_in_another_order() -> None:
    order: list[int | None] = []
    told: list[tuple[int, int]] = []

    def run(value: int | None) -> Trial:
        order.append(value)
        return Trial(1, 1, 1, "float16", "")

    bench_settings(run, OPTIONS, lambda *counts: told.append(counts))
    rounds = [order[at : at + 3] for at in (0, 3, 6)]
    assert all(set(one) == {None, 1000, 2000} for one in rounds)
    assert len(set(map(tuple, rounds))) == 3
    assert told == [(done, 9) for done in range(10)]


def test_better_is_faster_in_every_round_by_a_hundredth() -> None:
    assert best([100, 90, 80], [104, 93, 83], [100, 90, 80]) == 1000
    assert best([100, 90, 80], [99, 120, 110], [98, 130, 130]) is None  # not in every round
    assert best([100, 90, 80], [100.5, 90.5, 80.4], [101, 90.5, 80.4]) is None  # too little


def test_the_larger_has_to_beat_the_smaller() -> None:
    assert best([100, 100, 100], [105, 105, 105], [110, 108, 107]) == 2000
    assert best([100, 100, 100], [105, 105, 105], [110, 104, 107]) == 1000
    assert best([100, 100, 100], [99, 105, 105], [110, 104, 107]) == 2000


def test_other_results_are_told_and_nothing_is_best() -> None:
    speeds: Speeds = {None: [100] * 3, 1000: [110] * 3, 2000: [120] * 3}
    found = benched(speeds, {None: ["a"] * 3, 1000: ["a"] * 3, 2000: ["b"] * 3})
    assert found.errors == ["2000: results differ from those with MLX's own settings"]
    assert found.best is None and found.as_json()["best"] is None
    assert found.as_json()["same_results"] is False
    found = benched(speeds, {None: ["a", "b", "a"], 1000: ["a"] * 3, 2000: ["a"] * 3})
    assert found.errors == ["MLX's own: results differ from run to run"]


def test_json() -> None:
    found = benched({None: [100, 90, 80], 1000: [110, 99, 84], 2000: [1, 1, 1]}).as_json()
    assert [one["value"] for one in found["settings"]] == [None, 1000, 2000]
    own, larger, _ = found["settings"]
    assert own["of_mlx_own"]["runs"] == [1, 1, 1] and own["peak_memory_gb"] == 3
    assert larger["of_mlx_own"]["runs"] == pytest.approx([1.1, 1.1, 1.05])
    assert larger["generation_tokens_per_s"]["median"] == 99
    assert found["best"] == {"value": 1000} and found["same_results"] is True


def shown(
    bench: SettingsBench, chip: Chip, capsys: pytest.CaptureFixture[str], **used: str
) -> list[str]:
    """The lines that are printed, where these variables are set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (MAX_OPS, MAX_MB):
            patch.delenv(name, raising=False)
        for name, value in used.items():
            patch.setenv(name, value)
        bench.chip = chip
        bench_tables.print_settings("tier", bench)
    return capsys.readouterr().out.splitlines()


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    chip = Chip("Apple M1 Max", "gpu", bandwidth_gb_s=400)
    found = benched({None: [100, 90, 80], 1000: [110, 99, 84], 2000: [100, 90, 80]})
    both = {MAX_OPS: "1000", MAX_MB: "1000"}
    lines = shown(found, chip, capsys, **both)
    assert ["1000", "500.0", "99.0", "1.100", "(1.050", "to", "1.100)", "3.000", "GB"] in [
        line.split() for line in lines
    ]
    assert lines[-3:] == [
        "rounds: 3, each run in a process of its own",
        "best: 1000: 1.100 times as fast as MLX's own, and faster in each of the rounds;"
        " all results are the same",
        "it is in use",
    ]
    assert shown(found, chip, capsys, **{MAX_OPS: "1000"})[-1] == (
        "to use it: export MLX_MAX_OPS_PER_BUFFER=1000 MLX_MAX_MB_PER_BUFFER=1000"
    )
    found = benched({None: [100, 90, 80], 1000: [99, 99, 84], 2000: [100, 90, 80]})
    assert shown(found, chip, capsys, **both)[-2:] == [
        "best: MLX's own: no other is faster beyond noise; all results are the same",
        "to use it: export MLX_MAX_OPS_PER_BUFFER=50 MLX_MAX_MB_PER_BUFFER=50",
    ]
    assert shown(found, chip, capsys)[-1] == "it is in use"


@pytest.mark.parametrize(
    ("chip", "value"), [("Apple M1", 40), ("Apple M3 Pro", 40), ("Apple M2 Ultra", 50)]
)
def test_mlx_own_value(chip: str, value: int) -> None:
    assert own_value(chip) == value


def test_a_run_sees_the_value_and_not_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def started(command: list[str], *, env: dict[str, str], **how: Any) -> Any:
        seen.append(env)
        out = '{"prompt_tps": 1, "generation_tps": 2, "peak_memory_gb": 3, "dtype": "float16",'
        return SimpleNamespace(returncode=0, stdout=f'{out} "digest": ""}}\n', stderr="")

    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setenv(MAX_OPS, "7")
    for value in (None, 2000):
        assert run_apart(Path("tier"), OPTIONS, None, value) == Trial(1, 2, 3, "float16", "")
    assert [{MAX_OPS, MAX_MB} & {*env} for env in seen] == [set(), {MAX_OPS, MAX_MB}]
    assert seen[1][MAX_OPS] == seen[1][MAX_MB] == "2000"
    assert all(env["PATH"] == os.environ["PATH"] for env in seen)


def test_a_run_in_a_process(
    small_tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results are those of this process; code in the current folder is not run."""
    monkeypatch.chdir(tmp_path)
    for name in ("hashlib", "mlx_lm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')")
    apart = run_apart(small_tier, OPTIONS, None, 1000)
    assert apart.dtype == "float32" and apart.generation_tps > 0 and apart.prompt_tps > 0
    assert apart.digest == module.trial(str(small_tier), vars(OPTIONS), None).digest


def test_a_run_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutlierError, match=r"^2000: the run failed: .*no config.json") as refused:
        run_apart(tmp_path, OPTIONS, None, 2000)
    assert "\n" not in str(refused.value) and "error: " not in str(refused.value)


def test_a_run_that_a_signal_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it printed last may have nothing to do with its end."""
    for said, told in (("a warning\n", ", after: a warning"), ("", "")):
        ended = SimpleNamespace(returncode=-9, stdout="", stderr=said)
        monkeypatch.setattr(subprocess, "run", lambda *_, ended=ended, **__: ended)
        with pytest.raises(OutlierError) as refused:
            run_apart(Path("tier"), OPTIONS, None, None)
        assert str(refused.value) == f"MLX's own: the run failed: ended by signal 9{told}"


def test_one_bit_changes_the_digest(small_tier: Path) -> None:
    model, prompts = load(small_tier), mx.array([[5, 6, 7]])
    before = logits_digest(model, prompts)
    assert logits_digest(model, prompts) == before != logits_digest(model, prompts + 1)
    norm = model.model.norm
    bits = norm.weight.view(mx.uint32)
    norm.weight = mx.concatenate([bits[:1] ^ 1, bits[1:]]).view(mx.float32)
    assert logits_digest(model, prompts) != before


@pytest.mark.parametrize(
    ("flags", "named"),
    [("--settings --kernels", "--settings"), ("--settings -n 2", "--num-trials")],
)
def test_flags(flags: str, named: str, tier: Path) -> None:
    done = run("bench", "--model", tier, *flags.split(), code=2)
    assert named in done.err and done.out == ""


def test_the_command(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: list[int | None] = []

    def apart(folder: Path, options: BenchOptions, dtype: str | None, value: int | None) -> Trial:
        assert (folder, options, dtype) == (tier, BenchOptions(8, 4, 2, 3, 2048, 0), "float16")
        values.append(value)
        return Trial(500, 100, 1, "float16", "same" if value != 1000 else "other")

    monkeypatch.setattr(module, "run_apart", apart)
    flags = ["--settings", "-p", "8", "-g", "4", "-b", "2", "-n", "3", "--dtype", "float16"]
    done = run("bench", "--model", tier, *flags, "--json", code=1)
    assert done.json["model"] == "tier" and done.json["options"]["batch_size"] == 2
    assert sorted(values, key=str) == [1000] * 3 + [2000] * 3 + [None] * 3
    assert done.err.splitlines() == [
        "no Metal here, so MLX has no command buffers: what differs below is noise",
        "1000: results differ from those with MLX's own settings",
    ]
    assert "best" not in run("bench", "--model", tier, *flags, code=1).out
