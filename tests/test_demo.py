"""The embedded pair: small, an overlay in truth, and better where it says it is."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml

from outlier_mlx.checkpoints import open_overlay
from outlier_mlx.checkpoints.base import open_base
from outlier_mlx.cli.showcase import (
    BEGINNINGS,
    FOLDER,
    OLD_DOMAIN,
    heldout,
    load_base,
    perplexities,
)
from outlier_mlx.engine.loading import load, load_model
from outlier_mlx.measure.perplexity import compare
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.storage.shards import read_shards
from tests.engine import tier_of
from tests.folders import contents
from tests.importing import stored_weights
from tests.program import assert_refused, run, run_program
from tests.reference import forward
from tests.reference_reader import read_overlay
from tests.test_import_ternary import Written

TASKS = FOLDER / "tasks"
TERNARY = ("mlx2", "rotated", "bitnet", "pq2_0.gguf", "tq2_0.gguf", "ptq1_0.gguf")
FEW, PIECE = 6, 64  # documents that are read, and their tokens


def test_the_pair_is_small_and_the_overlay_holds_no_base() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert max(path.stat().st_size for path in files) <= 10_000_000
    overlay, base = open_overlay(FOLDER / "overlay"), open_base(FOLDER / "base")
    assert overlay.form == "v3.2"
    assert not overlay.base
    config = base.config
    assert config.hidden % 256 == config.intermediate % 256 == 0
    assert overlay.expert_intermediate % 64 == 0


def test_experts_of_a_layer_differ() -> None:
    for experts in open_overlay(FOLDER / "overlay").experts.values():
        for one, other in combinations(experts, 2):
            for (_, a), (_, b) in zip(one, other, strict=True):
                same = (a.trits.read() == b.trits.read()).mean()
                assert same < 0.9


@pytest.mark.parametrize(("source", "same"), [("sea-awq", "sea"), ("base-q4_0.gguf", "base")])
def test_quantized_copies_hold_the_model_s_weights(source: str, same: str, tmp_path: Path) -> None:
    run("import", FOLDER / source, "--out", tmp_path / "imported")
    quantized, expected = (
        stored_weights(load_model(folder)[0]) for folder in (tmp_path / "imported", FOLDER / same)
    )
    assert set(quantized) == set(expected)
    for name, weight in expected.items():
        error = np.linalg.norm(quantized[name] - weight) / np.linalg.norm(weight)
        assert error < 0.2, name


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The ternary models as imported, by the names of their forms."""
    folder = tmp_path_factory.mktemp("rows")
    for form in TERNARY:
        run("import", FOLDER / f"ternary-{form}", "--strict", "--out", folder / form)
    return {form: folder / form for form in TERNARY}


@pytest.mark.parametrize(
    ("one", "other"),
    [("mlx2", "pq2_0.gguf"), ("bitnet", "tq2_0.gguf"), ("rotated", "ptq1_0.gguf")],
)
def test_two_forms_of_a_ternary_model_are_one_model(
    rows: dict[str, Path], one: str, other: str
) -> None:
    first, second = (Written(rows[form]) for form in (one, other))
    assert set(first.modules) == set(second.modules)
    for path in first.modules:
        np.testing.assert_array_equal(first.values(path), second.values(path), err_msg=path)
    assert set(first.tensors) == set(second.tensors)
    for name in first.tensors.keys() - {f"{path}.scales" for path in first.modules}:
        tensors = first.tensors[name], second.tensors[name]
        dtypes = {tensor.dtype for tensor in tensors}
        assert dtypes == {"F16", "BF16"} or len(dtypes) == 1, name
        a, b = (t.read_float32() if len(dtypes) == 2 else t.read() for t in tensors)
        # GGUF has an exponential of the decay of a delta net.
        np.testing.assert_allclose(a, b, rtol=1e-6 * name.endswith("A_log"), err_msg=name)


