"""`bench --trace`: what it prints, draws and refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from outlier_mlx.engine.paging.policies import DEFAULT_POLICY, POLICIES
from outlier_mlx.measure.expert_trace import Trace, write_trace
from outlier_mlx.measure.replay import needs_of, replay
from outlier_mlx.measure.replay_run import Machine, replay_all
from outlier_mlx.measure.replay_speed import decode_seconds
from tests.program import assert_refused, run
from tests.test_expert_trace import ABOUT, random_trace


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_trace(random_trace(tokens=50), tmp_path / "x.trace")
    return tmp_path / "x.trace"


def test_json(file: Path) -> None:
    found = run("bench", "--trace", file, "--chip", "M2 Pro", "--disk", 3, "--json").json
    assert found["machine"] == {"name": "Apple M2 Pro", "bandwidth_gb_s": 200, "disk_gb_s": 3}
    assert found["default_policy"] == DEFAULT_POLICY
    trace = random_trace(tokens=50)
    assert found["trace"]["tokens"] == 50 and found["trace"]["look_ahead_recall"] == trace.recall
    arms = found["replays"]
    assert {arm["slots"] for arm in arms} == {4, 5, 6, 7, 8}
    kinds = {(arm["policy"], arm["look_ahead"]) for arm in arms}
    looks = {(name, look) for name in POLICIES for look in ("off", "recorded", "perfect")}
    assert kinds == looks | {("belady", "off")}
    needs = needs_of(trace)
    for arm in arms:
        if arm["look_ahead"] != "off" or arm["policy"] == "belady":
            continue
        counts = replay(needs, arm["slots"], POLICIES[arm["policy"]](), None, ABOUT.layers)
        missed = int(counts.missed.sum())
        assert arm["hit_rate"] == pytest.approx(1 - missed / 200)
        assert arm["prompt_hit_rate"] is None
        assert arm["read_bytes"] == pytest.approx(missed * 100 / 50)
        seconds = decode_seconds(counts, ABOUT, 200, 3).mean()
        assert arm["tokens_per_s"] == pytest.approx(1 / seconds)
        assert arm["expert_memory_bytes"] == arm["slots"] * 100
    assert found["resident_tokens_per_s"] == pytest.approx(200e9 / (900 + 4 * 100))


def test_how_much_the_next_token_keeps() -> None:
    experts = np.array([[[0, 1], [2, 3]], [[1, 0], [2, 1]], [[2, 3], [0, 3]]], np.uint8)
    ones = np.ones(experts.shape, np.float16)
    trace = Trace(ABOUT, experts, ones, np.ones(3, np.uint32))
    assert replay_all(trace).kept == (2 + 1 + 0 + 0) / 8
    chunks = replace(trace, passes=np.array([2, 1], np.uint32))
    assert replay_all(chunks).kept is None
    assert [arm.look_ahead for arm in replay_all(trace).arms].count("recorded") == 0


def test_prompts_alone(file: Path, tmp_path: Path) -> None:
    """No token is decoded, so there are no tokens/s."""
    trace = replace(random_trace(tokens=50), passes=np.array([20, 30], np.uint32))
    write_trace(trace, file)
    shown = run("bench", "--trace", file, "--chip", "M1", "--disk", 3, "--out", tmp_path / "x.png")
    assert "Hit rate of prompts, %" in shown.out and "Tokens/s" not in shown.out
    arms = run("bench", "--trace", file, "--json").json["replays"]
    assert all(arm["hit_rate"] is None and arm["tokens_per_s"] is None for arm in arms)
    assert all(0 <= arm["prompt_hit_rate"] < 1 for arm in arms)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_table_and_picture(file: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"x.{suffix}"
    command = ["bench", "--trace", file, "--out", out]
    shown = run(*command, "--disk", 3, "--chip", "M3 Max 30")
    assert "m on t: 50 tokens, 2 MoE layers of 4 experts, 100 B each" in shown.out
    assert "Tokens/s at most on Apple M3 Max, 300 GB/s, disk 3 GB/s" in shown.out
    rows = [line.split() for line in shown.out.splitlines() if line.startswith("800 B (100%)")]
    assert len(rows) >= 3 and rows[0][3:7] == [f"{100 * (1 - 8 / 200):.1f}"] * 4
    assert out.stat().st_size > 5000
    assert_refused(run(*command, code=1), f"x.{suffix}: exists; --force replaces it")
    shown = run(*command, "--force")
    assert "Tokens/s" not in shown.out
    assert shown.err == "--disk GB/S and --chip NAME give tokens/s\n"


def test_no_model_is_loaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("outlier_mlx.cli.benching.load_checked", fail)
    run("bench", "--trace", file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL"], ["MODEL: does not go with --trace"]),
        (["--model", "M"], ["MODEL: does not go with --trace"]),
        (["-p", 512], ["--prompt-tokens: does not go with --trace"]),
        (["--kernels"], ["--kernels: does not go with --trace"]),
        (["--settings"], ["--settings: does not go with --trace"]),
        (["--dtype", "float32"], ["--dtype: does not go with --trace"]),
        (["--chip", "M1"], ["--disk: is missing"]),
        (["--disk", 0], ["--disk"]),
    ],
)
def test_options_that_make_no_sense_with_a_trace(
    file: Path, arguments: list, words: list[str]
) -> None:
    done = run("bench", *arguments, "--trace", file, code=2)
    assert done.err.count("\n") == 1 and all(word in done.err for word in words), done.err


@pytest.mark.parametrize(
    "option", [["--chip", "M1"], ["--disk", 3], ["--out", "x.png"], ["--force"]]
)
def test_options_that_make_no_sense_without_one(option: list) -> None:
    assert f"{option[0]}: is for --trace alone" in run("bench", "model", *option, code=2).err


def test_neither_model_nor_trace() -> None:
    assert "no model is given" in run("bench", code=2).err
    assert "no model is given" in run("routing", "--text", __file__, code=2).err


def test_what_cannot_be_replayed(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert_refused(run("bench", "--trace", file, code=1), "x.trace: ")
    assert_refused(run("bench", "--trace", tmp_path / "none", code=1), "none: No such file")
    file.write_bytes(whole)
    assert_refused(run("bench", "--trace", file, "--disk", 3, code=1), "name a chip with --chip")
    refused = run("bench", "--trace", file, "--disk", 3, "--chip", "M9", code=1)
    assert_refused(refused, "no chip 'M9' is known")
    out = run("bench", "--trace", file, "--out", tmp_path / "x.gif", code=1)
    assert_refused(out, "x.gif: a picture's name must end in .png, .svg or .pdf")


def test_a_machine_is_not_needed() -> None:
    found = replay_all(random_trace(), Machine("chip", 100, 3))
    assert all(arm.tokens_per_s for arm in found.arms)
    assert all(arm.tokens_per_s is None for arm in replay_all(random_trace()).arms)
