"""V3.3's alpha_overlay.pt: every layout that it may have, and files that attack their reader."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx import open_overlay
from outlier_mlx.checkpoints.alpha_overlay import read_alpha_overlay
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from tests.alpha_overlays import EXPERTS, LAYERS, NEW, OLD, f32, flat, read
from tests.builders import Built, write_overlay
from tests.engine import tier_of
from tests.form_builders import Pickle, torch_save, torch_zip
from tests.goldens import require_shared
from tests.program import run
from tests.tensor_file import read_arrays, rounded

# The same two layers in every shape: each takes NEW or OLD.
LAYOUTS: dict[str, Callable[[dict[int, list[float]]], Any]] = {
    "nested floats": lambda t: {n: dict(enumerate(v)) for n, v in t.items()},
    "nested floats, keys as text": lambda t: {
        str(n): {str(e): x for e, x in enumerate(v)} for n, v in t.items()
    },
    "lists": dict,
    "tuples": lambda t: {n: tuple(v) for n, v in t.items()},
    "lists by layer_N": lambda t: {f"layer_{n}": v for n, v in t.items()},
    "pairs": flat,
    "tensors": lambda t: {n: f32(v) for n, v in t.items()},
    "half tensors": lambda t: {n: np.asarray(v, np.float16) for n, v in t.items()},
    "double tensors": lambda t: {n: np.asarray(v, np.float64) for n, v in t.items()},
    "tensors by key": lambda t: {
        f"model.layers.{n}.mlp.alpha_values": f32(v) for n, v in t.items()
    },
    "base.": lambda t: {f"base.model.layers.{n}.mlp.alpha": f32(v) for n, v in t.items()},
    "a tensor a scalar": lambda t: {
        f"model.layers.{n}.mlp.experts.{e}.alpha": f32(x) for (n, e), x in flat(t).items()
    },
    "a vector a scalar": lambda t: {
        f"layers.{n}.experts.{e}.alpha": f32([x]) for (n, e), x in flat(t).items()
    },
    "alpha_e": lambda t: {f"model.layers.{n}.mlp.alpha_e{e}": x for (n, e), x in flat(t).items()},
    "a list by layer": lambda t: [t.get(n) for n in range(LAYERS)],
    "a list of tensors": lambda t: [f32(t[n]) if n in t else None for n in range(LAYERS)],
    "words of alpha.json": lambda t: {
        "layers": {f"layer.{n}": {"experts": {"values": v}} for n, v in t.items()}
    },
}


@pytest.mark.parametrize("wrapper", [None, "alphas", "alpha", "overlay", "alpha_values", "trained"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, wrapper: str | None, tmp_path: Path):
    """Originals are beside the wrapper, or within; nowhere are they read as alphas."""
    make = LAYOUTS[layout]
    new: Any = make(NEW)
    if wrapper:
        places = [
            {wrapper: new, "originals": make(OLD), "n_trained": 6, "note": "x"},
            {"version": "v3.3", "originals": make(OLD), wrapper: new},
        ]
        if isinstance(new, dict):
            places.append({wrapper: {**new, "originals": make(OLD)}})
    else:
        places = [{**new, "originals": make(OLD)} if isinstance(new, dict) else new]
    for value in places:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = read(tmp_path / "alpha_overlay.pt", value)
        assert found.alphas == flat(NEW)
        assert found.originals == (flat(OLD) if isinstance(value, dict) else {})


def test_bfloat16_and_parameters(tmp_path: Path):
    values = f32([0.1, 0.2, 0.3])
    made = Pickle()
    made.code += b"}("
    made.dump(1).tensor(values, "BFloat16")
    made.dump(3).tensor(values, parameter=True)
    made.code += b"u"
    found = read(tmp_path / "x.pt", made)
    for layer, expected in ((1, rounded(values, "BF16")), (3, values)):
        assert [found.alphas[layer, e] for e in range(3)] == expected.tolist()


def test_other_ways_to_write_the_same(tmp_path: Path):
    """Big-endian storages; newer pickle protocols; views into a larger storage."""
    made = Pickle().dump({1: np.asarray([0.5, 1.5, 2.5], ">f4").astype("<f4")})
    made.storages = [np.asarray([0.5, 1.5, 2.5], ">f4").tobytes()]
    found = read(tmp_path / "big.pt", torch_zip(made, byteorder="big", folder="any name"))
    assert found.alphas == flat({1: [0.5, 1.5, 2.5]})

    made = Pickle()
    made.code = pickle.dumps({"alphas": {1: [0.5, 1.5, 2.5], 3: (1, 2, 3)}}, protocol=4)[:-1]
    found = read(tmp_path / "protocol4.pt", made)
    assert found.alphas == flat({1: [0.5, 1.5, 2.5], 3: [1.0, 2.0, 3.0]})

    made = Pickle().dump({1: f32([9, 9, 9])})
    made.storages = [f32([0, 1, 9, 2, 9, 3, 9]).tobytes()]
    size, offset, stride = b"J" + struct.pack("<i", 3), b"tQJ\0\0\0\0", b"(J\1\0\0\0t\x89"
    assert made.code.count(size) == 2 and offset in made.code and stride in made.code
    made.code = made.code.replace(size, b"J\7\0\0\0", 1)
    made.code = made.code.replace(offset, b"tQJ\1\0\0\0").replace(stride, b"(J\2\0\0\0t\x89")
    assert read(tmp_path / "view.pt", made).alphas == flat({1: [1.0, 2.0, 3.0]})


def test_an_empty_dictionary_of_versions_is_dropped(tmp_path: Path):
    """As a state_dict has one, in an attribute of its OrderedDict."""
    made = Pickle()
    made.code += b"ccollections\nOrderedDict\n)R("
    made.dump("layers.1.alpha").dump([1.0, 2.0, 3.0])
    made.code += b"u}"
    made.dump("_metadata").dump({})
    made.code += b"sb"
    assert read(tmp_path / "x.pt", made).alphas == flat({1: [1.0, 2.0, 3.0]})


# The reference cases


def table(cases: dict[str, Any], name: str) -> dict[tuple[int, int], float]:
    return {(int(n), int(e)): x for n, v in cases[name].items() for e, x in v.items()}


def test_reference_files():
    folder = require_shared() / "goldens/alpha_overlay_shapes"
    cases = json.loads((folder / "expected.json").read_text())
    assert len(cases["files"]) == 5 and len(cases["must_refuse"]) == 5
    for name in cases["files"]:
        found = read_alpha_overlay(folder / name, cases["n_layers"], cases["n_experts"])
        tolerance = cases["tolerance"].get(Path(name).stem, cases["tolerance"]["others"])
        for part in ("alpha", "originals"):
            stated = table(cases, part)
            read_ = found.alphas if part == "alpha" else found.originals
            assert set(read_) == set(stated)
            for place, value in stated.items():
                assert abs(read_[place] - value) <= tolerance, (name, place)
    for name in cases["must_refuse"]:
        with pytest.raises(CheckpointError, match=rf"^{name}: ") as error:
            read_alpha_overlay(folder / name, cases["n_layers"], cases["n_experts"])
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


# Within a checkpoint


@pytest.fixture
def built(tmp_path: Path) -> Built:
    """V3.2 with alphas by tensors, to which a test adds an alpha_overlay.pt."""
    return write_overlay(tmp_path / "o", tokenizer=False, experts=EXPERTS, layers=LAYERS)


def test_it_wins_over_tensors(built: Built):
    """Experts that it does not name keep their alpha."""
    torch_save(built.path / "alpha_overlay.pt", {"alphas": {1: {0: 0.25, 2: -0.5}}})
    overlay = open_overlay(built.path)
    assert overlay.form == "v3.2 + alpha_overlay.pt"
    found = overlay.alphas()
    np.testing.assert_array_equal(found[1], f32([0.25, built.alphas[1][1], -0.5]))
    np.testing.assert_array_equal(found[3], built.alphas[3])


def originals(built: Built, add: float = 0.0) -> dict[int, list[float]]:
    return {n: [float(a) + add for a in alphas] for n, alphas in built.alphas.items()}


def test_original_alphas(built: Built):
    stored = {"alphas": NEW, "originals": originals(built, 5e-4)}
    torch_save(built.path / "alpha_overlay.pt", stored)
    overlay = open_overlay(built.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in (1, 3):
            np.testing.assert_array_equal(overlay.alphas()[layer], f32(NEW[layer]))
            found = overlay.alphas("original")[layer]
            np.testing.assert_array_equal(found, f32(stored["originals"][layer]))


def test_originals_of_another_checkpoint(built: Built):
    stored = {"alphas": NEW, "originals": originals(built, 2e-3)}
    torch_save(built.path / "alpha_overlay.pt", stored)
    with pytest.warns(CheckpointWarning, match=r"alpha_overlay\.pt: made for another checkpoint"):
        open_overlay(built.path).alphas()


def test_original_alphas_without_originals(built: Built):
    """Then the checkpoint's own are the original ones."""
    torch_save(built.path / "alpha_overlay.pt", {"alphas": NEW})
    found = open_overlay(built.path).alphas("original")
    np.testing.assert_array_equal(found[1], built.alphas[1])


