"""Training: what it gives, how its stages are judged, and that an interrupted one is resumed."""

import json
import os
import signal
import subprocess
import sys
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
from outlier_mlx.runtime.affine2 import ROWS
from outlier_mlx.runtime.moe import OutlierMoE
from outlier_mlx.storage.hub import Source
from outlier_mlx.ternary import pack_rows
from outlier_mlx.train import beginning, loop, objectives, teacher
from outlier_mlx.train.forward import TrainedModel
from outlier_mlx.train.initial import latents
from outlier_mlx.train.log import FILE
from outlier_mlx.train.loop import drawn, scheduled
from outlier_mlx.train.measures import hits_of
from outlier_mlx.train.objectives import distilled, divergence, next_token, through_head
from outlier_mlx.train.stages import Upcycled, layer_groups, upcycle
from outlier_mlx.train.state import Work
from outlier_mlx.train.texts import Corpora, Corpus
from outlier_mlx.train.trits import ternarise
from tests.builders import write_base
from tests.folders import contents
from tests.library import Library
from tests.training import (
    SETTINGS,
    Stopped,
    corpora,
    go_uphill,
    stopped_at,
    tensors,
    train,
)

STAGES = ("experts of law", "experts of sea", "routers")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training") / "work"


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    """What `made` logs."""
    return []


@pytest.fixture(scope="module")
def made(library: Library, work: Path, events: list[dict[str, Any]]) -> Upcycled:
    """A training that nothing interrupted; its work folder is `work`."""
    return train(library, work, events.append)


def assert_same(one: Upcycled, other: Upcycled) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array.view(np.uint8), theirs[name].view(np.uint8), name)


def tier_model(library: Library, made: Upcycled) -> nn.Module:
    """The base with the trained experts in a tier's own modules."""
    model: Any = load_model(library.base().path)[0]
    for layer in made.layers:
        experts, hidden = layer.router.shape
        size = layer.trits["gate_proj"].shape[1]
        mlp = model.layers[layer.layer].mlp
        block = OutlierMoE(mlp, hidden, size, experts, SETTINGS.top_k, ROWS)
        block.gate.weight, block.alpha = mx.array(layer.router), mx.array(layer.alphas)
        for name, trits in layer.trits.items():
            linear = block.switch_mlp[name]
            linear.weight = mx.array(pack_rows(trits))
            linear.scales = mx.array(layer.scales[name].astype(np.float32))
            linear.prepare()
        model.layers[layer.layer].mlp = block
    return model


def test_experts_make_new_text_likelier(made: Upcycled) -> None:
    assert set(made.before) == set(made.after) == {"law", "sea", "keep"}
    for name in ("law", "sea"):
        assert made.after[name] < 0.9 * made.before[name]
    assert [stage["kept"] for stage in made.stages] == [True] * 4
    titles = [stage["name"] for stage in made.stages]
    assert titles == [
        "begin",
        "experts of law, layers 1 to 3",
        "experts of sea, layers 1 to 3",
        "routers, alphas and row scales",
    ]
    errors = made.stages[0]["errors"]
    assert 0 < errors["lloyd"] < errors["absmean"] < 1
    last = made.stages[-1]
    assert last["after"].keys() == made.after.keys()
    assert 0 < last["hit_rate"] <= 1


def test_the_figures_are_those_of_the_tier_that_is_written(
    library: Library, made: Upcycled
) -> None:
    model = tier_model(library, made)
    for corpus in corpora():
        tokens = mx.array(corpus.reported)
        loss = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")
        assert float(mx.exp(loss)) == pytest.approx(made.after[corpus.name], rel=1e-4)


