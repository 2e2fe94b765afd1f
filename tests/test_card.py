"""The model card of a tier: licences as they are stated, what was modified, what was measured."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import outlier_mlx
from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.imports import import_model
from outlier_mlx.measure import eval_results as results
from outlier_mlx.measure.measured import read_measured
from outlier_mlx.tiers.card import model_card
from outlier_mlx.tiers.verify import verify_tier
from outlier_mlx.writing.licences import Licence, combine, stated_licence
from tests.builders import write_base, write_overlay
from tests.damage import edit_json
from tests.engine import tier_of
from tests.program import run
from tests.upcycling import write as write_upcycled

DIMS: dict[str, Any] = {"layers": 2, "intermediate": 64}


def make(tmp_path: Path, overlay: str | None, base: str | None, **options: Any) -> Path:
    """A tier of an overlay and a base whose model cards have these metadata."""
    write_overlay(
        tmp_path / "overlay", with_base=False, moe_layers=(1,), expert_intermediate=64, **DIMS
    )
    write_base(tmp_path / "base", **DIMS)
    for name, metadata in (("overlay", overlay), ("base", base)):
        if metadata is not None:
            (tmp_path / name / "README.md").write_text(f"---\n{metadata}\n---\n# Of others\n")
    return outlier_mlx.convert(
        tmp_path / "overlay", tmp_path / "base", tmp_path / "tier", **options
    )


def metadata(tier: Path) -> dict[str, Any]:
    _, head, _ = (tier / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head)


def test_commands_take_any_name(tmp_path: Path) -> None:
    """A folder's name is one word of a shell, in every card."""
    name = "it's my model"
    base, built = write_base(tmp_path / "the base"), write_overlay(tmp_path / "o")
    trained, tier, again, plain = (tmp_path / place / name for place in "abcd")
    write_upcycled(base, trained)
    tier_of(built.path, None, tier)
    import_model(export_tier(tier, tmp_path / "e", "transformers").path, again)
    import_model(base.path, plain)
    for folder in (trained, tier, again, plain):
        commands = (folder / "README.md").read_text().split("```")[1].strip().splitlines()
        words = [shlex.split(command) for command in commands]
        assert all({name, f"./{name}", f"./{name}-tier"} & set(found) for found in words), words


@pytest.mark.parametrize(
    ("overlay", "base", "expected"),
    [
        ("license: mit", "license: mit", {"license": "mit"}),
        ("license: mit", "license: apache-2.0", {"license": ["mit", "apache-2.0"]}),
        (
            "license: apache-2.0",
            "license: other\nlicense_name: research\nlicense_link: https://example.org/LICENSE",
            {
                "license": ["apache-2.0", "other"],
                "license_name": "research",
                "license_link": "https://example.org/LICENSE",
            },
        ),
        ("license: mit", "license: other\nlicense_name: r\nlicense_link: LICENSE.md", "no link"),
        ("license: mit", None, {}),
        (None, "license: mit", {}),
        ("language: en", "license: mit", {}),
        ("license:", "license: mit", {}),
        ("license: {a: b}", "license: mit", {}),
        ("license: [mit, 3]", "license: [mit]", {"license": "mit"}),
        ("- license: mit", "license: mit", {}),
    ],
)
def test_licences_are_those_that_the_sources_state(
    tmp_path: Path, overlay: str | None, base: str | None, expected: Any
) -> None:
    tier = make(tmp_path, overlay, base)
    if expected == "no link":  # to a file that did not come along
        expected = {"license": ["mit", "other"], "license_name": "r"}
    found = {key: value for key, value in metadata(tier).items() if key.startswith("license")}
    assert found == expected
    text = (tier / "README.md").read_text()
    assert ("none is assumed" in text) == (not expected)
    verify_tier(tier)


@pytest.mark.parametrize(
    "card",
    [
        "license: mit",
        "---\nlicense: mit\n",
        "---\nlicense: [mit\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        "---\n" + "- " * 20_000 + "\n---\n",
        "---\nlicense: " + "x" * 5000 + "\n---\n",
        '---\nlicense: "mit\\n---\\nfoo: bar"\n---\n',
        "---\n" + "\n" * 200_000 + "license: mit\n---\n",
        "",
        "---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: [*b, *b]\n---\n",
    ],
    ids=range(10),
)
@pytest.mark.filterwarnings("ignore::outlier_mlx.errors.CheckpointWarning")
def test_a_card_that_states_no_licence_however_odd(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert stated_licence(tmp_path) is None


def test_an_unreadable_card_is_said(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.warns(CheckpointWarning, match="its licence is not known"):
        stated_licence(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="links out"):
        stated_licence(tmp_path)


def test_combining() -> None:
    mit, other = Licence(("mit",)), Licence(("other",), "mine", "LICENSE")
    assert combine([]) is None
    assert combine([mit, None]) is None
    assert combine([mit, None], "mit") == mit
    assert combine([mit, other]) == Licence(("mit", "other"), "mine", "LICENSE")
    # One name cannot stand for two.
    assert combine([other, Licence(("other",), "theirs")]) == Licence(("other",))


def test_licence_files_of_both_are_kept(tmp_path: Path) -> None:
    for name in ("overlay", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "NOTICE").write_text("the same")
        (tmp_path / name / "LICENSE").write_text(name)
    (tmp_path / "base" / "LICENSE.md").write_text("more")
    (tmp_path / "base" / "LICENSE_KEY.txt").write_text("no licence")
    tier = make(tmp_path, "license: mit", "license: other\nlicense_link: LICENSE")
    found = {p.name: p.read_text() for p in tier.iterdir() if p.name.startswith(("LIC", "NOT"))}
    assert found == {
        "LICENSE": "overlay",
        "LICENSE-base": "base",
        "LICENSE.md": "more",
        "NOTICE": "the same",
    }
    assert "`LICENSE`, `LICENSE-base`, `LICENSE.md`, `NOTICE`" in (tier / "README.md").read_text()
    assert "license_link" not in metadata(tier)  # which of the two is not known


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["quantized to 4 bits in groups of 64", "repacked, five to a byte"]),
        ({"tier": "q4-mixed"}, ["to 4 bits", "most sensitive ones to 6 bits"]),
        ({"tier": "q8", "group_size": 32}, ["to 8 bits in groups of 32"]),
        ({"tier": "f32", "experts": "affine2"}, ["converted to float32", "affine 2-bit format"]),
        ({"portable": True}, ["alphas folded", "`ernie4_5_moe`"]),
        ({"alpha": True}, ["from `tuned.json`"]),
    ],
)
def test_what_was_modified(tmp_path: Path, options: dict[str, Any], words: list[str]) -> None:
    if "alpha" in options:
        (tmp_path / "tuned.json").write_text(json.dumps({"1": [0.5] * 4}))
        options = {"alpha": tmp_path / "tuned.json"}
    tier = make(tmp_path, "license: mit", "license: mit", **options)
    text = (tier / "README.md").read_text()
    changes = text.split("## Modifications")[1].split("## Licence")[0]
    assert not [word for word in words if word not in changes], changes
    assert "- overlay `overlay`\n- base `base`\n" in changes
    assert str(tmp_path) not in text
    flag = "mlx_lm.generate --model tier --trust-remote-code"
    assert (flag in text) == ("portable" not in options)
    info = inspect(tier)
    total = f"| total | {info.params:,} | {info.nbytes:,} | {info.rows[-1].bits_per_weight:.2f} |"
    assert total in text
    # 2 layers, 2 key and 2 value heads of 16, 2 bytes each: 256 bytes a token.
    assert "| 4,096 | 1.0 MB |" in text and "| 32,768 | 8.4 MB |" in text


