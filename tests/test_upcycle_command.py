"""`upcycle`: what a user sees, what is written, how it resumes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.cli.training_display import (
    Display,
    duration,
    experts_line,
    layer_ranges,
    stage_line,
)
from outlier_mlx.cli.upcycling import _layers
from outlier_mlx.engine.machine import Budget
from outlier_mlx.train import loop
from outlier_mlx.train.log import FILE
from outlier_mlx.train.settings import Settings
from tests.builders import write_base, write_overlay
from tests.engine import tier_of
from tests.folders import contents
from tests.hub_uploads import WritableHub
from tests.program import Result, assert_refused, run
from tests.training import go_uphill

HELD = FOLDER / "heldout"
QUICK = ["--window", "16", "--steps", "3", "--joint-steps", "2", "--batch", "2", "--layers", "1"]


@dataclass(frozen=True)
class Site:
    """A folder with a base and texts, where the command is run."""

    folder: Path

    def run(self, *more: object, code: int | None = 0, **changes: object) -> Result:
        """Run the command; `changes` replace what is given by default, None leaves it out."""
        given: dict[str, Any] = {
            "base": "base",
            "domain": ["cooking=cooking.txt", "sea=sea"],
            "keep": "old.txt",
            "out": "mine",
        } | changes
        words: list[object] = ["upcycle"]
        if given["base"] is not None:
            words.append(self.folder / given["base"])
        for domain in given["domain"]:
            name, found, path = domain.partition("=")
            words += ["--domain", f"{name}{found}{self.folder / path if path else ''}"]
        for name in ("keep", "out"):
            if given[name] is not None:
                words += [f"--{name}", self.folder / given[name]]
        return run(*words, *QUICK, *more, code=code)

    def refused(self, *words: str, more: tuple[object, ...] = (), **changes: object) -> None:
        """The command fails with one line, and leaves nothing."""
        before = contents(self.folder)
        assert_refused(self.run(*more, code=1, **changes), *words)
        assert contents(self.folder) == before


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base and short texts."""
    folder = tmp_path_factory.mktemp("upcycle")
    write_base(folder / "base", layers=3, hidden=32, intermediate=64)
    (folder / "cooking.txt").write_text((HELD / "kitchen.txt").read_text()[:1500])
    (folder / "sea").mkdir()
    (folder / "sea" / "a.txt").write_text((HELD / "sea.txt").read_text()[:700])
    lines = (HELD / "sea.txt").read_text()[700:2000].split(". ")
    (folder / "sea" / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    (folder / "old.txt").write_text((HELD / "old.txt").read_text()[:1500])
    return folder


@pytest.fixture
def site(made: Path, tmp_path: Path) -> Site:
    return Site(shutil.copytree(made, tmp_path / "site"))


@pytest.fixture(scope="module")
def done(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, Result]:
    """A run that went through, with a picture."""
    site = Site(shutil.copytree(made, tmp_path_factory.mktemp("done") / "site"))
    return site, site.run("--picture", site.folder / "run.svg")


# -- what is seen and written -------------------------------------------------------------------


def test_what_a_first_run_shows(done: tuple[Site, Result]) -> None:
    site, result = done
    head, *rows = result.out.splitlines()
    assert head.split() == ["held-out", "text", "base", "with", "experts", "change"]
    assert [row.split()[0] for row in rows[1:]] == ["cooking", "sea", "keep"]
    lines = result.err.splitlines()
    assert lines[0].split() == ["text", "documents", "windows", "held", "out", "tokens"]
    told = result.err
    assert "tip: cooking and sea: more text helps most" in told
    assert "2 experts of width 32 in layer 1, 2 for a token; the overlay takes" in told
    assert "the base's held-out perplexities: cooking" in told
    assert "relative error of the experts' weights: lloyd 0." in told
    for stage in ("experts of cooking, layer 1: ", "experts of sea, layer 1: ", "routers, alphas"):
        assert stage in told
    assert "peak memory: " in told
    target = site.folder / "mine"
    next_line = f"next: outlier-mlx convert {target} --base {site.folder / 'base'}"
    assert lines[-1] == f"{next_line} --out {target}-tier"
    assert (site.folder / "run.svg").read_bytes().startswith(b"<?xml")


def test_the_next_command_and_the_one_after(done: tuple[Site, Result], tmp_path: Path) -> None:
    site, result = done
    words = result.err.splitlines()[-1].removeprefix("next: outlier-mlx ").split()
    words[words.index("--out") + 1] = str(tmp_path / "tier")
    run(*words)
    generated = run("generate", "--model", tmp_path / "tier", "--prompt", "Salt", "--max-tokens", 3)
    assert generated.code == 0
    info = run("info", site.folder / "mine", "--json").json
    assert (info["kind"], info["experts"], info["moe_layers"]) == ("overlay", 2, 1)
    run("verify", site.folder / "mine")


def test_pushed_and_fetched_it_makes_the_same_tier(
    done: tuple[Site, Result], tmp_path: Path, hub: WritableHub
) -> None:
    site, _ = done
    mine, base = site.folder / "mine", site.folder / "base"
    run("push", mine, "owner/mine", "--license", "mit")
    files = contents(hub.head("owner/mine"))
    assert set(files) - {".gitattributes"} == set(contents(mine))
    assert "| cooking |" in files["README.md"].decode()
    run("convert", mine, "--base", base, "--out", tmp_path / "own" / "tier")
    run("convert", "owner/mine", "--base", base, "--out", tmp_path / "fetched" / "tier")
    own, fetched = (
        {
            name: data
            for name, data in contents(tmp_path / of / "tier").items()
            if "safetensors" in name
        }
        for of in ("own", "fetched")
    )
    assert own == fetched and own


def test_no_path_of_the_machine_is_written(done: tuple[Site, Result]) -> None:
    site, _ = done
    for folder in (site.folder / "mine", site.folder / ".mine.training"):
        for name, data in contents(folder).items():
            assert str(site.folder).encode() not in data, name
    card = (site.folder / "mine" / "README.md").read_text()
    assert "`sea/a.txt` and `sea/b.jsonl`" in card
    assert "| cooking | `cooking.txt` | 1 |" in card


def test_json_is_one_object_a_line(site: Site) -> None:
    result = site.run("--json")
    events = [json.loads(line) for line in result.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "plan" and kinds[-1] == "done"
    assert kinds.count("stage") == 4
    assert events[0]["texts"][1]["files"] == ["sea/a.txt", "sea/b.jsonl"]
    assert events[0]["settings"]["layers"] == [1]
    assert set(events[-1]["after"]) == {"cooking", "sea", "keep"}
    steps = [event for event in events if event["event"] == "step"]
    assert {"stage", "step", "steps", "loss", "parts", "tokens_per_second", "seconds_left"} <= set(
        steps[0]
    )
    kept = (site.folder / ".mine.training" / FILE).read_text().splitlines()
    assert [json.loads(line) for line in kept] == events
    load = next(e["load"] for e in events if e.get("name", "").startswith("routers"))
    assert set(load) == {"cooking", "sea", "keep"}
    assert sum(load["sea"]["1"]) == pytest.approx(2)


def test_json_ends_with_what_went_wrong(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    result = site.run("--json", keep="none.txt", code=1)
    (event,) = (json.loads(line) for line in result.out.splitlines())
    assert event["event"] == "failed" and result.err == f"error: {event['error']}\n"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_step", interrupted)
    lines = site.run("--json", code=130).out.splitlines()
    assert json.loads(lines[0])["event"] == "plan"
    assert json.loads(lines[-1])["error"] == "interrupted"


def test_a_plan_changes_nothing(site: Site) -> None:
    before = contents(site.folder)
    result = site.run("--plan")
    assert "2 experts of width 32" in result.err
    assert "memory: " in result.err and " base, " in result.err
    planned = site.run("--plan", "--json", "--ram", 32, "--layers", "0-2").json
    assert planned["event"] == "plan"
    memory = planned["memory"]
    assert memory["peak_bytes"] == sum(memory["parts"].values())
    assert memory["layers_at_once"] == 3
    assert memory["available_bytes"] == 24 * 2**30
    half, whole = (
        site.run("--plan", "--json", "--dtype", dtype).json["memory"]["parts"]["base"]
        for dtype in ("bfloat16", "float32")
    )
    assert 2 * half == whole
    assert "--ram: goes with --plan" in site.run("--ram", 32, code=2).err
    assert contents(site.folder) == before
    run(*["upcycle", site.folder / "base", "--domain", f"a={site.folder / 'cooking.txt'}"],
        *["--keep", site.folder / "old.txt", "--out", site.folder / "base"],
        *["--window", 16, "--top-k", 1, "--plan"])  # fmt: skip


@pytest.mark.slow
def test_quiet(site: Site) -> None:
    result = site.run("--quiet")
    assert result.err == ""
    assert len(result.out.splitlines()) == 5


@pytest.mark.slow
def test_activations_of_another_dtype(site: Site) -> None:
    site.run("--dtype", "bfloat16")
    run("verify", site.folder / "mine")


@pytest.mark.slow
def test_a_teacher(site: Site) -> None:
    result = site.run("--json", "--teacher", site.folder / "base")
    events = [json.loads(line) for line in result.out.splitlines()]
    taught = [event for event in events if event["event"] == "teacher"]
    assert {event["domain"] for event in taught} == {"cooking", "sea"}
    assert taught[-1]["done"] == taught[-1]["total"]
    assert "The teacher was `base`." in (site.folder / "mine" / "README.md").read_text()
    write_base(site.folder / "other", layers=1, hidden=32, vocab=280)
    result = site.run("--teacher", site.folder / "other", out="again", code=1)
    assert "error: " in result.err.splitlines()[-1]
    assert not (site.folder / "again").exists()


# -- resuming -----------------------------------------------------------------------------------


def interrupted(site: Site, monkeypatch: pytest.MonkeyPatch, stage: str, number: int) -> Result:
    """A run that Ctrl-C ends after a step of a stage."""

    def step(self: Display, event: Any) -> None:
        if event["stage"].startswith(stage) and event["step"] == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "_step", step)
        return site.run(code=130)


@pytest.mark.parametrize(
    "at",
    [
        ("experts of cooking", 1),
        pytest.param(("experts of sea", 3), marks=pytest.mark.slow),
        pytest.param(("routers", 1), marks=pytest.mark.slow),
    ],
)
def test_interrupted_it_goes_on_from_there(
    at: tuple[str, int], site: Site, done: tuple[Site, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = done
    result = interrupted(site, monkeypatch, *at)
    work = site.folder / ".mine.training"
    assert f"the training is kept in {work}: the same command goes on from there" in result.err
    assert result.err.endswith("interrupted\n")
    assert not (site.folder / "mine").exists()
    result = site.run()
    assert "going on with the training that was interrupted" in result.err
    ours, theirs = contents(site.folder / "mine"), contents(whole.folder / "mine")
    for name in ("model-00001-of-00001.safetensors", "alpha.json", "config.json"):
        assert ours[name] == theirs[name], name
    events = [json.loads(line)["event"] for line in (work / FILE).read_text().splitlines()]
    assert events.count("plan") == 1 and events.count("resumed") == 1
    assert events.count("stage") == 4 and events[-1] == "done"


@pytest.mark.slow
def test_it_can_be_ended_with_what_it_has(
    site: Site, done: tuple[Site, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--so-far: with it, nothing is planned" in site.run("--so-far", "--plan", code=2).err
    site.refused("no training was begun in it", more=("--so-far",))
    interrupted(site, monkeypatch, "experts of sea", 1)
    result = site.run("--so-far", "--picture", site.folder / "run.svg")
    assert "going on" not in result.err
    assert "layer 1: sea " in result.err and "(1 of 3 steps, " in result.err
    left_out = "routers, alphas and row scales: left out, as none of its 2 steps was made"
    assert left_out in result.err
    again = "the command with --force, without --so-far, goes on from there"
    assert again in result.err and "may be deleted" not in result.err
    assert result.out.splitlines()[0].split()[0] == "held-out"
    run("verify", site.folder / "mine")
    card = (site.folder / "mine" / "README.md").read_text()
    assert "The training was ended before all steps were made." in card
    assert "| experts of sea, layer 1 | 1 of 3 |" in card
    assert "| experts of cooking, layer 1 | 3 |" in card
    assert "| routers, alphas and row scales | 0 of 2 |  | no |" in card

    site.refused("exists; --force replaces it")
    result = site.run("--force")
    assert "may be deleted" in result.err
    name = "model-00001-of-00001.safetensors"
    ours, theirs = ((s.folder / "mine" / name).read_bytes() for s in (site, done[0]))
    assert ours == theirs
    card = (site.folder / "mine" / "README.md").read_text()
    assert " of 3 |" not in card and "was ended before" not in card
    whole = site.run("--force", "--so-far")
    assert "may be deleted" in whole.err and "left out" not in whole.err


def test_with_other_settings_it_is_another_training(done: tuple[Site, Result]) -> None:
    site, _ = done
    moved = site.folder / "other"
    refusal = site.run("--seed", 7, "--work", site.folder / ".mine.training", code=1, out="other")
    assert "holds a training with another " in refusal.err.splitlines()[-1]
    assert "another --seed: 0, not 7" in refusal.err.splitlines()[-1] or "data" in refusal.err
    assert not moved.exists()
    refusal = site.run(
        "--dtype", "bfloat16", "--work", site.folder / ".mine.training", code=1, out="other"
    )
    told = 'holds a training with another --dtype: null, not "bfloat16"'
    assert told in refusal.err.splitlines()[-1]


@pytest.mark.slow
def test_a_finished_training_is_written_again(site: Site) -> None:
    site.run()
    before = contents(site.folder / "mine")
    site.refused("exists; --force replaces it")
    site.run("--force", "--picture", site.folder / "run.png")
    assert contents(site.folder / "mine") == before


@pytest.mark.slow
def test_a_last_stage_that_makes_it_worse_leaves_no_trace(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.run("--joint-steps", 0, out="before")
    go_uphill(monkeypatch, least=2)
    result = site.run()
    told = next(line for line in result.err.splitlines() if line.startswith("routers, alphas and"))
    assert "; not kept (" in told
    for name in ("model-00001-of-00001.safetensors", "alpha.json"):
        ours, theirs = ((site.folder / out / name).read_bytes() for out in ("mine", "before"))
        assert ours == theirs, name
    cards = [(site.folder / out / "README.md").read_text() for out in ("mine", "before")]
    tables = [card.partition("## Held-out text")[2].partition("## Data")[0] for card in cards]
    assert tables[0] == tables[1] != ""
    (row,) = [line for line in cards[0].splitlines() if line.startswith("| routers, alphas and")]
    assert "| 2 |" in row and row.endswith("| no |")
    log = (site.folder / ".mine.training" / FILE).read_text().splitlines()
    stages = [event for event in map(json.loads, log) if event["event"] == "stage"]
    assert stages[1]["kept"] and not stages[-1]["kept"] and len(stages) == 4


# -- refusals -----------------------------------------------------------------------------------


def test_domains_that_are_refused(site: Site) -> None:
    (site.folder / "empty").mkdir()
    (site.folder / "blank.txt").write_text("\n\n")
    (site.folder / "short.txt").write_text("A word.")
    (site.folder / "data.bin").write_bytes(b"\x00\xff\xfe")
    (site.folder / "law.jsonl").write_text('{"text": "sound"}\n{"title": "none"}\n')
    site.refused("no file in it ends in", domain=["a=empty"])
    site.refused("a (", "no text in it", domain=["a=blank.txt"])
    site.refused("a (", "too few for a window of 16", "--window", domain=["a=short.txt"])
    site.refused("data.bin", "not UTF-8", domain=["a=data.bin"])
    site.refused("law.jsonl: line 2", '"text"', '"title"', domain=["a=law.jsonl"])
    site.refused("no such file or folder", domain=["a=none.txt"])
    site.refused("given for a and for b", domain=["a=cooking.txt", "b=cooking.txt"])
    site.refused("'a' is given twice", domain=["a=cooking.txt", "a=sea"])
    site.refused("given for cooking and for keep", keep="cooking.txt")
    site.refused("the domain 'a b'", domain=["a b=cooking.txt"])
    site.refused("that of the text of --keep", domain=["keep=cooking.txt"])


def test_bases_that_are_refused(site: Site) -> None:
    overlay = write_overlay(site.folder / "overlay", layers=2, moe_layers=(1,))
    tier = tier_of(overlay.path, None, site.folder / "tier", base_bits=4)
    site.refused("a tier; experts are trained over a dense base", base=tier)
    site.refused("an overlay; experts are trained over its base", base="overlay")
    site.refused("the base must not be quantized", base=FOLDER / "ternary-mlx2")
    site.refused("a ternary model", base=FOLDER / "ternary-rotated")
    shutil.copytree(site.folder / "base", site.folder / "quantized")
    config = json.loads((site.folder / "base" / "config.json").read_text())
    quantized = config | {"quantization": {"group_size": 64, "bits": 4}}
    (site.folder / "quantized" / "config.json").write_text(json.dumps(quantized))
    undone = f"mlx_lm.convert --hf-path {site.folder / 'quantized'} --mlx-path FOLDER -d"
    site.refused("the base must not be quantized", undone, base="quantized")
    other = config | {"model_type": "gpt2"}
    (site.folder / "quantized" / "config.json").write_text(json.dumps(other))
    site.refused("model_type 'gpt2', expected", base="quantized")
    site.refused("no such folder", base="nothing here")
    shutil.copytree(site.folder / "base", site.folder / "bare")
    for path in (site.folder / "bare").glob("*token*"):
        path.unlink()
    site.refused("no tokenizer in it", base="bare")


def test_outputs_that_are_refused(site: Site) -> None:
    site.refused("base", "is an input", out="base")
    (site.folder / "notes").mkdir()
    (site.folder / "notes" / "mine.txt").write_text("mine")
    site.refused("exists", out="notes")
    site.refused("a picture's name must end in", more=("--picture", site.folder / "run.gif"))
    site.refused("is an input", more=("--force", "--picture", site.folder / "base/config.json.svg"),
                 out="base")  # fmt: skip
    site.refused("no such folder", more=("--picture", site.folder / "none" / "run.png"))


def test_settings_that_are_refused(site: Site) -> None:
    site.refused("--layers: 9; the base has 3 layers", more=("--layers", "9"))
    site.refused("--top-k: 3; there are only 2 experts", more=("--top-k", 3))
    site.refused("--expert-size: 33", more=("--expert-size", 33))
    site.refused("--window 100000: the base's context length", more=("--window", 100_000))
    for words in (["--layers", "8-2"], ["--layers", "x"], ["--base-bits", "3"]):
        assert site.run(*words, code=2).err.startswith("error: --")
    result = site.run(code=2, domain=["cooking"])
    assert "--domain: 'cooking': expected NAME=PATH" in result.err


def test_memory_that_is_too_small(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlier_mlx.train.stages.budget", lambda: Budget(10**4, "this toaster"))
    site.refused("the training needs", "this toaster gives 10.0 kB")
    assert "this toaster gives 10.0 kB" in site.run("--plan").err


def test_a_disk_that_is_too_small(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(site.folder)
    for free, words in ((1000, "the overlay takes"), (20_000, "the state of the training takes")):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _, n=free: usage._replace(free=n))
            site.refused(words, "are free")


# -- parts --------------------------------------------------------------------------------------


def test_the_work_is_not_in_the_overlay(site: Site) -> None:
    for work in ("mine", "mine/work"):
        site.refused("overlay's folder", "--work", more=("--work", site.folder / work))


def test_numbers_of_layers() -> None:
    assert _layers("auto") is None
    assert _layers("8-10") == (8, 9, 10)
    assert _layers("7,3-4,3") == (3, 4, 7)
    assert layer_ranges((3, 4, 5, 7, 9, 10)) == "3 to 5, 7, 9 to 10"


def test_how_many_experts_there_are() -> None:
    settings = Settings(layers=(3, 4, 7), expert_size=64, top_k=1)
    assert experts_line(settings, 1) == (
        "1 expert of width 64 in each of 3 layers (3 to 4, 7), 1 for a token"
    )


def test_times_for_people() -> None:
    assert [duration(s) for s in (4.4, 99, 170, 7500)] == ["4 s", "99 s", "3 min", "2 h 5 min"]


def test_lines_about_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    display = Display(Settings(expert_steps=100, joint_steps=50), 2, quiet=False)
    display._show = shown.append
    event = {"event": "step", "stage": "a", "step": 50, "steps": 100, "loss": 3.21987}
    display(event | {"tokens_per_second": 1234.5, "seconds_left": 100.0})
    # 200 of 250 steps are left, at two seconds each.
    assert shown == ["a: step 50 of 100, loss 3.220, 1,234 tokens/s, 7 min left"]
    line = stage_line(
        {"name": "a", "kept": False, "seconds": 61.0, "before": {"x": 8}, "after": {"x": 9.5}}
    )
    assert line == "a: x 8.00 → 9.50; not kept (61 s)"
    display({"event": "resumed"})
    assert "going on" in capsys.readouterr().err