def test_reported_windows_decide_nothing(
    library: Library, made: Upcycled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ones give other figures, and the same training."""
    given = corpora()
    assert [len(c.deciding) for c in given] == [len(c.reported) for c in given] == [8, 8, 8]

    def others(corpus: Corpus) -> Corpus:
        shuffled = np.concatenate([corpus.deciding, corpus.reported[:, ::-1]])
        return replace(corpus, held_out=shuffled)

    changed = Corpora(tuple(map(others, given.domains)), others(given.keep))
    monkeypatch.setattr("tests.training.corpora", lambda: changed)
    again = train(library, tmp_path / "work")
    assert_same(again, made)
    for one, other in zip(again.stages, made.stages, strict=True):
        assert (one["before"], one.get("after")) == (other["before"], other.get("after"))
    for name, value in made.before.items():
        assert again.before[name] != value and again.after[name] != made.after[name]


def test_what_is_made_has_the_dtypes_of_an_overlay(made: Upcycled) -> None:
    assert [layer.layer for layer in made.layers] == [1, 3] and len(made.layers[:1]) == 1
    kinds = {name.rpartition(".")[2]: array.dtype for name, array in tensors(made).items()}
    assert kinds == {"router": "f4", "alpha": "f4", "trits": "i1", "scales": "f2"}
    assert not any(np.isnan(array.astype(np.float32)).any() for array in tensors(made).values())


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_training_is_resumed_bit_for_bit(
    library: Library, made: Upcycled, tmp_path: Path, stage: str
) -> None:
    events: list[dict[str, Any]] = []
    with stopped_at(1, stage) as log, pytest.raises(Stopped):
        train(library, tmp_path / "work", log)
    again = train(library, tmp_path / "work", events.append)
    steps = [e["step"] for e in events if e["event"] == "step" and e["stage"].startswith(stage)]
    assert 1 not in steps and steps[-1] == (3 if stage == "routers" else 4)
    assert_same(again, made)
    assert again.after == made.after


@pytest.mark.slow
def test_weights_of_all_experts_can_be_trained_together(library: Library, tmp_path: Path) -> None:
    """Better than routers and scales alone; interrupted, the same to the bit."""
    how: dict[str, Any] = {"expert_steps": 0, "joint_steps": 8, "learning_rate": 0.2}
    frozen = train(library, tmp_path / "frozen", **how)
    whole = train(library, tmp_path / "whole", **how, joint_weights=True)
    title = "routers, alphas and weights"
    assert [stage["name"] for stage in whole.stages] == ["begin", title]
    assert sum(whole.after.values()) < sum(frozen.after.values()) < sum(frozen.before.values())
    with stopped_at(1, title) as log, pytest.raises(Stopped):
        train(library, tmp_path / "again", log, **how, joint_weights=True)
    assert_same(train(library, tmp_path / "again", **how, joint_weights=True), whole)


def test_gradients_are_the_same_without_checkpoints(library: Library, tmp_path: Path) -> None:
    one = train(library, tmp_path / "one", grad_checkpoint=True)
    assert_same(train(library, tmp_path / "other", grad_checkpoint=False), one)


def calls_until(
    patch: pytest.MonkeyPatch, of: Any, name: str, most: int | None = None
) -> list[int]:
    """Count calls of a function; a call beyond `most` ends the training."""
    whole, calls = getattr(of, name), [0]

    def counted(*given: Any) -> Any:
        if calls[0] == most:
            raise Stopped
        calls[0] += 1
        return whole(*given)

    patch.setattr(of, name, counted)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "name", "counts"),
    [
        # Of three texts' 8 windows, then of two domains' 16, four at a time.
        (TrainedModel, "hidden", (0, 2, 4, 7, 11)),
        # Two experts in each of two layers.
        (beginning, "rounded_expert", (1, 2, 3)),
    ],
)
def test_the_beginning_is_resumed_bit_for_bit(
    library: Library, made: Upcycled, tmp_path: Path, of: Any, name: str, counts: tuple[int, ...]
) -> None:
    """What was done before the end is not done again, but for the layer's other expert."""
    with pytest.MonkeyPatch.context() as patch:
        whole = calls_until(patch, of, name)
        with stopped_at(1, STAGES[0]) as log, pytest.raises(Stopped):
            train(library, tmp_path / "whole", log)
    for count in counts:
        work = tmp_path / str(count)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            calls_until(patch, of, name, count)
            train(library, work)
        with pytest.MonkeyPatch.context() as patch:
            calls = calls_until(patch, of, name)
            with stopped_at(1, STAGES[0]) as log, pytest.raises(Stopped):
                train(library, work, log)
        again = count % 2 if of is beginning else 0
        assert calls[0] == whole[0] - count + again
        ours, theirs = (
            {path.name: path.read_bytes() for path in folder.glob("stage-*")}
            for folder in (work, tmp_path / "whole")
        )
        assert ours == theirs and len(ours) == 3
    assert_same(train(library, work), made)


def test_ctrl_c_within_a_step_waits_for_its_end(
    library: Library, made: Upcycled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a step's tensors would be of the next step."""
    adam, calls = loop._adam, []

    def interrupted(*given: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        calls.append(given)
        if len(calls) == 12:  # of the second step, which changes eight
            os.kill(os.getpid(), signal.SIGINT)
        return adam(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_adam", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(library, tmp_path / "work")
    assert len(calls) == 16 and (tmp_path / "work" / "running.safetensors").exists()
    assert_same(train(library, tmp_path / "work"), made)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.library import Library
from tests.training import train

def log(event):
    if event["event"] == "step" and event["stage"].startswith("experts of sea"):
        os.kill(os.getpid(), signal.SIGKILL)

class Made(Library):
    def base(self, **how):
        class Base:
            path = Path(sys.argv[1])
        return Base

train(Made(Path()), Path(sys.argv[2]), log, save_every=0)
"""


@pytest.mark.slow
def test_a_killed_training_is_resumed_bit_for_bit(
    library: Library, made: Upcycled, tmp_path: Path
) -> None:
    """Killed after the first step of a stage, whose state was saved before."""
    how = [sys.executable, "-c", KILLED, str(library.base().path), str(tmp_path / "work")]
    ended = subprocess.run(how, capture_output=True, timeout=200, cwd=Path(__file__).parents[1])
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-500:]
    assert (tmp_path / "work" / "running.safetensors").exists()
    assert_same(train(library, tmp_path / "work"), made)


def test_a_file_that_a_kill_left_half_written_is_ignored(
    library: Library, made: Upcycled, tmp_path: Path
) -> None:
    with stopped_at(1, STAGES[2]) as log, pytest.raises(Stopped):
        train(library, tmp_path / "work", log)
    part = tmp_path / "work" / f".running.{'0' * 8}.safetensors"
    part.write_bytes(b"half of it")
    (tmp_path / "work" / ".DS_Store").touch()
    assert_same(train(library, tmp_path / "work"), made)
    assert not part.exists() and (tmp_path / "work" / ".DS_Store").exists()


def test_a_finished_training_is_not_repeated(library: Library, made: Upcycled, work: Path) -> None:
    events: list[dict[str, Any]] = []
    assert_same(train(library, work, events.append), made)
    assert not [event for event in events if event["event"] == "step"]
    assert not (work / "running.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_what_was_trained_so_far_can_be_had(
    library: Library, made: Upcycled, tmp_path: Path, number: int
) -> None:
    """What the interrupted stage had is judged as at its end; and the training still goes on."""
    work = tmp_path / "work"
    with stopped_at(1, STAGES[number]) as log, pytest.raises(Stopped):
        train(library, work, log)
    left = contents(work)
    events: list[dict[str, Any]] = []
    found = train(library, work, events.append, so_far=True)
    assert contents(work) == left and not found.is_whole and made.is_whole
    told = [event["name"] for event in events if event["event"] == "stage"]
    assert told == [stage["name"] for stage in found.stages[1 + number :]]
    assert not [event for event in events if event["event"] == "step"]

    done = [(stage["steps"], stage["planned"], stage["kept"]) for stage in found.stages[1:]]
    begun = [(4, 4, True), (1, 4, True), (0, 3, False)]
    assert done == (begun if number == 1 else [(4, 4, True), (4, 4, True), (1, 3, True)])
    values: Any = mx.load(str(work / "running.safetensors"))
    for layer in found.layers:
        if number == 1:  # the latent weights of the second expert, rounded
            trits, scales = ternarise(values[f"value.{layer.layer}.experts.1.up_proj.latent"])
            np.testing.assert_array_equal(layer.trits["up_proj"][1], trits)
            np.testing.assert_array_equal(layer.scales["up_proj"][1], scales[:, 0])
        else:
            np.testing.assert_array_equal(layer.router, values[f"value.{layer.layer}.router"])
    assert all(found.after[name] < found.before[name] for name in ("law", "sea"))
    assert found.after != made.after

    assert_same(train(library, work), made)
    whole = train(library, work, so_far=True)
    assert_same(whole, made)
    assert whole.is_whole


def test_so_far_without_a_step(library: Library, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(OutlierError, match="no training was begun in it"):
        train(library, work, so_far=True)
    assert not work.exists()
    for of, name, most in ((beginning, "rounded_expert", 3), (loop, "_step", 0)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            calls_until(patch, of, name, most)
            train(library, work)
        left = contents(work)
        with pytest.raises(OutlierError, match="no step of the training was made yet"):
            train(library, work, so_far=True)
        assert contents(work) == left


def test_a_stage_that_ended_early_is_dropped_as_any_other(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_uphill(monkeypatch, least=1)
    how: dict[str, Any] = {"keep_weight": 0.0, "learning_rate": 0.5}
    with stopped_at(1, STAGES[0]) as log, pytest.raises(Stopped):
        train(library, tmp_path / "work", log, **how)
    made = train(library, tmp_path / "work", so_far=True, **how)
    _, first, *others = made.stages
    assert (first["steps"], first["kept"]) == (1, False)
    assert first["after"]["law"] > first["before"]["law"]
    assert {stage["steps"] for stage in others} == {0}
    assert not any(layer.alphas.any() for layer in made.layers)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 0.2}, "learning_rate: 0.1, not 0.2"),
        ({"seed": 1}, "seed: 0, not 1"),
        ({"dtype": "float16"}, 'dtype: null, not "float16"'),
        ({"seed": 1, "batch": 6}, "another batch: 4, not 6 and another seed: 0, not 1"),
        ({"held_out": 5}, "another data;"),
    ],
)
def test_another_training_is_refused(
    library: Library, made: Upcycled, work: Path, changed: dict, named: str
) -> None:
    with pytest.raises(OutlierError, match=named):
        train(library, work, **changed)


def test_damaged_states_are_refused(library: Library, made: Upcycled, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with stopped_at(1, STAGES[2]) as log, pytest.raises(Stopped):
        train(library, work, log)
    running = work / "running.safetensors"
    sound = running.read_bytes()
    running.write_bytes(sound[:-4])
    with pytest.raises(CheckpointError, match="running"):
        train(library, work)
    running.write_bytes(sound.replace(b"value.1.alpha", b"value.1.alphx"))
    with pytest.raises(CheckpointError, match=r"value\.1\.alpha: expected float32"):
        train(library, work)
    running.write_bytes(sound)
    stage = next(work.glob("stage-1-*"))
    content = stage.read_bytes()
    stage.write_bytes(content.replace(b"1.experts.0.up_proj.codes", b"1.experts.9.up_proj.codes"))
    with pytest.raises(CheckpointError, match="not what was written"):
        train(library, work)
    stage.write_bytes(content)
    for path in work.glob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(CheckpointError, match=rf"{path.name}: .*written; without this file, "):
            train(library, work)
        path.write_bytes(content)
    assert_same(train(library, work), made)


@pytest.mark.parametrize("room", [0, 3])
def test_a_full_disk_is_told_and_costs_nothing_that_is_done(
    room: int, library: Library, made: Upcycled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, written = mx.save_safetensors, []

    def full(path: str, *rest: Any) -> None:
        written.append(path)
        if len(written) > room:
            raise RuntimeError("[write] Unable to write 364 bytes to file.")
        save(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk may be full") as told:
        patch.setattr(mx, "save_safetensors", full)
        train(library, tmp_path / "work")
    assert Path(told.value.filename).parent == tmp_path / "work"
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == room
    assert_same(train(library, tmp_path / "work"), made)


def test_neurons_that_the_base_has_not_are_not_read(library: Library) -> None:
    mlp: Any = load_model(library.base().path)[0].model.layers[0].mlp
    for neuron in (-1, mlp.gate_proj.weight.shape[0]):
        with pytest.raises(CheckpointError, match="neurons"):
            latents(mlp, np.full(32, neuron), 64, 32, (0,))


def test_what_failed_before_anything_was_done_binds_nobody(
    library: Library, made: Upcycled, tmp_path: Path
) -> None:
    work = tmp_path / "new" / "work"

    def fail(event: dict[str, Any]) -> None:
        (work / FILE).write_text("of the first one")
        raise Stopped

    with pytest.raises(Stopped):
        train(library, work, fail, seed=1, layers_at_once=1)
    assert_same(train(library, work), made)
    assert not (work / FILE).exists()


def test_two_trainings_do_not_share_a_folder(library: Library, tmp_path: Path) -> None:
    def log(event: dict[str, Any]) -> None:
        if event["event"] == "stage":
            with pytest.raises(OutlierError, match="another training runs in it"):
                train(library, tmp_path / "work")
            raise Stopped

    with pytest.raises(Stopped):
        train(library, tmp_path / "work", log)


def test_a_folder_with_other_files_is_not_used(library: Library, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutlierError, match="holds other files"):
        train(library, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


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


def test_a_teacher_of_another_vocabulary_is_refused(library: Library, tmp_path: Path) -> None:
    other = Source(library.base(vocab=320).path, "other")
    with pytest.raises(OutlierError, match="the teacher predicts 320 tokens, the base 288"):
        train(library, tmp_path / "work", teacher=other)


def test_a_loss_that_is_no_number_ends_the_training(library: Library, tmp_path: Path) -> None:
    with pytest.raises(OutlierError, match="a lower learning rate may help"):
        train(library, tmp_path / "work", learning_rate=1e30)


def test_events_are_json(made: Upcycled, events: list[dict[str, Any]]) -> None:
    assert json.loads(json.dumps(events, allow_nan=False))
    steps = [event for event in events if event["event"] == "step"]
    assert {"stage", "step", "steps", "loss", "parts", "tokens_per_second", "seconds_left"} <= set(
        steps[0]
    )


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
