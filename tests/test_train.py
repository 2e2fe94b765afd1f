"""Training: what it gives, how its stages are judged, and that an interrupted one is resumed."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.train import beginning, loop
from outlier_mlx.train.forward import TrainedModel
from outlier_mlx.train.initial import latents
from outlier_mlx.train.log import FILE
from outlier_mlx.train.stages import Upcycled
from outlier_mlx.train.state import _write
from outlier_mlx.train.texts import Corpora, Corpus
from outlier_mlx.train.trits import ternarise
from tests.folders import contents
from tests.library import Library
from tests.training import (
    Stopped,
    assert_same,
    corpora,
    go_uphill,
    stopped_at,
    tensors,
    tier_model,
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
        ({"learning_rate": 0.2}, "another --learning-rate: 0.1, not 0.2"),
        ({"seed": 1}, "another --seed: 0, not 1"),
        ({"dtype": "float16"}, 'another --dtype: null, not "float16"'),
        ({"seed": 1, "batch": 6}, "another --batch: 4, not 6 and another --seed: 0, not 1"),
        ({"grad_checkpoint": False}, "another --no-grad-checkpoint: off, not on"),
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
    with pytest.raises(CheckpointError, match=r"value\.1\.alpha: expected F32"):
        train(library, work)
    running.write_bytes(sound)
    stage = next(work.glob("stage-1-*"))
    content = stage.read_bytes()
    stage.write_bytes(content.replace(b"1.experts.0.up_proj.codes", b"1.experts.9.up_proj.codes"))
    with pytest.raises(CheckpointError, match=r"up_proj\.codes: expected U8"):
        train(library, work)
    stage.write_bytes(content)
    for path in work.glob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(CheckpointError, match=rf"{path.name}: .*written; without this file, "):
            train(library, work)
        path.write_bytes(content)
    assert_same(train(library, work), made)


@pytest.mark.slow
def test_states_that_are_whole_but_wrong_are_refused_in_a_line(
    library: Library, made: Upcycled, tmp_path: Path
) -> None:
    """Whatever the digest says: arrays and fields that a stage does not have go into nothing."""
    work = tmp_path / "work"
    with stopped_at(1, STAGES[2]) as log, pytest.raises(Stopped):
        train(library, work, log)
    codes = "1.experts.0.up_proj.codes"
    for name, record, arrays in (
        ("stage-0-begin.", {"losses": None}, {}),
        ("stage-0-begin.", {"losses": {"law": 1.0}}, {}),
        ("stage-0-begin.", {}, {"1.router": mx.zeros((1, 64))}),
        ("stage-0-begin.", {}, {"1.neurons": mx.zeros((2, 64))}),
        ("stage-0-begin--layer-1.", {"errors": []}, {}),
        ("stage-0-begin--layer-1.", {"errors": [{"lloyd": "x"}]}, {}),
        ("stage-0-begin--layer-1.", {}, {codes: None}),
        ("stage-0-begin--layer-1.", {}, {codes: mx.full((64, 16), 255, mx.uint8)}),
        ("stage-1-", {"seconds": [1]}, {}),
        ("stage-1-", {"before": {"law": None}}, {}),
        ("stage-1-", {"steps": "4"}, {}),
        ("stage-1-", {}, {"9.alpha": mx.zeros(2)}),
        ("running.", {"seconds": "long"}, {}),
        ("running.", {"step": 99}, {}),
        ("running.", {"step": True}, {}),
    ):
        path = next(path for path in work.iterdir() if path.name.startswith(name))
        sound = path.read_bytes()
        loaded: Any = mx.load(str(path), return_metadata=True)
        of, told = loaded[0], json.loads(loaded[1]["record"]) | record
        changed = {n: a for n, a in (of | arrays).items() if a is not None}
        mx.eval(changed)
        _write(path, changed, told)
        with pytest.raises(CheckpointError) as refused:
            train(library, work)
        assert str(work) in str(refused.value) and "\n" not in str(refused.value)
        path.write_bytes(sound)
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


def test_events_are_json(made: Upcycled, events: list[dict[str, Any]]) -> None:
    assert json.loads(json.dumps(events, allow_nan=False))
    steps = [event for event in events if event["event"] == "step"]
    assert {"stage", "step", "steps", "loss", "parts", "tokens_per_second", "seconds_left"} <= set(
        steps[0]
    )
