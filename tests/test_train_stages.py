"""What stages of a training make: experts, routers, lessons of a teacher, and losses."""

from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.storage.hub import Source
from outlier_mlx.train import objectives, teacher
from outlier_mlx.train.loop import drawn, scheduled
from outlier_mlx.train.measures import hits_of
from outlier_mlx.train.objectives import distilled, divergence, next_token, through_head
from outlier_mlx.train.stages import layer_groups, upcycle
from outlier_mlx.train.state import Work
from outlier_mlx.train.texts import Corpora
from tests.builders import write_base
from tests.library import Library
from tests.training import (
    SETTINGS,
    Stopped,
    assert_same,
    corpora,
    go_uphill,
    tensors,
    tier_model,
    train,
)


def test_experts_from_nothing_begin_with_no_output(library: Library, tmp_path: Path) -> None:
    how: dict[str, Any] = {"init": "nothing", "straight_through": False, "joint_steps": 0}
    made = train(library, tmp_path / "work", **how)
    assert not any(layer.trits["down_proj"].any() for layer in made.layers)
    assert all((layer.alphas == np.float32(0.1)).all() for layer in made.layers)
    model, base = tier_model(library, made), load_model(library.base().path)[0]
    tokens = mx.array(corpora().domains[0].held_out)
    np.testing.assert_array_equal(model(tokens), base(tokens))
    assert made.after == pytest.approx(made.before)


def test_experts_from_nothing_learn(library: Library, tmp_path: Path) -> None:
    made = train(library, tmp_path / "work", init="nothing", layers=(1,))
    assert all(made.after[name] < 0.98 * made.before[name] for name in ("law", "sea"))
    assert all(layer.trits["down_proj"].any() for layer in made.layers)


def test_experts_from_the_ffn_begin_as_its_neurons(library: Library, tmp_path: Path) -> None:
    made = train(library, tmp_path / "work", straight_through=False, joint_steps=0)
    base = library.base().base
    trits = made.layers[0].trits["gate_proj"][0]
    gate = base["model.layers.1.mlp.gate_proj.weight"]
    similar = np.sign(gate) @ trits.T  # (neurons of the base, neurons of the expert)
    found = similar.argmax(axis=0)
    assert (np.diff(found) > 0).all()
    cosines = (gate[found] * trits).sum(-1) / np.linalg.norm(gate[found], axis=-1)
    assert (cosines / np.linalg.norm(trits, axis=-1) > 0.8).all()


