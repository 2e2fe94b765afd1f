"""The short names: `run`, `list` and `rm`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from huggingface_hub import constants

from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.drafting.draft_model import ModelDrafts
from outlier_mlx.engine.drafting.gate import Costs
from outlier_mlx.storage.hub import resolve
from tests.folders import copy_writable, names
from tests.hub import Hub, opened
from tests.library import Library
from tests.program import assert_refused, run
from tests.screen import on_terminal


@pytest.fixture
def here(small_tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: two tiers and a file of ours; `someone/tier` is in the hub's cache."""
    copy_writable(small_tier, tmp_path / "tiers" / "one")
    copy_writable(small_tier, tmp_path / "tiers" / "two")
    (tmp_path / "tiers" / "notes").mkdir()
    (tmp_path / "tiers" / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    with opened(hub, tmp_path, monkeypatch):
        hub.add("someone/tier", small_tier)
        resolve("someone/tier")
        yield tmp_path


def test_models_are_listed_with_size_form_and_last_use(here: Path) -> None:
    os.utime("tiers/two/config.json", (4e9, 4e9))  # later than any other
    listed = run("list", "tiers", "--json").json
    assert [model["name"] for model in listed] == [
        *("tiers/some.gguf", "tiers/one", "tiers/two"),
        "someone/tier",
    ]
    gguf, one, two, cached = listed
    assert gguf["form"] == "GGUF" and gguf["nbytes"] == 4
    assert one["form"] == two["form"] == cached["form"] == "tier, tq1_0_strided"
    held = sum(path.stat().st_size for path in Path("tiers/one").iterdir())
    assert one["nbytes"] == held and 0 < cached["nbytes"] <= held
    assert two["used"] == "2096-10-02T07:06:40Z" and one["used"] < "2096"
    assert cached["in_cache"] and not one["in_cache"]
    table = run("list", "tiers").out
    assert [line.split()[0] for line in table.splitlines()[2:]] == [m["name"] for m in listed]
    # A model's own folder is one model.
    assert [model["name"] for model in run("list", "tiers/one", "--json").json][:1] == ["tiers/one"]


def test_running_a_model_is_its_last_use(here: Path) -> None:
    for folder in ("one", "two"):
        for path in Path("tiers", folder).iterdir():
            os.utime(path, (1e9, 1e9))
    run("generate", "tiers/one", "-p", "Hi", "-m", "1", "--quiet")
    used = {model["name"]: model["used"] for model in run("list", "tiers", "--json").json}
    assert used["tiers/two"] == "2001-09-09T01:46:40Z" and used["tiers/one"] > "2026"
    assert Path("tiers/one/config.json").stat().st_mtime == 1e9
    assert "25 years ago" in run("list", "tiers").out


def test_a_model_that_is_not_whole_is_listed(here: Path) -> None:
    for path in Path("tiers/one").glob("*.safetensors"):
        path.unlink()
    Path("tiers/two/config.json").write_text("{")
    forms = {model["name"]: model["form"] for model in run("list", "tiers", "--json").json}
    assert forms["tiers/one"] == forms["tiers/two"] == "not complete, or not valid"


def test_a_missing_package_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("export", FOLDER / "overlay", "--format", "gguf-experts", "--out", "tiers/experts")
    monkeypatch.setitem(sys.modules, "gguf", None)
    forms = {model["name"]: model["form"] for model in run("list", "tiers", "--json").json}
    assert forms["tiers/experts"] == "needs the package gguf"


def test_nothing_to_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    listed = run("list")
    assert listed.out == "" and "name folders to look in" in listed.err
    assert run("list", "--json").json == []
    assert_refused(run("list", tmp_path / "missing", code=1), "missing: no such folder")


def test_models_are_removed(here: Path) -> None:
    told = run("rm", "tiers/one", "someone/tier", "--yes").err
    assert told.startswith("tiers/one: removed, ") and "someone/tier: removed, " in told
    assert names(Path("tiers")) == ["notes", "some.gguf", "two"]
    assert [model["name"] for model in run("list", "tiers", "--json").json] == [
        *("tiers/some.gguf", "tiers/two"),
    ]
    assert not list(Path("cache").glob("models--*"))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("tiers/notes", "is empty; rm removes only what outlier-mlx wrote"),
        ("tiers", "is not a tier"),
        ("tiers/some.gguf", "a file"),
        ("no/body", "no such folder, and not in the hub's cache"),
    ],
)
def test_nothing_is_removed_if_one_may_not_be(here: Path, model: str, why: str) -> None:
    assert_refused(run("rm", "tiers/one", model, "--yes", code=1), why)
    if why == "a file":
        assert_refused(run("list", model, code=1), "tiers/some.gguf: a file; expected a folder")
    assert names(Path("tiers")) == ["notes", "one", "some.gguf", "two"]


