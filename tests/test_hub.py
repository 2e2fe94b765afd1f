"""Repositories instead of folders, served by a local stand-in for the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import outlier_mlx
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.errors import OutlierError
from outlier_mlx.storage import remote
from outlier_mlx.storage.hub import resolve
from tests.builders import write_base, write_overlay
from tests.folders import tier_contents
from tests.form_builders import to_gguf, to_packed
from tests.hub import Hub, opened, variables
from tests.program import Result, assert_refused, run, run_program

DIMS: dict[str, Any] = {"layers": 2, "intermediate": 64}
OVERLAY_DIMS: dict[str, Any] = DIMS | {"moe_layers": (1,), "experts": 2}
PROMPT = "The heron stands in the water"
NOT_OURS = ["pytorch_model.bin", "modeling_outlier.py", "training.log", "deep/optimizer.pt"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits each of an overlay and of its base, and a tier of the second ones."""
    root = tmp_path_factory.mktemp("hub")
    for n in (1, 2):
        write_overlay(
            root / f"overlay-{n}", with_base=False, tokenizer=False, seed=n, **OVERLAY_DIMS
        )
        write_base(root / f"base-{n}", shards=2, seed=n, **DIMS)
        for folder in (root / f"overlay-{n}", root / f"base-{n}"):
            for name in NOT_OURS:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text("not for us")
    outlier_mlx.convert(root / "overlay-2", root / "base-2", root / "tier")
    return root