def test_routers_begin_by_sending_domains_to_their_experts(
    library: Library, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    how: dict[str, Any] = {"straight_through": False, "top_k": 1, "joint_steps": 21, "balance": 0}
    train(library, tmp_path / "work", events.append, learning_rate=0.0, layers=(1,), **how)
    (load,) = [event["load"] for event in events if event["event"] == "held_out"]
    assert load["law"][1][0] > 0.8 and load["sea"][1][1] > 0.8


def test_a_stage_that_does_not_help_is_dropped(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_uphill(monkeypatch, least=1)
    how = {"keep_bound": 0.0, "keep_weight": 0.0, "learning_rate": 0.5, "joint_steps": 0}
    made = train(library, tmp_path / "work", **how)
    base, *of_experts = made.stages
    for number, (name, stage) in enumerate(zip(("law", "sea"), of_experts, strict=True)):
        better = stage["after"][name] < stage["before"][name]
        assert stage["kept"] == (better and stage["after"]["keep"] <= base["before"]["keep"])
        assert all((layer.alphas[number] != 0) == stage["kept"] for layer in made.layers)
    assert not any(stage["kept"] for stage in of_experts)
    assert made.after == pytest.approx(made.before)


@pytest.mark.parametrize("how", [{"dtype": "float16", "joint_steps": 1}, {"expert_steps": 1}])
def test_a_stage_that_diverges_in_its_last_step_is_dropped(
    how: dict[str, Any], library: Library, tmp_path: Path
) -> None:
    off = {"expert_steps": 0, "joint_steps": 0} | how
    stage = train(library, tmp_path / "work", learning_rate=1e30, **off).stages[-1]
    assert not stage["kept"]
    assert max(stage["after"].values()) == pytest.approx(1e13, rel=0.1)  # no number at all


@pytest.mark.parametrize(("damage", "said"), [(float("nan"), "is nan"), (0.0, None)])
def test_bases_of_strange_numbers(damage: float, said: str | None, tmp_path: Path) -> None:
    write_base(tmp_path / "base", layers=4)
    path = tmp_path / "base" / "model.safetensors"
    weights: Any = mx.load(str(path))
    name = "model.layers.1.post_attention_layernorm.weight"
    weights[name] = weights[name] * damage
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    base, work = Source(tmp_path / "base", "base"), tmp_path / "work"
    settings = replace(SETTINGS, expert_steps=0, joint_steps=0)
    with pytest.raises(OutlierError, match=said) if said else nullcontext():
        upcycle(base, corpora(), settings, work, log=lambda event: None)


@pytest.mark.slow
def test_a_joint_stage_that_does_not_help_is_dropped(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is what was there before."""
    before = train(library, tmp_path / "before", joint_steps=0)
    go_uphill(monkeypatch, least=2)
    events: list[dict[str, Any]] = []
    made = train(library, tmp_path / "work", events.append)
    *others, joint = made.stages
    assert all(stage["kept"] for stage in others) and not joint["kept"]
    assert joint["steps"] == joint["planned"] == 3
    assert all(joint["after"][name] > joint["before"][name] for name in ("law", "sea"))
    assert [e for e in events if e["event"] == "stage"][-1] == {"event": "stage"} | joint
    assert_same(made, before)
    assert made.after == before.after
    assert_same(train(library, tmp_path / "work"), before)


def test_layers_are_trained_in_groups(library: Library, tmp_path: Path) -> None:
    made = train(library, tmp_path / "work", layers_at_once=1, joint_steps=0)
    names = [stage["name"] for stage in made.stages[1:]]
    assert names == [f"experts of {d}, layer {n}" for d in ("law", "sea") for n in (1, 3)]
    assert {stage["steps"] for stage in made.stages[1:]} == {2}
    for before, after in zip(made.stages[1:4:2], made.stages[2:5:2], strict=True):
        shared = before["after"].keys()
        assert {n: after["before"][n] for n in shared} == pytest.approx(before["after"])
    assert [list(g) for g in layer_groups(range(8, 22), 4)] == [
        [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18], [19, 20, 21]
    ]  # fmt: skip


def test_a_domain_can_have_several_experts(library: Library, tmp_path: Path) -> None:
    made = train(library, tmp_path / "work", experts_per_domain=2, expert_size=96)
    assert made.layers[0].router.shape == (4, 64)
    assert made.layers[0].trits["down_proj"].shape == (4, 64, 96)
    for name in ("law", "sea"):
        assert made.after[name] < 0.9 * made.before[name]


def test_activations_can_have_half_the_bits(library: Library, tmp_path: Path) -> None:
    made = train(library, tmp_path / "work", dtype="bfloat16", layers=(1,))
    assert all(made.after[name] < 0.95 * made.before[name] for name in ("law", "sea"))
    kinds = {name.rpartition(".")[2]: array.dtype for name, array in tensors(made).items()}
    assert kinds == {"router": "f4", "alpha": "f4", "trits": "i1", "scales": "f2"}


@pytest.mark.slow
def test_stickiness_makes_neighbours_use_the_same_experts(library: Library, tmp_path: Path) -> None:
    how: dict[str, Any] = {"straight_through": False, "top_k": 1, "layers": (1,), "balance": 0.0}
    how |= {"joint_steps": 40, "experts_per_domain": 2, "keep_bound": 1e9}
    plain, sticky = (
        train(library, tmp_path / str(weight), stickiness=weight, **how).stages[-1]
        for weight in (0.0, 0.5)
    )
    assert plain["hit_rate_before"] == sticky["hit_rate_before"]
    assert plain["kept"] and sticky["kept"]
    assert sticky["hit_rate"] > plain["hit_rate"] + 0.1


def test_a_teacher_takes_the_place_of_the_text(library: Library, tmp_path: Path) -> None:
    """The base as its own teacher has nothing to teach: nothing gets better, nothing is kept."""
    events: list[dict[str, Any]] = []
    base = Source(library.base().path, "base")
    made = train(library, tmp_path / "work", events.append, teacher=base, joint_steps=0)
    losses = [e["parts"]["new"] for e in events if e["event"] == "step" and e["step"] == 1]
    assert max(losses) < 0.1 * np.log(made.before["law"])
    assert {e["domain"] for e in events if e["event"] == "teacher"} == {"law", "sea"}
    again: list[dict[str, Any]] = []
    train(library, tmp_path / "work", again.append, teacher=base, joint_steps=0)
    assert not [e for e in again if e["event"] == "teacher"]


def test_what_a_teacher_predicted_is_kept(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in a file, it goes on in that one; domains of similar names stay apart."""
    given, base = corpora(), Source(library.base().path, "base")
    names = [replace(c, name=n) for c, n in zip(given.domains, ("a_b", "a-b"), strict=True)]
    given = Corpora((names[0], names[1]), given.keep)
    settings, rows = replace(SETTINGS, expert_steps=8, batch=2, keep_share=0.5), np.arange(8)
    whole = Work(tmp_path / "whole", {})
    wanted = teacher.teach(base, given, settings, 288, whole, lambda event: None)
    monkeypatch.setattr(teacher, "_BATCHES", 2)
    told: list[tuple[str, int]] = []

    def log(event: dict[str, Any]) -> None:
        told.append((event["domain"], event["done"]))
        if len(told) == 7:
            raise Stopped

    for _ in range(2):
        with Work(tmp_path / "work", {}) as work, suppress(Stopped):
            found = teacher.teach(base, given, settings, 288, work, log)
    assert told[:7] == [("a_b", n) for n in (2, 4, 6, 8)] + [("a-b", n) for n in (2, 4, 6)]
    assert told[7:] == [("a-b", n) for n in (6, 8)]
    for name in ("a_b", "a-b"):
        windows = drawn(name, rows, 16, settings.seed)
        for one, other in zip(found(name, windows), wanted(name, windows), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("token", [-1, 288])
def test_predictions_of_tokens_that_there_are_not_are_refused(
    library: Library, tmp_path: Path, token: int
) -> None:
    """MLX would read beyond the logits; whoever wrote the file, its digest is right."""
    settings = replace(SETTINGS, expert_steps=1, joint_steps=0)
    base = Source(library.base().path, "base")

    def teach(work: Work) -> None:
        teacher.teach(base, corpora(), settings, 288, work, lambda event: None)

    with Work(tmp_path / "work", {}) as work:
        teach(work)
        stage = "teacher 0 law, from 0"
        arrays = {n: mx.array(tensor.read()) for n, tensor in work.tensors(stage).items()}
        work.finish(stage, arrays | {"tokens": mx.full(arrays["tokens"].shape, token)}, {})
        with pytest.raises(CheckpointError, match="law, from 0: not predictions of these windows"):
            teach(work)


def test_a_teacher_of_another_vocabulary_is_refused(library: Library, tmp_path: Path) -> None:
    other = Source(library.base(vocab=320).path, "other")
    with pytest.raises(OutlierError, match="the teacher predicts 320 tokens, the base 288"):
        train(library, tmp_path / "work", teacher=other)


def test_a_loss_that_is_no_number_ends_the_training(library: Library, tmp_path: Path) -> None:
    with pytest.raises(OutlierError, match="a lower learning rate may help"):
        train(library, tmp_path / "work", learning_rate=1e30)


@pytest.mark.parametrize("several", [False, True])
def test_losses_through_the_head(monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    """All three, with their gradients, also if not all logits are there at a time."""
    if several:
        monkeypatch.setattr(objectives, "LOGITS", 40 * 5)
    hidden, truth = (mx.random.normal((2, 9, 16), key=mx.random.key(n)) for n in (0, 1))
    head = mx.random.normal((40, 16), key=mx.random.key(2))
    targets = mx.random.randint(0, 40, (2, 9), key=mx.random.key(3))

    def cross(hidden: mx.array) -> mx.array:
        return nn.losses.cross_entropy(hidden @ head.T, targets, reduction="mean")

    def apart(hidden: mx.array, temperature: float = 1.0) -> mx.array:
        ours, theirs = (nn.log_softmax(h @ head.T / temperature, axis=-1) for h in (hidden, truth))
        return temperature**2 * (mx.exp(theirs) * (theirs - ours)).sum(-1).mean()

    def from_truth(logits: mx.array, truth: mx.array) -> tuple[mx.array, mx.array]:
        return divergence(logits, truth @ head.T)

    order = mx.broadcast_to(mx.arange(40), (2, 9, 40)).astype(mx.int32)
    log_probs = nn.log_softmax(truth @ head.T / 2, axis=-1)
    pairs = [
        (lambda h: through_head(h, head, next_token, targets), cross),
        (lambda h: through_head(h, head, from_truth, truth), apart),
        (
            lambda h: through_head(h, head, distilled(2.0), order, log_probs),
            lambda h: apart(h, 2.0),
        ),
    ]
    for ours, plain in pairs:
        (loss, gradient), (expected, slope) = (mx.value_and_grad(f)(hidden) for f in (ours, plain))
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
        np.testing.assert_allclose(gradient, slope, rtol=2e-3, atol=1e-5)


def test_windows_are_drawn_once_in_a_pass_and_by_the_step_alone() -> None:
    drawn_in_steps = [drawn("law", step * 4 + np.arange(4), 10, 0) for step in range(5)]
    passes = np.concatenate(drawn_in_steps).reshape(2, 10)
    assert (np.sort(passes, axis=1) == np.arange(10)).all()
    assert (passes[0] != passes[1]).any()
    np.testing.assert_array_equal(drawn("law", np.arange(8, 12), 10, 0), drawn_in_steps[2])
    assert (drawn("sea", np.arange(10), 10, 0) != passes[0]).any()
    assert (drawn("law", np.arange(10), 10, 1) != passes[0]).any()


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [scheduled(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates.index(max(rates)) == 99
    assert rates[99:] == sorted(rates[99:], reverse=True) and 0.02 < rates[-1] < 0.021


def test_hits_are_those_of_a_small_cache() -> None:
    # Two of four experts fit: 0 and 1 are found again, 2 pushes 0 out.
    assert hits_of(np.array([[0], [1], [0], [1], [2], [0]]), 2) == 2
    assert hits_of(np.array([[0, 1], [1, 0], [2, 3], [0, 1]]), 2) == 2