def test_original_alphas_without_an_overlay(built: Built):
    with pytest.raises(CheckpointError, match=r"there is no alpha_overlay\.pt"):
        open_overlay(built.path).alphas("original")


def test_it_may_be_given_as_a_file(built: Built, tmp_path: Path):
    torch_save(tmp_path / "mine.pt", {"alphas": {1: [3.0, 4.0, 5.0]}})
    found = open_overlay(built.path).alphas(tmp_path / "mine.pt")
    np.testing.assert_array_equal(found[1], f32([3, 4, 5]))
    np.testing.assert_array_equal(found[3], built.alphas[3])


def test_conversion(built: Built, tmp_path: Path):
    torch_save(built.path / "alpha_overlay.pt", {"alphas": NEW, "originals": originals(built)})
    for alpha, expected in ((None, f32(NEW[1])), ("original", built.alphas[1])):
        tier = tier_of(built.path, None, tmp_path / f"tier-{alpha}", alpha=alpha)
        stored = read_arrays(tier / "model-00001-of-00001.safetensors")
        np.testing.assert_array_equal(stored["model.layers.1.mlp.alpha"], expected)


def test_command(built: Built, tmp_path: Path):
    command = ["convert", str(built.path), "--tier", "f32", "--alpha", "original", "--out"]
    done = run(*command, tmp_path / "t", code=1)
    assert "there is no alpha_overlay.pt" in done.err
    torch_save(built.path / "alpha_overlay.pt", {"alphas": NEW, "originals": originals(built)})
    done = run(*command, tmp_path / "t")
    stored = read_arrays(tmp_path / "t/model-00001-of-00001.safetensors")
    np.testing.assert_array_equal(stored["model.layers.3.mlp.alpha"], built.alphas[3])