def test_what_links_lead_to_stays(here: Path) -> None:
    """A repository elsewhere; and links out of folders, whoever made them."""
    outside = here / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    config = Path("tiers/one/config.json")
    config.rename(outside / "config.json")
    config.symlink_to(outside / "config.json")
    run("rm", "tiers/one", "--yes")
    Path("tiers/two/more").symlink_to(outside, target_is_directory=True)
    assert_refused(run("rm", "tiers/two", "--yes", code=1), "holds more")
    Path("link").symlink_to("tiers/two", target_is_directory=True)
    for name in ("link", "link/", "link/.", here / "link"):
        assert_refused(run("rm", name, "--yes", code=1), "is a link")
    repository = Path("cache/models--someone--tier")
    (snapshot,) = (repository / "snapshots").iterdir()
    (snapshot / "file").symlink_to(outside / "precious")
    (snapshot / "folder").symlink_to(outside, target_is_directory=True)
    repository.rename("moved")
    repository.symlink_to(here / "moved", target_is_directory=True)
    assert_refused(run("rm", "someone/tier", "--yes", code=1), "is a link: remove it")
    repository.unlink()
    Path("moved").rename(repository)
    run("rm", "someone/tier", "--yes")
    assert not repository.exists()
    assert names(outside) == ["config.json", "precious"]


def test_removal_is_confirmed(here: Path) -> None:
    assert run("rm", "tiers/one", code=2).err.startswith("error: --yes: is needed")
    shown = on_terminal(80, "rm", "tiers/one", typed="n\n")
    assert "Remove tiers/one (" in shown and "not removed" in shown
    assert Path("tiers/one").exists()
    assert "tiers/one: removed" in on_terminal(80, "rm", "tiers/one", typed="y\n")
    assert not Path("tiers/one").exists()


@pytest.mark.slow
def test_run_answers_a_prompt_or_talks(library: Library) -> None:
    tier = library.demo_tier("q4")
    asked = ("--temp", "0", "--quiet")
    answer = run("generate", tier, "-p", "Tell me a story about a duck.", "-m", "2048", *asked).out
    assert len(answer) > 20
    assert run("run", tier, "Tell me a story about a duck.", *asked).out == answer
    words = ["Tell", "me", "a", "story", "about", "a", "duck."]
    assert run("run", tier, *words, *asked).out == answer
    assert run("run", "--model", tier, "Tell me a story about a duck.", *asked).out == answer
    assert run("run", tier, "-", *asked, input="Tell me a story about a duck.").out == answer
    talk = run("chat", tier, *asked, input="Tell me a story about a duck.\nHi\n").out
    assert run("run", tier, *asked, input="Tell me a story about a duck.\nHi\n").out == talk
    assert answer in talk


def test_run_drafts_as_generate_and_chat_do(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    note = ModelDrafts.note

    def counted(self: ModelDrafts, tokens: Sequence[int], drafted: int) -> None:
        made.append(drafted)
        note(self, tokens, drafted)

    monkeypatch.setattr(ModelDrafts, "note", counted)
    monkeypatch.setattr(Costs, "of", lambda self, width: 1.0)
    tier, base = library.demo_tier("q4"), FOLDER / "base"
    command = ("run", tier, "How do I find Vega?", "--temp", "0", "-m", "40")
    plain = run(*command, "--no-prompt-lookup")
    assert "drafted" not in plain.err
    drafts = ("--draft-model", base, "--num-draft-tokens", "2")
    answer = run(*command, *drafts)
    assert answer.out == plain.out
    found = re.search(r"(\d+) steps, (\d+) of (\d+) drafted tokens accepted", answer.err)
    assert found is not None
    steps, accepted, drafted = map(int, found.groups())
    assert steps == len(made)
    assert 0 < accepted <= drafted <= 2 * steps
    talk = run("run", tier, "--temp", "0", "-m", "40", *drafts, input="How do I find Vega?\n")
    assert talk.out.strip() == plain.out.strip()
    assert len(made) > steps
    named = run("run", tier, "Hi", "--draft-model", tier.parent / "none", code=1)
    assert_refused(named, "none: no such folder")


def test_sampling_of_run_is_that_of_chat(library: Library) -> None:
    tier = library.demo_tier("q4")
    sampled = run("run", tier, "Tell me a story.", "--seed", "3", "--quiet").out
    how = ("--temp", "0.7", "--top-p", "0.9", "-m", "2048", "--seed", "3", "--quiet")
    assert run("generate", tier, "-p", "Tell me a story.", *how).out == sampled
