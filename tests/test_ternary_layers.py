"""Ternary layers by themselves: looked-up rows, and inputs that are rotated once for several."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx.runtime import ternary_layers
from outlier_mlx.runtime.ternary_layers import (
    Rotation,
    RotationSigns,
    TernaryEmbedding,
    looked_up,
)
from outlier_mlx.runtime.ternary_model import TernaryModel, TernaryModelArgs
from tests.engine import pack_rows
from tests.ternary_models import QWEN3, tiled

# Rows


@pytest.mark.parametrize(("wide", "group"), [(80, 0), (321, 0), (448, 64), (128, 128)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_looking_up(wide: int, group: int, shape: tuple[int, ...]):
    rng = np.random.default_rng(wide)
    trits = rng.integers(-1, 2, (13, wide), dtype=np.int8)
    scales = rng.uniform(0.5, 2, (13, wide // (group or wide))).astype(np.float16)
    stored = mx.array(tiled(scales)) if group else mx.array(scales[:, 0].astype(np.float32))
    ids = rng.integers(0, 13, shape)
    found = looked_up(mx.array(pack_rows(trits)), stored, mx.array(ids), wide)
    expected = trits * np.repeat(scales.astype(np.float32), group or wide, axis=1)
    np.testing.assert_array_equal(found, expected[ids])


def test_vectors_are_rounded_before_and_after_they_are_rotated_back():
    rng = np.random.default_rng(0)
    signs = RotationSigns(512)
    signs.signs = mx.array(rng.choice([-1.0, 1.0], 512).astype(np.float16))
    layer = TernaryEmbedding(9, 512, 0, rotation=Rotation(signs, 512))
    trits = rng.integers(-1, 2, (9, 512), dtype=np.int8)
    scales = rng.uniform(0.9, 1.1, 9).astype(np.float32)
    layer.load_weights([("weight", mx.array(pack_rows(trits))), ("scales", mx.array(scales))])
    layer.dtype = mx.float16
    rows = (trits * scales[:, None]).astype(np.float16)  # not the float32 products
    blocks = mx.hadamard_transform(mx.array(rows).astype(mx.float32), scale=512**-0.5)
    expected = (blocks * signs.signs.astype(mx.float32)).astype(mx.float16)
    np.testing.assert_array_equal(layer(mx.arange(9)), expected)


# The model

ONE = {"in_features": 128, "group_size": 128}


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"model.layers.0.nothing": ONE}, "no linear layer or embedding there"),
        ({"model.norm": ONE}, "no linear layer or embedding there"),
        ({"model.embed_tokens": ONE | {"in_features": 64}}, "rows of 64 weights"),
        ({"model.embed_tokens": ONE | {"group_size": 32}}, "in groups of 32"),
        ({"model.embed_tokens": ONE | {"rotation": 0}}, "a rotation of another width than 128"),
    ],
)
def test_what_the_model_s_own_code_refuses(modules: dict[str, Any], words: str):
    """Where only mlx-lm is installed, nothing else looks at the config."""
    rotations = [{"block": 64, "width": 64, "signed": True}]
    ternary = {"format": "tq1_0_strided", "version": 2, "rotations": rotations, "modules": modules}
    with pytest.raises(ValueError, match=words):
        TernaryModel(TernaryModelArgs.from_dict(QWEN3 | {"ternary": ternary}))
    with pytest.raises(ValueError, match="version 3"):
        TernaryModelArgs.from_dict(QWEN3 | {"ternary": ternary | {"version": 3}})
    with pytest.raises(ValueError, match="mlx-lm has no such model"):
        TernaryModelArgs.from_dict({"model_type": "../x", "ternary": ternary})


# The shared input


class Counted:
    """Rotations of an array by its sum, so that a stale one would show."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def rotate(x: mx.array, *_: Any, **__: Any) -> mx.array:
            self.count += 1
            return x + 1000

        monkeypatch.setattr(ternary_layers, "rotate", rotate)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def rotation_of(readers: int) -> Rotation:
    rotation = Rotation(RotationSigns(4), 4)
    assert [rotation.add_reader() for _ in range(readers)] == list(range(readers))
    return rotation


def test_readers_of_one_input_share_it(counted: Counted):
    rotation, x, other = rotation_of(3), mx.zeros(4), mx.zeros(4)
    first = [rotation(x, reader, False) for reader in range(3)]
    assert counted.count == 1 and first[0] is first[1] is first[2]
    rotation(other, 0, False)
    rotation(x, 1, False)  # another input
    assert counted.count == 3


def test_an_input_that_was_changed_in_place_is_rotated_again(counted: Counted):
    rotation, x = rotation_of(2), mx.zeros(4)
    rotation(x, 0, False)
    x += 1
    assert float(rotation(x, 0, False)[0]) == 1001
    assert float(rotation(x, 1, False)[0]) == 1001
    assert counted.count == 2


def test_nothing_is_kept_once_all_have_read_or_the_input_is_gone(counted: Counted):
    rotation, x = rotation_of(2), mx.zeros(4)
    kept = weakref.ref(rotation(x, 0, False))
    assert kept() is not None
    rotation(x, 1, False)
    assert kept() is None
    kept = weakref.ref(rotation(x, 1, False))
    del x
    assert kept() is None


def test_threads_do_not_get_each_other_s_inputs(counted: Counted):
    rotation = rotation_of(3)
    wrong: list[int] = []

    def read(value: float) -> None:
        for _ in range(300):
            x = mx.full(4, value)
            wrong.extend(r for r in range(3) if float(rotation(x, r, False)[0]) != value + 1000)

    threads = [threading.Thread(target=read, args=(float(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
