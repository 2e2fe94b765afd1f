"""`push`, and `convert --upload-repo`, over HTTP to a local stand-in for the hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard, constants

import outlier_mlx
from outlier_mlx.tiers.verify import verify_tier
from tests.builders import write_base, write_overlay
from tests.folders import contents
from tests.hub_uploads import WritableHub
from tests.program import run
from tests.ternary_sources import mlx_pack

REPO = "owner/tier"
DIMS: dict[str, Any] = {"layers": 2, "intermediate": 64}
OVERLAY_DIMS: dict[str, Any] = DIMS | {"moe_layers": (1,), "experts": 2}
PROMPT = "The heron stands in the water"
# What a folder may hold besides, and must not leave the machine.
STRAY = [".env", "notes.txt", "LICENSE_KEY.txt", "NOTICE.pem", "tokens.json", "deep/LICENSE"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay with its base, licences stated, and tiers of them."""
    root = tmp_path_factory.mktemp("push")
    write_overlay(root / "overlay", with_base=False, tokenizer=False, **OVERLAY_DIMS)
    write_base(root / "base", **DIMS)
    for name in ("overlay", "base"):
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
        (root / name / "LICENSE").write_text("The licence.\n")
    outlier_mlx.convert(root / "overlay", root / "base", root / "tier")
    return root


@pytest.fixture
def tier(folders: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folders / "tier", tmp_path / "tier")


def refused(*arguments: object, words: tuple[str, ...], code: int = 1) -> None:
    result = run(*arguments, code=code)
    assert result.out == ""
    line = result.err.splitlines()[-1]
    assert line.startswith("error: ") and not [w for w in words if w not in line], line
    assert "http" not in line and "hf_" not in line


def without_card(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "README.md"}


def arrived(hub: WritableHub, branch: str = "main") -> dict[str, bytes]:
    files = contents(hub.head(REPO, branch))
    del files[".gitattributes"]
    return files


def test_what_arrives_is_the_tier_and_nothing_else(hub: WritableHub, tier: Path) -> None:
    whole = contents(tier)
    for name in STRAY:
        (tier / name).parent.mkdir(exist_ok=True)
        (tier / name).write_text("secret")
    result = run("push", tier, REPO, "--message", "A first one")
    assert result.out == f"{hub.url}/{REPO}\n"
    assert without_card(arrived(hub)) == without_card(whole)
    assert "LICENSE" in whole
    assert hub.messages == ["A first one"]
    assert REPO not in hub.private
    card = ModelCard(arrived(hub)["README.md"].decode())
    assert card.data.get("license") == "apache-2.0"
    assert f"outlier-mlx generate --model {REPO} " in card.text
    # The token goes to the hub, not to where contents are stored, and is told to nobody.
    assert hub.token not in result.both
    assert not [name for name, data in arrived(hub).items() if hub.token.encode() in data]
    tokens = {request.token for request in hub.requests if "/api/models/" in request.path}
    assert tokens == {f"Bearer {hub.token}"}


def test_a_second_push_sends_nothing(hub: WritableHub, tier: Path) -> None:
    run("push", tier, REPO)
    head = hub.head(REPO)
    hub.written.clear()
    result = run("push", tier, REPO)
    assert hub.written == []
    assert hub.head(REPO) == head
    assert "0 files sent (0 B)" in result.err


def test_an_update_sends_what_changed_and_removes_what_is_gone(
    hub: WritableHub, folders: Path, tier: Path, tmp_path: Path
) -> None:
    """Shards of before, and files that its manifest lists; nothing that somebody added."""
    shutil.copy(tier / "tokenizer.json", tier / "vocab.txt")
    (tier / "measured.json").write_text("{}")
    manifest = json.loads((tier / "tier.json").read_text())
    manifest["files"]["vocab.txt"] = manifest["files"]["tokenizer.json"]
    (tier / "tier.json").write_text(json.dumps(manifest))
    run("push", tier, REPO)
    assert "vocab.txt" in arrived(hub)
    ours = {"model-00002-of-00002.safetensors": b"old", "measured.json": b"{}"}
    theirs = {"picture.png": b"theirs", "vocab.bpe": b"theirs"}
    for name, data in (ours | theirs).items():
        hub.put(REPO, name, data)
    hub.sent.clear()
    result = run("push", folders / "tier", REPO)
    assert without_card(arrived(hub)) == without_card(contents(folders / "tier")) | theirs
    assert set(hub.sent) == {"tier.json"}
    assert "1 files sent" in result.err and "3 removed" in result.err


def test_large_files_in_parts(hub: WritableHub, tier: Path) -> None:
    hub.part = 20_000
    run("push", tier, REPO)
    assert without_card(arrived(hub)) == without_card(contents(tier))
    assert len(hub.parts) > 2