@pytest.fixture
def hub(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in as this process's hub, with an empty cache and nobody logged in."""
    hub = Hub()
    hub.add("owner/overlay", folders / "overlay-1", folders / "overlay-2")
    hub.add("owner/base", folders / "base-1", folders / "base-2")
    hub.add("owner/tier", folders / "tier")
    with opened(hub, tmp_path, monkeypatch):
        yield hub


def convert(out: Path, *options: str, code: int = 0) -> Result:
    arguments = ["convert", "owner/overlay", "--base", "owner/base", "--out", out, "--quiet"]
    return run(*arguments, *options, code=code)


@pytest.mark.parametrize("which", [1, 2])
def test_convert(hub: Hub, folders: Path, tmp_path: Path, which: int) -> None:
    options = ["--revision", "v1", "--base-revision", "v1"] if which == 1 else []
    result = convert(tmp_path / "tier", *options)
    assert result.both == ""
    local = outlier_mlx.convert(
        folders / f"overlay-{which}", folders / f"base-{which}", tmp_path / "local"
    )
    assert tier_contents(tmp_path / "tier") == tier_contents(local)
    # The commits are recorded, whatever they were asked for as.
    manifest = json.loads((tmp_path / "tier" / "tier.json").read_text())
    overlay_commit = hub.repos["owner/overlay"].refs[f"v{which}"]
    base_commit = hub.repos["owner/base"].refs[f"v{which}"]
    overlay, base = manifest["overlay"], manifest["base"]
    assert (overlay["name"], overlay["revision"]) == ("owner/overlay", overlay_commit)
    assert (base["name"], base["revision"]) == ("owner/base", base_commit)
    card = (tmp_path / "tier" / "README.md").read_text()
    assert overlay_commit in card and base_commit in card
    assert "base_model: owner/base\n" in card


def test_one_revision_of_each(hub: Hub, folders: Path, tmp_path: Path) -> None:
    commit = hub.repos["owner/overlay"].refs["v1"]
    convert(tmp_path / "tier", "--revision", commit)
    local = outlier_mlx.convert(folders / "overlay-1", folders / "base-2", tmp_path / "local")
    assert tier_contents(tmp_path / "tier") == tier_contents(local)


def test_only_what_is_needed_is_fetched(hub: Hub, tmp_path: Path) -> None:
    convert(tmp_path / "tier")
    assert hub.files_asked("owner/overlay") == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert not hub.files_asked("owner/base") & set(NOT_OURS)
    full = [r for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert len(full) == len({request.path for request in full}) == 3


def test_a_warm_cache_needs_no_hub(
    hub: Hub, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tmp_path / "first")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    hub.requests.clear()
    convert(tmp_path / "second")
    assert tier_contents(tmp_path / "second") == tier_contents(tmp_path / "first")
    assert same_but_for_the_name("owner/base", folders / "base-2")
    assert hub.requests == []
    first = json.loads((tmp_path / "first" / "tier.json").read_text())
    assert json.loads((tmp_path / "second" / "tier.json").read_text()) == first


def test_a_hub_that_is_away(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is in the cache everything works; without, one line."""
    convert(tmp_path / "first")
    gone = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", gone)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, gone),
    )
    convert(tmp_path / "second")
    assert tier_contents(tmp_path / "second") == tier_contents(tmp_path / "first")
    result = run("convert", "owner/tier", code=1)
    assert_refused(result, "owner/tier", "cannot be reached")


def test_offline_with_a_cold_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    result = convert(tmp_path / "tier", code=1)
    assert_refused(result, "owner/overlay", "not in the local cache")
    assert_refused(run("info", "owner/overlay", code=1), "owner/overlay", "not in the local cache")
    assert hub.requests == []
    assert not (tmp_path / "tier").exists()


@pytest.mark.parametrize(
    "command",
    [["convert"], ["info"], ["generate", "--prompt", "x", "--model"]],
    ids=lambda command: command[0],
)
def test_refusals(hub: Hub, command: list[str]) -> None:
    def refused(name: str, *words: str, options: tuple[str, ...] = ()) -> None:
        assert_refused(run(*command, name, *options, code=1), name, *words)

    refused("owner/nothing", "no such folder", "hf auth login")
    hub.private.add("owner/tier")
    refused("owner/tier", "private", "hf auth login")
    hub.repos["owner/overlay"].refusal = (403, "GatedRepo")
    refused("owner/overlay", "access is restricted", "hf auth login")
    refused("owner/base", "no such revision", options=("--revision", "v9"))
    hub.down = True
    refused("owner/base", "cannot be reached")


def test_names_that_lead_elsewhere_are_not_asked_for(hub: Hub) -> None:
    for name in ("owner/..", "owner/name/more", "../owner", "owner/na me", "owner//name"):
        assert_refused(run("info", name, code=1))
    assert hub.requests == []


def test_a_file_is_no_model_but_a_gguf_file_can_become_one(tmp_path: Path) -> None:
    for name, words in (("model.gguf", ("outlier-mlx import", "makes one")), ("model.bin", ())):
        file = tmp_path / name
        file.touch()
        asked = run("generate", "--model", file, "--prompt", "x", code=1)
        assert_refused(asked, name, "a file; expected a folder", *words)
        assert ("import" in asked.err) == bool(words)


def test_a_base_that_is_refused_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.repos["owner/base"].refusal = (403, "GatedRepo")
    (tmp_path / "outputs").mkdir()
    assert_refused(convert(tmp_path / "outputs" / "tier", code=1), "owner/base", "restricted")
    assert list((tmp_path / "outputs").iterdir()) == []


def test_the_login_is_sent_and_kept_secret(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private |= {"owner/overlay", "owner/base"}
    token = "hf_" + "s" * 34
    monkeypatch.setenv("HF_TOKEN", token)
    result = convert(tmp_path / "tier")
    run("info", "owner/overlay")
    assert {r.token for r in hub.requests if "owner" in r.path} == {f"Bearer {token}"}
    assert token not in result.both
    for path in (tmp_path / "tier").iterdir():
        assert token.encode() not in path.read_bytes()


def same_but_for_the_name(repo: str, folder: Path) -> bool:
    found = inspect(repo)
    assert found.name == repo
    return found.as_json() | {"name": ""} == inspect(folder).as_json() | {"name": ""}


def test_info_reads_headers_only(hub: Hub, folders: Path, tmp_path: Path) -> None:
    large = write_overlay(tmp_path / "large", shards=2, vocab=4096, **OVERLAY_DIMS).path
    hub.add("owner/large", large)
    assert same_but_for_the_name("owner/large", large)
    shards = {path.name: path.stat().st_size for path in large.glob("*.safetensors")}
    index = "model.safetensors.index.json"
    assert hub.files_asked("owner/large") == {
        "config.json",
        "tokenizer_config.json",  # for the chat template
        index,
        *shards,
    }
    # A header is somewhere in the first 100 kB; that much is asked for, and no more.
    weights = [r for r in hub.asked("owner/large") if r.path.endswith(".safetensors")]
    ends = [min(100_000, size) - 1 for size in shards.values()]
    assert sorted(r.part or "" for r in weights) == sorted(f"bytes=0-{end}" for end in ends)
    assert sum(request.sent for request in weights) <= 2 * 100_000 < sum(shards.values()) / 4
    for name, folder in [("overlay", "overlay-2"), ("base", "base-2"), ("tier", "tier")]:
        assert same_but_for_the_name(f"owner/{name}", folders / folder)


@pytest.mark.parametrize("monolith", [False, True])
def test_info_counts_packed_experts(hub: Hub, tmp_path: Path, monolith: bool) -> None:
    built = write_overlay(tmp_path / "packed", **OVERLAY_DIMS)
    folder = to_packed(built, monolith=monolith).path
    assert folder == built.path
    hub.add("owner/packed", folder)
    assert same_but_for_the_name("owner/packed", folder)
    asked = [r for r in hub.asked("owner/packed") if r.path.endswith(".bin")]
    # A table says where everything is in a monolith; files of their own have no header.
    assert len(asked) == monolith and all(request.part for request in asked)


@pytest.mark.parametrize("head", [100_000, 50])
def test_info_counts_experts_in_gguf(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: int
) -> None:
    """How long its metadata are, a GGUF file does not say: more is fetched until they end."""
    dims: dict[str, Any] = {"hidden": 256, "expert_intermediate": 256, "layers": 2, "experts": 2}
    folder = to_gguf(write_overlay(tmp_path / "gguf", moe_layers=(1,), **dims)).path
    hub.add("owner/gguf", folder)
    monkeypatch.setattr(remote, "SMALL_BYTES", head)
    assert same_but_for_the_name("owner/gguf", folder)
    weights = [r for r in hub.asked("owner/gguf") if r.path.endswith(".gguf")]
    (file,) = folder.glob("*.gguf")
    assert len(weights) == 1 if head == 100_000 else len(weights) > 1
    assert sum(request.sent for request in weights) <= max(head, file.stat().st_size / 8)


def test_info_of_a_long_header(hub: Hub, tmp_path: Path) -> None:
    """One that 100 kB do not hold takes a second request, and still no weights."""
    dims: dict[str, Any] = {"layers": 1, "moe_layers": (0,), "experts": 150, "intermediate": 512}
    folder = write_overlay(tmp_path / "many", vocab=2048, expert_intermediate=4, **dims).path
    shard = folder / "model.safetensors"
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    assert header > 100_000 and 2 * header + 100_000 < shard.stat().st_size
    hub.add("owner/many", folder)
    assert inspect("owner/many").params == inspect(folder).params
    weights = [r for r in hub.asked("owner/many") if r.path.endswith(".safetensors")]
    assert [r.part for r in weights] == ["bytes=0-99999", f"bytes=100000-{header + 7}"]
    assert sum(request.sent for request in weights) == 8 + header


def test_recipes_are_listed_from_headers(
    hub: Hub, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are neither fetched nor, once they are in the cache, asked for."""
    monkeypatch.setattr(remote, "SMALL_BYTES", 4000)
    command = ["tiers", "--ram", "16", "--json"]
    local = run(*command, folders / "overlay-2", "--base", folders / "base-2").out
    local = local.replace("overlay-2:", "overlay:")
    assert run(*command, "owner/overlay", "--base", "owner/base").out == local
    weights = [r for r in hub.requests if r.path.endswith(".safetensors")]
    assert {r.path.split("/resolve/")[0] for r in weights} == {"/owner/overlay", "/owner/base"}
    assert all(r.part and r.sent <= 8000 for r in weights)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert_refused(run("tiers", "owner/overlay", code=1), "owner/overlay", "not in the local")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for repo in ("owner/overlay", "owner/base"):
        resolve(repo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert run(*command, "owner/overlay", "--base", "owner/base").out == local


def test_info_as_of_a_revision(hub: Hub, folders: Path) -> None:
    outlier_mlx.convert(folders / "overlay-1", folders / "base-1", folders / "f32", tier="f32")
    hub.add("owner/both", folders / "f32", folders / "tier")
    assert inspect("owner/both").nbytes == inspect(folders / "tier").nbytes
    assert inspect("owner/both", "v1").nbytes == inspect(folders / "f32").nbytes


def test_generate_from_a_repository(hub: Hub, folders: Path) -> None:
    options = ["--prompt", PROMPT, "--max-tokens", "6"]
    text = run("generate", "--model", "owner/tier", *options).out
    assert text == run("generate", "--model", folders / "tier", *options).out
    # Code in a repository is not run, so it is not even fetched.
    asked = hub.files_asked("owner/tier")
    assert "config.json" in asked and "outlier_moe.py" not in asked


def test_python(hub: Hub, folders: Path) -> None:
    model, tokenizer = outlier_mlx.load("owner/tier", "v1")
    assert model.args.num_experts == 2 and tokenizer.encode(PROMPT)
    with pytest.raises(OutlierError, match="owner/tier: no such revision"):
        outlier_mlx.load("owner/tier", "v2")


@pytest.mark.slow
def test_the_environment_of_a_program(hub: Hub, tmp_path: Path, folders: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN as a shell sets them; nothing but errors on stderr."""
    environment = variables(hub, tmp_path / "home", HF_TOKEN="hf_secret")
    out = tmp_path / "tier"
    command = ["convert", "owner/overlay", "--base", "owner/base", "--out", out, "--quiet"]
    for offline in ("0", "1"):
        shutil.rmtree(out, ignore_errors=True)
        hub.requests.clear()
        settings = environment | {"HF_HUB_OFFLINE": offline}
        assert run_program(*command, env=settings).both == ""
        assert tier_contents(out) == tier_contents(folders / "tier")
        assert {r.token for r in hub.requests if "owner" in r.path} == (
            {"Bearer hf_secret"} if offline == "0" else set()
        )