@pytest.mark.parametrize("form", ["mlx2", "rotated"])
def test_ternary_packs_come_back(rows: dict[str, Path], form: str, tmp_path: Path) -> None:
    run("export", rows[form], "--format", "mlx2", "--out", tmp_path / "back")
    before, after = (read_shards(f) for f in (FOLDER / f"ternary-{form}", tmp_path / "back"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].read().tobytes() == tensor.read().tobytes(), name


@pytest.mark.parametrize("form", TERNARY)
def test_ternary_models_know_the_old_stories(rows: dict[str, Path], form: str) -> None:
    model, tokenizer = load(rows[form])
    texts = [tokenizer.encode(text)[:PIECE] for text in heldout()[OLD_DOMAIN][:FEW]]
    assert compare(model, texts).perplexity < 3


@pytest.mark.parametrize("name", ["known", "new"])
def test_the_demo_s_questions_are_held_out_documents(name: str) -> None:
    rows = [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]
    asked = [f"{row['text']} {row['endings'][row['answer']]}" for row in rows]
    domains = ["old"] if name == "known" else ["kitchen", "market", "sea", "sky"]
    held_out = [
        line
        for domain in domains
        for line in (FOLDER / "heldout" / f"{domain}.txt").read_text().splitlines()
    ]
    assert asked == held_out
    answers = [row["answer"] for row in rows]
    assert [answers.count(n) for n in range(4)] == [len(rows) // 4] * 4
    for row in rows:
        wrong = [e for n, e in enumerate(row["endings"]) if n != row["answer"]]
        same = [other for other in rows if other["domain"] == row["domain"]]
        assert len(set(row["endings"])) == 4
        assert all(any(o["text"] + " " + e in asked for o in same) for e in wrong)
    assert yaml.safe_load((TASKS / f"ending_{name}.yaml").read_text())["task"] == f"ending_{name}"


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, pair = tmp_path_factory.mktemp("tiers"), (FOLDER / "overlay", FOLDER / "base")
    return {name: tier_of(*pair, root / name, tier=name) for name in ("f32", "q4")}


def test_the_unquantized_tier_is_the_reference_model(tiers: dict[str, Path]) -> None:
    model, tokenizer = load(tiers["f32"])
    tokens = tokenizer.encode(heldout()["sea"][0])[:48]
    expected = forward(read_overlay(FOLDER / "overlay", FOLDER / "base"), tokens)
    np.testing.assert_allclose(np.array(model(mx.array([tokens])))[0], expected, atol=2e-4)


@pytest.fixture
def chosen() -> Iterator[dict[int, Counter[int]]]:
    """How often each expert was chosen, by module."""
    counts: dict[int, Counter[int]] = {}
    route = OutlierMoE.route

    def counting(self: OutlierMoE, x: mx.array, alpha: mx.array) -> Any:
        indices, weights = route(self, x, alpha)
        counts.setdefault(id(self), Counter()).update(np.array(indices).ravel().tolist())
        return indices, weights

    with patch.object(OutlierMoE, "route", counting):
        yield counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["f32", "q4"])
def test_perplexity_and_expert_shares(
    tiers: dict[str, Path], chosen: dict[int, Counter[int]], name: str
) -> None:
    model, tokenizer = load(tiers[name])
    texts = heldout(10)
    before = perplexities(load_base(), tokenizer, texts)
    after = perplexities(model, tokenizer, texts)
    assert after["all new"] <= 0.5 * before["all new"]
    for domain in texts:
        limit = 1.03 if domain == OLD_DOMAIN else 0.5
        assert after[domain] <= limit * before[domain], domain
    blocks = [block for block in model.modules() if isinstance(block, OutlierMoE)]
    assert len(chosen) == len(blocks) > 1
    for counts in chosen.values():
        # A token counts once for each of its experts.
        tokens = sum(counts.values()) / blocks[0].top_k
        assert sum(count >= 0.05 * tokens for count in counts.values()) >= 3


@pytest.mark.slow
def test_the_demo_command(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path / "tier")
    for words in (
        "size of weights",
        "unquantized    int4",
        "all new domains",
        "base: and snowman",
        "int4: Jupiter, low above the western horizon.",
        f"outlier-mlx chat {tmp_path / 'tier'}",
    ):
        assert words in result.out
    assert (tmp_path / "tier" / "tier.json").exists()
    model: nn.Module = load(tmp_path / "tier")[0]
    assert model(mx.array([[1]])).shape[-1] > 1


def test_beginnings_of_the_demo_are_held_out_texts() -> None:
    domains = [
        name
        for beginning in BEGINNINGS
        for name, texts in heldout().items()
        if any(text.startswith(f"{beginning} ") for text in texts)
    ]
    assert domains == ["kitchen", "sky", OLD_DOMAIN]


def test_a_command_says_nothing_about_pytorch(tmp_path: Path) -> None:
    done = run_program("demo", "--files", tmp_path / "place")
    assert done.code == 0 and done.err == ""


def test_files_are_copied_once(tmp_path: Path) -> None:
    said = run("demo", "--files", tmp_path / "place")
    listed = said.out.split()
    assert {path.name for path in (tmp_path / "place").iterdir()} == set(listed)
    copied, here = tmp_path / "place" / "my-overlay", FOLDER / "overlay"
    assert contents(copied) == contents(here)
    lines = (tmp_path / "place" / "data" / "sea" / "train.jsonl").read_text().splitlines()
    assert all(json.loads(line)["text"] in heldout()["sea"] for line in lines)
    (tmp_path / "other" / "base").mkdir(parents=True)
    assert_refused(run("demo", "--files", tmp_path / "other", code=1), "other/base: exists")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["base"]
    run("demo", "--files", tmp_path / "third", "--out", tmp_path / "tier", code=2)
    assert not (tmp_path / "third").exists()
