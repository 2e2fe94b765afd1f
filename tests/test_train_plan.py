"""The memory of a training: planned before it begins, and as much as it takes."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx.engine.machine import Budget, budget
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import parse_config
from outlier_mlx.storage.hub import Source
from outlier_mlx.train.plan import plan
from outlier_mlx.train.settings import Settings
from outlier_mlx.train.stages import planned, upcycle
from outlier_mlx.train.state import Work
from outlier_mlx.train.teacher import nbytes_of, teach
from outlier_mlx.train.texts import Corpora, Corpus
from tests.builders import write_base
from tests.library import Library
from tests.memory import at_rest
from tests.training import Stopped, corpora, stopped_at, train

# Qwen2.5-7B.
SEVEN_B = parse_config(
    {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    }
)
FOURTEEN_LAYERS = Settings(layers=tuple(range(8, 22)), batch=4)


# Experts that are small beside the hidden size: what the base looks at is summed by its square.
WIDE = {"hidden": 512, "vocab": 256}
# What is trained together: scales, or all weights.
SCALES = {"straight_through": False, "joint_steps": 2}
WEIGHTS = {"expert_steps": 0, "joint_steps": 2, "joint_weights": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "dtype", "dims", "how"),
    [
        (32, "float32", {}, {}),
        (32, "float32", {}, {"layers_at_once": 1}),
        (128, "float32", {}, {"base_bits": None}),
        (128, "bfloat16", {}, {"base_bits": None}),
        (32, "bfloat16", {}, {}),
        (32, "float32", {}, SCALES),
        (32, "bfloat16", {}, SCALES),
        (128, "float32", {}, WEIGHTS),
        (32, "float32", {}, SCALES | {"experts_per_domain": 8}),
        (32, "float32", {}, SCALES | {"experts_per_domain": 8, "grad_checkpoint": False}),
        (32, "float32", {}, WEIGHTS | {"experts_per_domain": 8}),
        (32, "float32", {}, WEIGHTS | {"experts_per_domain": 8, "grad_checkpoint": False}),
        (32, "float32", {}, {"grad_checkpoint": False}),
        (128, "float32", {}, {"base_bits": None, "grad_checkpoint": False}),
        (8, "float32", WIDE, {"layers_at_once": 1, "expert_size": 64, "base_bits": None}),
        (8, "bfloat16", WIDE, {"layers_at_once": 1, "expert_size": 64, "base_bits": None}),
    ],
)
def test_a_training_takes_what_was_planned(
    tmp_path: Path, window: int, dtype: str, dims: dict[str, int], how: dict[str, Any]
) -> None:
    """Within 15 %; of a base whose parts have about the sizes that those of large ones have."""
    sizes = {"hidden": 128, "intermediate": 512, "vocab": 1024, "layers": 5} | dims
    stored = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    write_base(tmp_path / "base", base_dtype=stored, tokenizer=False, **sizes)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)

    def text(windows: int) -> np.ndarray:
        return rng.integers(0, sizes["vocab"], (windows, window + 1)).astype(np.int32)

    texts = [Corpus(name, text(8), text(2)) for name in ("law", "keep")]
    settings = Settings(
        layers=(1, 2, 3, 4), top_k=1, expert_size=256, expert_steps=4, joint_steps=0, batch=4
    )
    settings = replace(settings, **how)
    base, given = Source(tmp_path / "base", "base"), Corpora((texts[0],), texts[1])
    _, wanted = planned(base, given, settings, tmp_path / "work", dtype=dtype)
    assert ("sums of the first stage" in wanted.parts) == (dims is WIDE)
    before = at_rest()
    made = upcycle(base, given, settings, tmp_path / "work", log=lambda event: None, dtype=dtype)
    assert made.peak - before == pytest.approx(wanted.peak, rel=0.15)


@pytest.mark.parametrize(("window", "batch"), [(32, 4), (128, 4)])
def test_a_teacher_takes_what_was_planned(tmp_path: Path, window: int, batch: int) -> None:
    """Within 15 %, as long as it predicts: what it takes is not there when the base is loaded."""
    dims: dict[str, Any] = {"hidden": 128, "intermediate": 512, "vocab": 4096, "layers": 5}
    write_base(tmp_path / "teacher", base_dtype="F32", tokenizer=False, **dims)
    windows = np.random.default_rng(0).integers(0, 4096, (2 * batch, window + 1)).astype(np.int32)
    given = Corpora((Corpus("law", windows, windows),), Corpus("keep", windows, windows))
    settings = Settings(expert_steps=2, joint_steps=0, batch=batch)
    teacher = Source(tmp_path / "teacher", "teacher")
    wanted = nbytes_of(teacher, settings, window, budget())
    before = at_rest()
    with Work(tmp_path / "work", {}) as work:
        teach(teacher, given, settings, 4096, work, lambda event: None)
    assert mx.get_peak_memory() - before == pytest.approx(wanted, rel=0.15)
    gc.collect()
    assert mx.get_active_memory() - before < 0.1 * wanted


def test_a_teacher_that_does_not_fit_is_refused_before_it_is_loaded(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Source(library.base().path, "base")
    found = planned(base, corpora(), Settings(), tmp_path / "work", teacher=base)[1]
    assert found.as_json()["teacher_bytes"] == found.teacher > 0
    assert replace(found, teacher=10**12).peak == 10**12
    monkeypatch.setattr("outlier_mlx.train.stages.budget", lambda: Budget(1000, "this machine"))
    with pytest.raises(OutlierError, match=r"the teacher needs .* this machine gives"):
        train(library, tmp_path / "work", teacher=base)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [4736, 9472])
def test_a_base_of_7b_with_two_experts_in_14_layers_fits_32_gb(size: int) -> None:
    settings = replace(FOURTEEN_LAYERS, expert_size=size).resolved(SEVEN_B)
    found = plan(SEVEN_B, settings, 2, 512, budget(32), 2)
    assert 14.9e9 < found.parts["base"] < 15.5e9
    assert 1 <= found.layers_at_once < 14
    found.check()
    whole = plan(SEVEN_B, replace(settings, layers_at_once=14), 2, 512, budget(32), 2)
    with pytest.raises(OutlierError, match=r"the training needs .* GB, with the experts of 14"):
        whole.check()


def test_a_plan_for_a_mac_has_the_bases_own_dtype(library: Library, tmp_path: Path) -> None:
    base = Source(library.base().path, "base")
    here, mac = (
        planned(base, corpora(), Settings(), tmp_path / "work", available=given)[1].parts["base"]
        for given in (None, budget(32))
    )
    assert here == mac * (2 if mx.default_device() == mx.cpu else 1)


def test_more_memory_trains_more_layers_together() -> None:
    settings = FOURTEEN_LAYERS.resolved(SEVEN_B)
    counts = [plan(SEVEN_B, settings, 2, 512, budget(gb), 2).layers_at_once for gb in (32, 64, 192)]
    assert counts == sorted(counts) and counts[0] < counts[1] <= counts[2] == 14
    assert plan(SEVEN_B, settings, 2, 512, Budget(10**9, "it"), 2).layers_at_once == 1


def test_every_group_of_layers_has_a_step(library: Library, tmp_path: Path) -> None:
    base = Source(library.base().path, "base")
    settings = Settings(layers=(1, 2), layers_at_once=1, expert_steps=1)
    with pytest.raises(OutlierError, match="--steps: 1; expected at least 2"):
        planned(base, corpora(), settings, tmp_path / "work")
    planned(base, corpora(), replace(settings, layers_at_once=2), tmp_path / "work")


def test_a_training_that_was_begun_keeps_its_layers_at_once(
    library: Library, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    with stopped_at(1, "experts of law") as log, pytest.raises(Stopped):
        train(library, tmp_path / "work", log, layers_at_once=1)
    made = train(library, tmp_path / "work", events.append)
    assert events[0]["event"] == "memory" and events[0]["layers_at_once"] == 1
    assert events[0]["peak_bytes"] == sum(events[0]["parts"].values())
    assert len(made.stages) == 1 + 2 * 2 + 1


def test_what_does_not_fit_is_refused_before_anything_is_written(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outlier_mlx.train.stages.budget", lambda: Budget(1000, "this machine"))
    with pytest.raises(OutlierError, match=r"this machine gives 1\.0 kB"):
        train(library, tmp_path / "work")
    assert not list(tmp_path.iterdir())
