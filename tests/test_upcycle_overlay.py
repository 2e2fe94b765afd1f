"""Trained experts written as an overlay: what convert, export and push make of it, and its card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard

from outlier_mlx.checkpoints import open_overlay
from outlier_mlx.errors import OutlierError, OutputExistsError
from outlier_mlx.tiers.verify import verify_tier
from tests.builders import PARTS, Built, write_base
from tests.engine import forward, load, tier_of
from tests.folders import contents as files_of
from tests.forms import assert_same_contents, contents
from tests.goldens import assert_logits_close
from tests.hub_uploads import WritableHub
from tests.library import Library
from tests.program import assert_refused, run
from tests.reference import forward as reference_forward
from tests.reference_reader import read_overlay
from tests.test_bases import LLAMA3, YARN
from tests.upcycling import SETTINGS, WINDOW, Upcycled, write

PROMPT = "The heron stands in the water"
REPO = "owner/overlay"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A base whose card states its licence."""
    built = write_base(tmp_path_factory.mktemp("upcycle") / "base")
    (built.path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (built.path / "LICENSE").write_text("The licence.\n")
    return built


@pytest.fixture(scope="module")
def overlay(base: Built) -> Path:
    """An overlay on that base."""
    out = base.path.parent / "mine"
    write(base, out)
    return out


def expected(made: Upcycled) -> dict[str, np.ndarray]:
    """What is to be read, named as in `forms.contents`."""
    values: dict[str, np.ndarray] = {}
    for layer in made.layers:
        n = layer.layer
        values |= {f"router {n}": layer.router, f"alpha {n}": layer.alphas}
        for part in PARTS:
            pairs = zip(layer.trits[f"{part}_proj"], layer.scales[f"{part}_proj"], strict=True)
            for e, (trits, scales) in enumerate(pairs):
                values[f"trits {n} {e} {part}"] = trits
                values[f"scales {n} {e} {part}"] = scales.astype(np.float32)
    return values


def test_what_was_trained_is_read_back(base: Built, tmp_path: Path) -> None:
    made = write(base, tmp_path / "out")
    opened = open_overlay(tmp_path / "out")
    assert opened.form == "v3.2"
    assert_same_contents(contents(opened), expected(made))
    assert opened.config.moe_layers == SETTINGS.layers
    assert (opened.config.experts, opened.config.top_k, opened.expert_intermediate) == (4, 2, 96)
    tensors = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert set(tensors) == {
        f"model.layers.{n}.mlp.{rest}"
        for n in (0, 2)
        for rest in (
            *("router.weight", "alpha_values"),
            *(
                f"experts.{e}.{p}_{w}"
                for e in range(4)
                for p in PARTS
                for w in ("ternary", "scale")
            ),
        )
    }
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert verify_tier(tmp_path / "out").tensors == len(tensors)


@pytest.mark.parametrize(
    "dims",
    [
        {"tied": True, "yarn": YARN},
        {"family": "llama", "scaling": LLAMA3, "biases": True, "eps": 1e-3},
        {"family": "qwen3", "head_dim": 24, "kv_heads": 1},
        {"family": "mistral", "head_dim": 8, "rope_theta": 1e4},
    ],
    ids=["qwen2", "llama", "qwen3", "mistral"],
)
def test_its_tier_computes_what_the_reference_does(dims: dict[str, Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tokenizer=False, **dims)
    with pytest.warns(UserWarning, match="no tokenizer"):
        write(base, tmp_path / "out")
    tier = tier_of(tmp_path / "out", base.path, tmp_path / "tier")
    tokens = base.prompt(20)
    reference = read_overlay(tmp_path / "out", base.path)
    assert_logits_close(forward(load(tier), tokens), reference_forward(reference, tokens))


@pytest.mark.parametrize("rope", ["new", "both"])
def test_newer_spellings_of_the_base(rope: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", rope=rope, yarn=YARN, family="llama")
    old = write_base(tmp_path / "old", yarn=YARN, family="llama")
    logits = []
    for each in (base, old):
        write(each, each.path.with_name(f"{each.path.name}-overlay"))
        overlay = each.path.with_name(f"{each.path.name}-overlay")
        tier = tier_of(overlay, each.path, each.path.with_name(f"{each.path.name}-tier"))
        logits.append(forward(load(tier), base.prompt(20)))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_converted_and_asked(base: Built, overlay: Path, tmp_path: Path) -> None:
    """As its card says."""
    tier = tmp_path / "tier"
    run("convert", overlay, "--base", base.path, "--out", tier)
    result = run("generate", "--model", tier, "--prompt", PROMPT, "--max-tokens", "4")
    assert result.out.strip()
    run("verify", tier)
    assert run("info", overlay, "--json").json["kind"] == "overlay"


@pytest.mark.parametrize("form", ["overlay", "packed", "gguf-experts"])
def test_its_tier_is_exported_unchanged(form: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", hidden=256, layers=2)
    overlay = tmp_path / "overlay"
    write(base, overlay, settings=replace(SETTINGS, layers=(1,), expert_size=256))
    tier = tier_of(overlay, base.path, tmp_path / "tier", base_bits=4)
    for source in (tier, overlay):  # the overlay itself is exported, too
        out = tmp_path / f"again-{source.name}"
        run("export", source, "--format", form, "--out", out)
        assert_same_contents(contents(open_overlay(out)), contents(open_overlay(overlay)))
        config = json.loads((out / "config.json").read_text())
        assert config["base_model_name_or_path"] == "base"


def test_a_whole_model_is_exported_from_its_tier(overlay: Path, tmp_path: Path) -> None:
    """One line says what to do first."""
    for form in ("gguf", "transformers"):
        ended = run("export", overlay, "--format", form, "--out", tmp_path / "o", code=1)
        assert_refused(ended, f"{overlay}: an overlay", f"convert {overlay} --base BASE --out TIER")


def test_the_overlay_itself_is_pushed(
    hub: WritableHub, base: Built, overlay: Path, tmp_path: Path
) -> None:
    result = run("push", overlay, REPO)
    assert result.out == f"{hub.url}/{REPO}\n"
    assert hub.messages[-1].startswith("Overlay, made by outlier-mlx")
    arrived = files_of(hub.head(REPO))
    card = arrived.pop("README.md").decode()
    del arrived[".gitattributes"]
    kept = files_of(overlay)
    del kept["README.md"]
    assert arrived == kept
    assert "LICENSE" in arrived
    assert f"outlier-mlx convert {REPO} --base base --out ./overlay-tier" in card
    assert ModelCard(card).data.get("license") == "apache-2.0"
    pulled = Path(huggingface_hub.snapshot_download(REPO))
    tier_of(pulled, base.path, tmp_path / "tier")
    run("push", tmp_path / "tier", "owner/tier")


def test_an_overlay_of_others_is_not_pushed(hub: WritableHub, library: Library) -> None:
    result = run("push", library.overlay().path, REPO, code=1)
    assert "nor an overlay that upcycle wrote" in result.err
    assert hub.requests == []


def test_the_card_says_how_it_was_made(base: Built, overlay: Path) -> None:
    text = (overlay / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.get("license") == "apache-2.0"
    assert {"mlx", "moe", "ternary"} <= set(card.data.get("tags"))
    for line in (
        "4 experts in each of 2 layers, 2 of",
        "| cooking | 80.000 | 20.500 |",
        "| keep | 80.000 | 80.500 |",
        f"Windows of {WINDOW} tokens",
        "| law | `law.txt` | 3 | 6 | 2 | 48 |",
        "`experts_per_domain` 2",
        "`layers` 0 2",
        "| routers | 4 | cooking 80.000 → 20.500, law 80.000 → 30.250, keep 80.000 → 80.500 | y",
        "outlier-mlx convert ./mine --base base --out ./mine-tier",
        "- base `base`: `apache-2.0`",
    ):
        assert line in text, line
    manifest = json.loads((overlay / "checksums.json").read_text())
    assert manifest["upcycled"]["settings"]["seed"] == 3
    assert manifest["upcycled"]["data"][0]["copies_left_out"] == 1
    for name, data in files_of(overlay).items():
        assert str(base.path.parent).encode() not in data, name


def test_what_diverged_is_not_written(base: Built, tmp_path: Path) -> None:
    def diverged(made: Upcycled) -> Upcycled:
        router = made.layers[1].router.copy()
        router[0, 0] = np.nan
        return replace(made, layers=[made.layers[0], replace(made.layers[1], router=router)])

    with pytest.raises(OutlierError, match=r"layers\.2\.mlp\.router\.weight: holds NaN"):
        write(base, tmp_path / "out", change=diverged)
    assert list(tmp_path.iterdir()) == []


def test_only_with_force_is_it_replaced(base: Built, tmp_path: Path) -> None:
    write(base, tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--force replaces it"):
        write(base, tmp_path / "out", seed=1)
    made = write(base, tmp_path / "out", seed=1, force=True)
    assert_same_contents(contents(open_overlay(tmp_path / "out")), expected(made))
    with pytest.raises(OutputExistsError, match="is an input"):
        write(base, base.path, force=True)
