"""The command `tune`: what it trains, what it writes, and what it refuses."""

import errno
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.experts import moe_blocks
from outlier_mlx.engine.loading import load
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure import tuning
from outlier_mlx.measure.perplexity import Comparison, compare, windows
from outlier_mlx.measure.tuned_parts import PARTS, part_of, trained_tensors
from outlier_mlx.measure.tuning import Tuned, checkpointed, plan_tuning, tune
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.texts import parse_json
from outlier_mlx.tiers.tuned import write_tuned
from outlier_mlx.tiers.verify import verify_tier
from tests.engine import tier_of
from tests.folders import contents
from tests.library import TEXT, Library
from tests.memory import at_rest
from tests.program import ROOT, assert_refused, load_script, run


@pytest.fixture(scope="module")
def place(library: Library) -> Path:
    return library.place(expert_intermediate=64)


def changed(old: Path, new: Path) -> set[str]:
    """Names of the tensors whose bytes differ; all others are equal."""
    ours, theirs = read_shards(old), read_shards(new)
    assert list(ours) == list(theirs)
    return {n for n, t in ours.items() if t.read().tobytes() != theirs[n].read().tobytes()}


def parameters(model: nn.Module) -> dict[str, mx.array]:
    found: Any = tree_flatten(model.parameters(), destination={})
    return found


def test_a_tuned_tier_is_a_whole_tier_that_predicts_the_text_better(
    place: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "tuned", place / "text.txt"
    how = "--window", 24, "--windows", 10, "--epochs", 1
    found = run("tune", place / "tier", "--text", text, *how, "--out", out, "--json").json
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["epochs"][0]["held_out"] == found["after"]
    verify_tier(out)
    names = changed(place / "tier", out)
    dims = {name: len(t.shape) for name, t in read_shards(out).items()}
    assert {part_of(name, dims[name]) for name in names} == set(PARTS)
    manifest = json.loads((out / "tier.json").read_text())
    assert manifest["tuned"] == {"parts": list(PARTS), "text": "text.txt", "teacher": None}
    card = (out / "README.md").read_text()
    assert "the alphas, the scales of the experts' rows, the routers and the" in card
    assert "were trained on `text.txt`, towards its next tokens" in card
    # The figures are those of what was written, not of the numbers before they were rounded.
    model, tokenizer = load(out)
    texts = windows(tokenizer, text.read_text(), 24, 10)
    assert compare(model, texts[4::5]).loss == pytest.approx(found["after"]["loss"], rel=1e-5)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("experts", ["tq1_0", "affine2"])
def test_only_the_named_part_changes(
    library: Library, part: str, experts: str, tmp_path: Path
) -> None:
    tier = library.tier(library.overlay(expert_intermediate=64), tier="q4", experts=experts)
    model, tokenizer = load(tier)
    how = {"epochs": 1, "learning_rate": 0.001, "dtypes": plan_tuning(tier, [part], 16).dtypes}
    tuned = tune(model, windows(tokenizer, TEXT, 16, 3), [part], **how)  # type: ignore[arg-type]
    assert {part_of(name, value.ndim) for name, value in tuned.tensors.items()} <= {part, None}
    new = {name: value + value * 0.5 for name, value in tuned.tensors.items()}
    write_tuned(tier, tmp_path / "t", new, {})
    verify_tier(tmp_path / "t")
    assert changed(tier, tmp_path / "t") <= set(new)
    again, _ = load(tmp_path / "t")
    assert not mx.array_equal(again(mx.array([[1, 2, 3]])), model(mx.array([[1, 2, 3]])))


@pytest.mark.parametrize("experts", ["tq1_0", "affine2"])
def test_gradients_are_those_of_differences(library: Library, experts: str) -> None:
    """Of a tier in float32, through checkpointed layers, in a random direction of each tensor."""
    tier = library.tier(library.overlay(expert_intermediate=64), tier="q4", experts=experts)
    model, _ = load(tier)
    tokens = mx.array([[1, 5, 9, 3, 7, 2, 8]])
    plain = model(tokens)
    weight = mx.array(np.random.default_rng(1).normal(size=plain.shape).astype(np.float32))
    with trained_tensors(model, list(PARTS), {}) as trained:
        np.testing.assert_allclose(model(tokens), plain, rtol=1e-4, atol=1e-4)

        def loss(values: list[mx.array]) -> mx.array:
            for each, value in zip(trained, values, strict=True):
                each.put(value)
            return (model(tokens) * weight).sum()

        values = [each.value for each in trained]
        with checkpointed(model, trained):
            gradients = mx.grad(loss)(values)
        seen = set()
        for at, each in enumerate(trained):
            if each.part in seen or not mx.any(gradients[at] != 0):
                continue
            direction = gradients[at] / mx.linalg.norm(gradients[at].flatten())
            step = 1e-3 * float(mx.linalg.norm(values[at].flatten())) or 1e-3

            def moved(by: float, at: int = at, direction: mx.array = direction) -> float:
                new = [v + by * direction if n == at else v for n, v in enumerate(values)]
                return float(loss(new))

            slope = (moved(step) - moved(-step)) / (2 * step)
            assert slope == pytest.approx(float((gradients[at] * direction).sum()), rel=0.05)
            seen.add(each.part)
        assert seen == set(PARTS)
        loss(values)
    np.testing.assert_array_equal(model(tokens), plain)
    assert not any(module.training for module in model.modules())


def test_a_run_that_ends_early_leaves_the_model_as_it_was(library: Library) -> None:
    model, tokenizer = load(library.place(expert_intermediate=64) / "tier")
    before = {name: np.array(value) for name, value in parameters(model).items()}

    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, windows(tokenizer, TEXT, 16, 3), progress=stop)
    for name, value in parameters(model).items():
        np.testing.assert_array_equal(np.array(value), before[name])