def test_what_was_measured(tmp_path: Path) -> None:
    tier = make(tmp_path, "license: mit", "license: mit")
    text = tmp_path / "sea.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log " * 8)
    command = ["perplexity", tier, "--text", text, "--window", 32]
    plain = run(*command, "--windows", 2, "--json").json
    assert not (tier / "measured.json").exists()
    before = verify_tier(tier)
    run(*command, "--windows", 2, "--record")
    run(*command, "--windows", 2, "--record")  # in place of the first
    run(*command, "--windows", 3, "--record", "--against", tier)
    assert verify_tier(tier) == before
    first, second = read_measured(tier)
    assert (first.text, first.tokens, first.dtype) == ("sea.txt", 62, "float32")
    assert first.perplexity == plain["perplexity"] and first.kl is None
    assert (second.against, second.windows, second.agreement) == ("tier", 3, 1.0)
    assert str(tmp_path) not in (tier / "measured.json").read_text()
    card = model_card(tier, "owner/name")
    head = yaml.safe_load(card.split("---\n")[1])
    (index,) = head["model-index"]
    assert index["name"] == "name"
    (result,) = index["results"]
    assert (result["dataset"]["name"], result["dataset"]["revision"]) == ("sea.txt", first.sha256)
    values = [metric["value"] for metric in result["metrics"]]
    assert values == [first.perplexity, second.perplexity]
    assert f"| {first.perplexity:.4f} |" in card and first.sha256[:12] in card
    # A file that was measured of other weights says nothing of these.
    edit_json(tier / "tier.json", producer="another")
    assert read_measured(tier) == []
    assert "## Perplexity" not in model_card(tier, "owner/name")


def test_scores(tmp_path: Path) -> None:
    tier = make(tmp_path, "license: mit", "license: mit")
    score = results.Result(
        task="arc_easy",
        metric="acc",
        filter="none",
        value=0.5,
        stderr=0.025,
        n=400,
        higher_is_better=True,
        fewshot=0,
    )
    evaluation = results.Evaluation(
        model="tier",
        revision=None,
        bytes_in_memory=inspect(tier).nbytes,
        device="gpu",
        date="2026-01-01",
        versions={"lm-eval": "0.4.13"},
        config={"dtype": "float16"},
        results=[score, replace(score, metric="f1", filter="strict", stderr=None)],
    )
    results.save(evaluation, tmp_path / "scores.json")
    command = ["push", tier, "owner/tier", "--dry-run", "--results", tmp_path / "scores.json"]
    card = run(*command).out
    assert "On the GPU, in float16; lm-eval 0.4.13:" in card
    assert "| `arc_easy` | `acc` | 0 | 400 | 0.5000 | 0.0250 |" in card
    assert "| `arc_easy` | `f1, strict` | 0 | 400 | 0.5000 |  |" in card
    # Scores of another model are not this one's.
    results.save(replace(evaluation, bytes_in_memory=1), tmp_path / "scores.json", force=True)
    assert "not of this tier" in run(*command, code=1).err


def test_a_file_of_measurements_that_is_none(tmp_path: Path) -> None:
    tier = make(tmp_path, None, None)
    text = tmp_path / "sea.txt"
    text.write_text("the cat sat on the mat " * 8)
    run("perplexity", tier, "--text", text, "--window", 16, "--record")
    whole = json.loads((tier / "measured.json").read_text())
    wrong: tuple[Any, ...] = (3, [3], [{}], [whole["perplexity"][0] | {"perplexity": "low"}])
    for entries in wrong:
        edit_json(tier / "measured.json", perplexity=entries)
        with pytest.raises(CheckpointError, match=r"measured\.json"):
            read_measured(tier)
    result = run("perplexity", tmp_path / "base", "--text", text, "--record", code=1)
    assert "results cannot be saved" in result.err