def test_a_damaged_tier_is_refused_before_the_hub_is_asked(hub: WritableHub, tier: Path) -> None:
    shard = next(tier.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refused("push", tier, REPO, words=(shard.name, "damaged"))
    shutil.rmtree(tier)
    tier.mkdir()
    refused("push", tier, REPO, words=(str(tier), "not a tier"))
    assert hub.requests == [] and hub.written == []


@pytest.mark.parametrize("name", ["tier", "owner/a/b", "../tier", "owner/..", "owner/a b", ""])
def test_names_that_are_none(hub: WritableHub, tmp_path: Path, name: str) -> None:
    for command in (["push", tmp_path, name], ["convert", tmp_path, "--upload-repo", name]):
        assert "OWNER/NAME" in run(*command, code=2).err
    assert hub.requests == []


@pytest.mark.parametrize(
    ("endpoint", "answer", "words"),
    [
        ("create", (401, ""), ("does not accept this login", "hf auth login")),
        ("create", (403, "no rights"), ("may not write there", "write access to owner")),
        ("create", (500, ""), ("the hub answered 500",)),
        ("preupload", (403, "read-only token"), ("may not write there", "read-only token")),
        ("validate-yaml", (400, "no such licence"), ("metadata", "no such licence")),
        ("batch", (403, "no room: https://pay.example"), ("no room: (address)",)),
        ("commit", (500, ""), ("the hub answered 500",)),
        ("commit", (412, ""), ("another program", "try again")),
    ],
)
def test_refusals(
    hub: WritableHub, tier: Path, endpoint: str, answer: tuple[int, str], words: tuple[str, ...]
) -> None:
    hub.refuse[endpoint] = answer
    refused("push", tier, REPO, words=(REPO, *words))
    assert hub.messages == []


def test_whose_repository_it_is(hub: WritableHub, tier: Path) -> None:
    refused("push", tier, "other/tier", words=("may not write", "write access to other"))
    hub.create("other/tier", private=False)
    refused("push", tier, "other/tier", words=("may not write", "write access to other"))
    assert hub.messages == []


def test_without_a_login_or_a_hub(
    hub: WritableHub, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = folders / "tier"
    monkeypatch.delenv("HF_TOKEN")
    refused("push", tier, REPO, words=("not logged in", "hf auth login"))
    out = tmp_path / "out"
    command = ["convert", folders / "overlay", "--base", folders / "base", "--out", out]
    refused(*command, "--upload-repo", REPO, words=("not logged in",))
    assert not out.exists() and hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    refused("push", tier, REPO, words=("does not accept this login",))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    refused("push", tier, REPO, words=("cannot be reached",))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    refused("push", tier, REPO, words=("cannot be reached",))


def test_a_commit_of_somebody_else_meanwhile(
    hub: WritableHub, tier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create(REPO, private=False)
    commit = HfApi.create_commit

    def late(self: HfApi, *arguments: Any, **options: Any) -> Any:
        hub.put(REPO, "README.md", b"theirs")
        return commit(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    refused("push", tier, REPO, words=("another program has changed this repository",))
    assert arrived(hub) == {"README.md": b"theirs"}


def test_ctrl_c(hub: WritableHub, tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create(REPO, private=False)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "preupload_lfs_files", interrupted)
    result = run("push", tier, REPO, code=130)
    assert "as it was or all new" in result.err and result.out == ""
    assert arrived(hub) == {}


def test_another_tier_is_replaced_by_force_alone(
    hub: WritableHub, folders: Path, tier: Path, tmp_path: Path
) -> None:
    run("push", tier, REPO)
    other = outlier_mlx.convert(
        folders / "overlay", folders / "base", tmp_path / "other", tier="q8"
    )
    refused("push", other, REPO, words=("another tier (q4 of overlay)", "--force"))
    assert without_card(arrived(hub)) == without_card(contents(tier))
    run("push", other, REPO, "--force")
    assert without_card(arrived(hub)) == without_card(contents(other))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = run("push", tmp_path / "gone", REPO, "--dry-run", code=1)
    assert done.err == f"error: {tmp_path / 'gone'}: no such folder\n"


def test_what_is_no_tier_is_not_mixed_with_one(hub: WritableHub, tier: Path) -> None:
    hub.create(REPO, private=False)
    hub.put(REPO, "adapter.bin", b"theirs")
    refused("push", tier, REPO, words=("not a tier (adapter.bin)", "--force"))
    run("push", tier, REPO, "--force")
    assert arrived(hub)["adapter.bin"] == b"theirs"
    hub.put(REPO, "model.safetensors", b"theirs")
    refused("push", tier, REPO, "--force", words=("model.safetensors", "would be loaded"))


def test_private(hub: WritableHub, tier: Path) -> None:
    run("push", tier, REPO, "--private")
    assert REPO in hub.private
    run("push", tier, REPO)
    assert REPO in hub.private
    hub.private.clear()
    refused("push", tier, REPO, "--private", words=("public",))


def test_a_branch(hub: WritableHub, tier: Path) -> None:
    assert run("push", tier, REPO, "--revision", "dev").out == f"{hub.url}/{REPO}/tree/dev\n"
    assert arrived(hub) == {}
    assert without_card(arrived(hub, "dev")) == without_card(contents(tier))
    hub.written.clear()
    run("push", tier, REPO, "--revision", "dev")
    assert hub.written == []


def test_nothing_is_published_without_a_licence(
    hub: WritableHub, folders: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(folders / "base", tmp_path / "bare")
    (bare / "README.md").unlink()
    tier = outlier_mlx.convert(folders / "overlay", bare, tmp_path / "tier")
    refused("push", tier, REPO, words=("base 'bare'", "--license ID", "--private"))
    assert "'' is no" in run("push", tier, REPO, "--license", "", code=2).err
    assert hub.requests == []
    result = run("push", tier, "owner/mine", "--private")
    assert "no licence is known for the base 'bare'" in result.err
    card = ModelCard((hub.head("owner/mine") / "README.md").read_text())
    assert card.data.get("license") is None
    assert "base `bare`: none stated" in card.text and "none is assumed" in card.text
    run("push", tier, REPO, "--license", "mit")
    card = ModelCard(arrived(hub)["README.md"].decode())
    assert card.data.get("license") == ["apache-2.0", "mit"]
    assert "the publisher of this model names `mit`" in card.text
    refused("push", folders / "tier", REPO, "--license", "mit", words=("apache-2.0", "state"))


def test_a_dry_run_asks_nobody(
    hub: WritableHub, tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = run("push", tier, REPO, "--dry-run")
    assert hub.requests == [] and hub.written == []
    names = {line.split()[0] for line in result.err.splitlines()[:-1]}
    assert names == set(contents(tier))
    # What it prints is what is pushed, and can be edited before.
    monkeypatch.setenv("HF_TOKEN", hub.token)
    run("push", tier, REPO)
    assert arrived(hub)["README.md"].decode() == result.out
    (tmp_path / "card.md").write_text(result.out + "\nMy own words.\n")
    run("push", tier, REPO, "--card", tmp_path / "card.md")
    assert arrived(hub)["README.md"].decode() == result.out + "\nMy own words.\n"


def test_converted_pushed_fetched_and_run(hub: WritableHub, folders: Path, tmp_path: Path) -> None:
    hub.add("owner/base", folders / "base")
    out = tmp_path / "out"
    command = ["convert", folders / "overlay", "--base", "owner/base", "--out", out]
    result = run(*command, "--upload-repo", REPO)
    assert result.out == f"{hub.url}/{REPO}\n"
    card = ModelCard(arrived(hub)["README.md"].decode())
    assert (card.data["base_model"], card.data["base_model_relation"]) == (
        "owner/base",
        "quantized",
    )
    generate = ["generate", "--prompt", PROMPT, "--max-tokens", "6", "--model"]
    assert run(*generate, REPO).out == run(*generate, out).out
    pulled = huggingface_hub.snapshot_download(REPO)
    assert verify_tier(Path(pulled)) == verify_tier(out)


def test_a_ternary_model_imported_pushed_fetched_and_run(hub: WritableHub, tmp_path: Path) -> None:
    """Under the licence of what it was imported from; it is not mixed with a tier."""
    source = mlx_pack().write(tmp_path / "pack")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    model = tmp_path / "model"
    run("import", source, "--out", model)
    assert "--trust-remote-code" in (model / "README.md").read_text()
    run("push", model, REPO)
    files = arrived(hub)
    assert without_card(files) == without_card(contents(model))
    card = ModelCard(files["README.md"].decode())
    assert card.data.get("license") == "apache-2.0" and "ternary" in card.data.get("tags")
    assert f"mlx_lm.generate --model {REPO} --trust-remote-code" in card.text
    assert "- source `pack`: `apache-2.0`" in card.text
    assert hub.messages[-1].startswith("Ternary model, made by outlier-mlx")
    generate = ["generate", "--prompt", PROMPT, "--max-tokens", "6", "--model"]
    assert run(*generate, REPO).out == run(*generate, model).out
    mlx_pack(seed=1).write(tmp_path / "other")
    run("import", tmp_path / "other", "--out", tmp_path / "b")
    words = ("holds another model (pack)", "--force replaces it")
    refused("push", tmp_path / "b", REPO, "--license", "mit", words=words)


def test_a_push_that_fails_leaves_the_converted_tier(
    hub: WritableHub, folders: Path, tmp_path: Path
) -> None:
    hub.refuse["commit"] = (403, "")
    out = tmp_path / "out"
    command = ["convert", folders / "overlay", "--base", folders / "base", "--out", out]
    result = run(*command, "--upload-repo", REPO, code=1)
    assert re.search(r"out is written; `outlier-mlx push` sends it\nerror: ", result.err)
    verify_tier(out)