def test_what_adam_sees_is_the_value_again(library: Library) -> None:
    """Also of biases, for which it sees the middles of their groups."""
    tier = library.tier(library.overlay(expert_intermediate=64), tier="q4")
    model, _ = load(tier)
    with trained_tensors(model, list(PARTS), {}) as trained:
        for each in trained:
            np.testing.assert_allclose(each.of_number(each.number), each.value, rtol=1e-5)
        scales, biases = (
            next(t for t in trained if t.name.endswith(f"q_proj.{leaf}"))
            for leaf in ("scales", "biases")
        )
        middle, bias, scale = biases.number, np.array(biases.value), np.array(scales.value)
        scales.put(scales.value * 2)
        # A group's codes are 0 to 15: twice the scale around 7.5, and the middle where it was.
        np.testing.assert_allclose(biases.of_number(middle), bias - 7.5 * scale, rtol=1e-4)


def test_a_teacher_predicts_a_window_once_if_there_is_room(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = library.place(expert_intermediate=64) / "tier"
    teacher, tokenizer = load(tier)
    for block in moe_blocks(teacher).values():
        block.alpha = block.alpha * 2
    seen: list[mx.array] = []

    class Counted(type(teacher)):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            seen.append(ids)
            return super().__call__(ids)

    object.__setattr__(teacher, "__class__", Counted)
    texts, results = windows(tokenizer, TEXT, 16, 4), []
    for room, epochs, calls in ((tuning.KEPT, 2, 4), (0, 2, 3 + 3 * 2), (tuning.KEPT, 1, 4)):
        monkeypatch.setattr(tuning, "KEPT", room)
        seen.clear()
        model, _ = load(tier)
        tuned = tune(model, texts, ["alphas"], teacher=teacher, epochs=epochs)
        assert len(seen) == calls
        results.append(tuned.after)
    assert results[0] == results[1]


@pytest.mark.slow
def test_the_plan_is_what_a_run_takes(library: Library) -> None:
    """Within 15 % of the peak, models included."""
    tier = library.demo_tier("q4")
    teacher, tokenizer = load(library.demo_tier("f32"))
    text = (FOLDER / "heldout" / "sea.txt").read_text("utf-8")
    mx.eval(teacher.parameters())
    for parts, length in ((list(PARTS), 128), (["base"], 64), (["alphas"], 128)):
        model, _ = load(tier)
        mx.eval(model.parameters())
        models = at_rest()
        plan = plan_tuning(tier, parts, length, teacher=True, kept=length)
        texts = windows(tokenizer, text, length, 3)
        how = {"epochs": 1, "batch": 2, "dtypes": plan.dtypes}
        tuned = tune(model, texts, parts, teacher=teacher, **how)  # type: ignore[arg-type]
        assert models + plan.nbytes == pytest.approx(tuned.peak, rel=0.15)
        del model, tuned


@pytest.mark.slow
def test_an_int4_tier_comes_a_fifth_nearer_to_its_unquantized_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of all parts in the table of docs/tune.md, from twelve steps."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    text = tmp_path / "stories.txt"
    text.write_text(load_script("tune_parts").stories(), encoding="utf-8")
    pair = FOLDER / "overlay", FOLDER / "base"
    tier, twin = (tier_of(*pair, tmp_path / name, tier=name) for name in ("q4", "f32"))
    how = "--window", 128, "--windows", 30, "--batch", 2, "--learning-rate", 0.004, "--epochs", 1
    out = tmp_path / "nearer"
    found = run(
        *("tune", tier, "--teacher", twin, "--text", text, *how, "--out", out, "--json")
    ).json
    assert found["after"]["kl"] < 0.8 * found["before"]["kl"]
    assert found["after"]["loss"] < found["before"]["loss"] + 0.01
    verify_tier(out)


def test_what_is_not_better_is_not_written(place: Path, tmp_path: Path) -> None:
    tier, out = place / "tier", tmp_path / "out"
    how = "--text", place / "text.txt", "--window", 16, "--windows", 4, "--epochs", 1
    ended = run("tune", tier, *how, "--teacher", tier, "--out", out, code=1)
    assert "error: the model did not get better on the held-out text" in ended.err
    assert not list(tmp_path.iterdir())


def test_what_diverged_or_is_only_rounded_is_not_better(place: Path, tmp_path: Path) -> None:
    how = "--text", place / "text.txt", "--window", 16, "--windows", 4, "--epochs", 1, "--json"
    out = "--parts", "alphas", "--out", tmp_path / "out"
    ended = run("tune", place / "tier", *how, *out, "--learning-rate", 1e38, code=1)
    assert parse_json(ended.out, "stdout")["epochs"][0]["held_out"]["loss"] is None
    sound = Comparison(8, 9.5, 0.1, None, None)
    for before, after in ((math.nan, math.nan), (9.5, 9.5 - 1e-7), (9.5, math.nan)):
        first, last = replace(sound, loss=before), replace(sound, loss=after)
        with pytest.raises(OutlierError, match="did not get better"):
            Tuned(first, last, {}, [], 0).check_better()
    Tuned(sound, replace(sound, loss=9.4), {}, [], 0).check_better()


def test_a_full_disk_leaves_nothing_and_the_tier_as_it_was(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(place / "tier")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("outlier_mlx.tiers.tuned.Copied.chunks", Mock(side_effect=full))
    how = "--text", place / "text.txt", "--window", 16, "--windows", 4, "--epochs", 1
    monkeypatch.setattr(Tuned, "check_better", lambda self: None)
    ended = run("tune", place / "tier", *how, "--out", tmp_path / "out", code=1)
    assert ended.err.splitlines()[-1].endswith("out: cannot write: No space left on device")
    assert not list(tmp_path.iterdir())
    assert contents(place / "tier") == whole


def test_wrong_usage(place: Path, tmp_path: Path) -> None:
    how = "tune", place / "tier", "--text", place / "text.txt"
    assert (
        "--parts: 'trits' is not one of alphas, rows" in run(*how, "--parts", "trits", code=2).err
    )
    assert "holds alphas only" in run(*how, "--out", tmp_path / "a.json", code=2).err


def test_only_tiers_are_tuned(library: Library, place: Path, tmp_path: Path) -> None:
    base = library.base().path
    ended = run("tune", base, "--text", place / "text.txt", "--out", tmp_path / "o", code=1)
    assert_refused(ended, "not a tier; only tiers are tuned")
