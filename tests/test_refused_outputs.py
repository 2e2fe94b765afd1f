"""Damaged tiers, outputs that exist, and who is told what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import outlier_mlx
from outlier_mlx.errors import CheckpointError, OutlierError, OutputExistsError
from tests.damage import (
    add_tensor,
    corrupt_header,
    drop_tensor,
    truncate,
)
from tests.program import run
from tests.refusals import (
    MLP,
    WIDTH,
    Site,
    config,
    refuse,
    remove,
    shape,
    snapshot,
    tensor,
)

# A damaged tier

WEIGHTS = "model-00001-of-00001.safetensors"
SWITCH = MLP + "switch_mlp."
TIERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (lambda f: truncate(f / WEIGHTS, 1), (WEIGHTS, "truncated")),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("tier",)),
    "header that is no JSON": (lambda f: corrupt_header(f / WEIGHTS), (WEIGHTS, "JSON")),
    "a tensor missing": (
        lambda f: drop_tensor(f, SWITCH + "up_proj.scales"),
        ("tier", SWITCH + "up_proj.scales"),
    ),
    "a tensor too many": (
        lambda f: add_tensor(f, "model.extra.weight", shape(2)),
        ("tier", "model.extra.weight"),
    ),
    "a tensor of another shape": (
        tensor(SWITCH + "up_proj.scales", shape(2, WIDTH - 1)),
        ("tier", SWITCH + "up_proj.scales", "(2, 39)", "(2, 40)"),
    ),
    "no tokenizer": (
        lambda f: remove(f, "tokenizer*"),
        ("tier", "no usable tokenizer"),
    ),
    "tokenizer that is no JSON": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        ("tier", "tokenizer.json", "JSON"),
    ),
    "config that is no JSON": (lambda f: truncate(f / "config.json", 5), ("config.json", "JSON")),
    "format of the future": (
        config(ternary={"format": "tq1_0_strided", "version": 3}),
        ("tier", "version 3"),
    ),
    "format of the past": (
        config(ternary={"format": "tq1_0_rows", "version": 1, "row_bytes_multiple": 4}),
        (
            "tier",
            "config.json",
            "made by outlier-mlx 0.1: convert the overlay, or import the model, again",
        ),
    ),
    "unknown format": (config(ternary={"format": "tq9", "version": 2}), ("tier", "tq9")),
    "format as text": (config(ternary="tq1_0_strided"), ("config.json", "ternary", "an object")),
    "no heads": (config(num_attention_heads=0), ("config.json", "num_attention_heads")),
    "no such layer": (config(moe_layers=[1, 9]), ("config.json", "moe_layers", "0 to 1")),
    "absurd layers": (config(num_hidden_layers=10**12), ("config.json", "num_hidden_layers")),
}


@pytest.mark.parametrize("name", TIERS)
def test_a_damaged_tier_does_not_generate(site: Site, name: str) -> None:
    damage, words = TIERS[name]
    damage(site.tier)
    refuse(site, "generate", "--model", site.tier, "--prompt", "x", words=words)


# Outputs that exist


def test_an_existing_output_needs_force(site: Site) -> None:
    command = ("convert", site.overlay, "--out", site.tier)
    refuse(site, *command, words=("tier", "exists", "--force"))


def test_force_replaces_a_tier_whole(site: Site) -> None:
    (site.tier / ".config.0123abcd.json").write_text("of a run that was killed")
    run("convert", site.overlay, "--out", site.tier, "--tier", "f32", "--force")
    assert not (site.tier / ".config.0123abcd.json").exists()
    assert json.loads((site.tier / "config.json").read_text())["dtype"] == "float32"
    assert [path.name for path in site.root.iterdir() if path.name.startswith(".")] == []


def test_force_fills_an_empty_folder(site: Site) -> None:
    (site.root / "empty").mkdir()
    run("convert", site.overlay, "--out", site.root / "empty", "--force")
    assert (site.root / "empty" / "tier.json").exists()


def test_force_replaces_nothing_that_is_no_tier(site: Site) -> None:
    reasons = {site.outputs: "not a tier", site.overlay: "is an input", site.root: "is an input"}
    for target, reason in reasons.items():
        command = ("convert", site.overlay, "--out", target, "--force")
        refuse(site, *command, words=(target.name, reason))


def test_an_output_that_is_no_folder_is_refused(site: Site) -> None:
    link = site.root / "link"
    link.symlink_to(site.tier)
    for target in (site.outputs / "note", link):
        command = ("convert", site.overlay, "--out", target, "--force")
        refuse(site, *command, words=(target.name, "not a folder"))
    below_a_file = ("convert", site.overlay, "--out", site.outputs / "note" / "tier")
    refuse(site, *below_a_file, words=("note is a file, not a folder",))


# What is said, and to whom


def test_without_a_tokenizer_the_tier_is_made_and_a_warning_says_so(site: Site) -> None:
    remove(site.overlay, "tokenizer*")
    result = run("convert", site.overlay, "--out", site.outputs / "tier", "--quiet")
    (line,) = result.err.splitlines()
    assert line.startswith("warning: overlay: no tokenizer")


def test_debug_raises_what_happened(site: Site) -> None:
    with pytest.raises(CheckpointError):
        run("convert", site.root / "nowhere", "--debug")


def test_python_raises_the_same_errors(site: Site) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        outlier_mlx.convert(site.root / "nowhere")
    with pytest.raises(OutputExistsError, match="exists"):
        outlier_mlx.convert(site.overlay, out=site.tier)
    with pytest.raises(CheckpointError, match="an overlay"):
        outlier_mlx.load(site.overlay)
    with pytest.raises(OutlierError, match="'q5': expected one of q4"):
        outlier_mlx.convert(site.overlay, tier="q5")


def test_links_of_a_hub_cache_are_followed(site: Site) -> None:
    """Snapshots there hold links to blobs of the repository, which may be links to shared ones."""
    repo = site.root / "models--owner--name"
    snapshot_folder = repo / "snapshots" / "0123abcd"
    (repo / "blobs").mkdir(parents=True)
    snapshot_folder.mkdir(parents=True)
    shared = site.root / "blobs" / "ab"
    shared.mkdir(parents=True)
    for number, path in enumerate(sorted(site.overlay.iterdir())):
        blob = f"{number:040x}"
        if path.suffix == ".safetensors":
            path.rename(shared / blob)
            (repo / "blobs" / blob).symlink_to(Path("../../blobs/ab") / blob)
        else:
            path.rename(repo / "blobs" / blob)
        (snapshot_folder / path.name).symlink_to(Path("../../blobs") / blob)
    run("convert", snapshot_folder, "--out", site.outputs / "tier")
    written, expected = snapshot(site.outputs / "tier"), snapshot(site.tier)
    for differs in ("README.md", "tier.json"):
        del written[differs], expected[differs]
    assert written == expected
