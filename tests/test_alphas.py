"""Alphas: which source wins, what is meant by every shape of alpha.json, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlier_mlx import open_overlay
from outlier_mlx.checkpoints.alpha import find_alphas
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from tests import damage
from tests.builders import Built, write_overlay
from tests.goldens import require_shared
from tests.reference_reader import walk_alphas

LAYERS, EXPERTS = 5, 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay whose every layer is MoE, without alphas."""
    folder = tmp_path_factory.mktemp("alphas") / "plain"
    dims: dict[str, Any] = {"hidden": 16, "intermediate": 8, "expert_intermediate": 8, "vocab": 20}
    dims |= {"layers": LAYERS, "moe_layers": None, "experts": EXPERTS}
    return write_overlay(folder, alpha="none", tokenizer=False, **dims).path


@pytest.fixture
def sparse(tmp_path: Path) -> Built:
    """An overlay whose layers 1 and 3 are MoE, without alphas."""
    return write_overlay(tmp_path / "sparse", alpha="none", tokenizer=False)


def alphas(folder: Path, payload: Any = None, **kwargs: Any) -> np.ndarray:
    """Alphas (layers, experts) with `payload` as the folder's alpha.json, taken away after."""
    if payload is not None:
        (folder / "alpha.json").write_text(payload if isinstance(payload, str) else dump(payload))
    try:
        return np.stack(list(open_overlay(folder).alphas(**kwargs).values()))
    finally:
        (folder / "alpha.json").unlink(missing_ok=True)


def dump(payload: Any) -> str:
    return json.dumps(payload)


def table(expected: dict[str, dict[str, float]], default: float = 0.0) -> np.ndarray:
    values = np.full((LAYERS, EXPERTS), default, np.float32)
    for layer, experts in expected.items():
        for expert, value in experts.items():
            values[int(layer), int(expert)] = value
    return values


@pytest.mark.filterwarnings("ignore::outlier_mlx.errors.CheckpointWarning")
def test_every_shape_of_the_reference(plain: Path):
    """Where the reference drops or overwrites without a word, we refuse."""
    cases = json.loads((require_shared() / "goldens/alpha_json/cases.json").read_text())
    assert (cases["n_layers"], cases["n_experts"]) == (LAYERS, EXPERTS)
    refusals = 0
    for case in cases["cases"]:
        if case.get("strict") == "refuse":
            refusals += 1
            with pytest.raises(CheckpointError, match=r"^alpha\.json: "):
                alphas(plain, case["payload"])
            continue
        found = alphas(plain, case["payload"])
        np.testing.assert_array_equal(found, table(case["expected"]), err_msg=str(case))
    assert refusals == 3 and len(cases["cases"]) >= 20


KEYS = st.sampled_from(
    ["0", "1", "3", "layers", "layer_2", "layers.1", "Layer.0", "experts", "expert_3", "Experts.1"]
    + ["alpha", "values", "model.layers.4.mlp.alpha_values", "model.layers.1.mlp.experts.0.alpha"]
    + ["note", "expert", "layer", "my_layers_2_x", "xlayers_2", "per_expert", "0x"]
)
VALUES = st.one_of(st.floats(-2, 2, width=32), st.integers(-2, 2), st.none(), st.just("text"))
TREES = st.recursive(
    VALUES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(tree=st.one_of(st.dictionaries(KEYS, TREES, max_size=4), st.lists(TREES, max_size=5)))
@pytest.mark.filterwarnings("ignore::outlier_mlx.errors.CheckpointWarning")
def test_any_shape_is_walked_as_described(tree: Any):
    """Against a second walk written from the description; contradictions are refused."""
    stated: dict[tuple[int, int], set[float]] = {}
    for layer, expert, value in walk_alphas(tree):
        stated.setdefault((layer, expert), set()).add(value)
    sound = all(
        layer < LAYERS and expert < EXPERTS and len(values) == 1
        for (layer, expert), values in stated.items()
    )
    if not sound:
        with pytest.raises(CheckpointError):
            find_alphas(tree, LAYERS, EXPERTS, "alpha.json")
        return
    found = find_alphas(tree, LAYERS, EXPERTS, "alpha.json")
    assert found == {place: values.pop() for place, values in stated.items()}


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ('{"1": {"0": NaN}}', "NaN"),
        ('{"1": {"0": Infinity}}', "Infinity"),
        ('{"1": {"0": 1e999}}', "0: the number 1e999 is too large"),
        ('{"1": {"0": 1' + 400 * "0" + "}}", "of 401 digits is too large"),
        ('{"1": {"0": false}}', "False"),
        ('{"1": {"4": 1.0}}', "expert 4"),
        ('{"5": {"0": 1.0}}', "layer 5"),
        ('{"layer_99999999999": [1.0]}', "layer"),
        ('{"1": {"0": 1.0, "0": 2.0}}', "twice"),
        ('{"1": {"0": 1.0}, "layers": {"1": [2.0]}}', "two values"),
        ("{", "JSON"),
        ("", "JSON"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_refused(plain: Path, payload: str, said: str):
    with pytest.raises(CheckpointError) as error:
        alphas(plain, payload)
    message = str(error.value)
    assert message.startswith("alpha.json: ") and said in message and "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("text", ["0.5", " 1 ", "-3e-1", "1e39", "nan", "inf"])
@pytest.mark.parametrize("place", ["expert", "list", "layer"])
def test_numbers_as_text_are_refused(plain: Path, text: str, place: str):
    payload = {"expert": {"1": {"0": text}}, "list": {"1": [1.0, text]}, "layer": {"1": text}}
    with pytest.raises(CheckpointError, match=r"^alpha\.json: layer 1.*: alpha is the text "):
        alphas(plain, payload[place])


def test_other_texts_are_told_of_where_an_alpha_should_be(plain: Path):
    notes: dict[str, Any] = {"version": "3.2", "layers": {"note": "0.5 of them"}, "default": "1"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = alphas(plain, notes | {"1": {"0": 0.5, "note": "trained", "2": None}})
    np.testing.assert_array_equal(found, table({"1": {"0": 0.5}}))
    with pytest.warns(CheckpointWarning, match=r"layer 1, expert 3: the text 'off' is no alpha"):
        found = alphas(plain, {"1": {"0": 0.5, "3": "off"}})
    np.testing.assert_array_equal(found, table({"1": {"0": 0.5}}))


def test_a_number_of_no_layer_and_expert_warns(plain: Path):
    with pytest.warns(CheckpointWarning, match=r"alpha\.json: the number 1\.5"):
        found = alphas(plain, {"2": 1.5})
    np.testing.assert_array_equal(found, table({}))


def test_the_same_value_twice_is_no_contradiction(plain: Path):
    found = alphas(plain, {"1": {"0": 0.5}, "layer_1": [0.5, 0.25]})
    np.testing.assert_array_equal(found, table({"1": {"0": 0.5, "1": 0.25}}))


def test_defaults(plain: Path):
    """Unnamed experts have alpha 0 once there is any alpha.json, else 1."""
    np.testing.assert_array_equal(alphas(plain), table({}, 1.0))
    np.testing.assert_array_equal(alphas(plain, {}), table({}))
    np.testing.assert_array_equal(alphas(plain, {"2": {"1": 0.0}}), table({}))


def test_values_for_dense_layers_are_ignored(sparse: Built):
    values = np.arange(16).reshape(4, 4) / 8
    np.testing.assert_array_equal(alphas(sparse.path, values.tolist()), values[[1, 3]])


def test_a_stated_zero_is_zero(sparse: Built):
    np.testing.assert_array_equal(
        alphas(sparse.path, {"1": [0.0, 1, 1, 1], "3": [1, 1, 1, 1]}),
        [[0, 1, 1, 1], [1, 1, 1, 1]],
    )


def test_files_apply_in_the_order_of_their_paths(sparse: Built):
    files: dict[str, dict[str, float]] = {
        "b": {"1": 0.3},
        "a": {"0": 0.1, "3": 0.1},
        "a-b": {"0": 0.2},
        "a/z": {"0": 0.15},
    }
    for name, experts in files.items():
        (sparse.path / name).mkdir(parents=True, exist_ok=True)
        (sparse.path / name / "alpha.json").write_text(dump({"1": experts}))
    # a, a/z, a-b, alpha.json, b: each overwrites what those before it say.
    found = alphas(sparse.path, {"1": {"1": 0.9, "3": 0.4}})
    np.testing.assert_array_equal(found[0], np.array([0.2, 0.3, 0, 0.4], np.float32))
    np.testing.assert_array_equal(found[1], np.zeros(4))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_tensors_win_over_files(sparse: Built, dtype: str):
    damage.add_tensor(
        sparse.path, "model.layers.1.mlp.alpha_values", np.array([0.5, -0.25, 0, 2]), dtype
    )
    found = alphas(sparse.path, {"1": [9, 9, 9, 9], "3": {"0": 0.125}})
    np.testing.assert_array_equal(found, [[0.5, -0.25, 0, 2], [0.125, 0, 0, 0]])
    np.testing.assert_array_equal(alphas(sparse.path), [[0.5, -0.25, 0, 2], [1, 1, 1, 1]])


def test_a_tensor_may_be_of_one_expert(sparse: Built):
    for n, shape in ((0, ()), (2, (1,))):
        key = f"base.model.layers.3.mlp.experts.{n}.alpha"
        damage.add_tensor(sparse.path, key, np.full(shape, 0.5 + n, np.float32))
    np.testing.assert_array_equal(alphas(sparse.path)[1], [0.5, 1, 2.5, 1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.layers.1.mlp.alpha_values", [1.0, 1.0, 1.0]),
        ("model.layers.1.mlp.alpha_values", [[1.0, 1.0, 1.0, 1.0]]),
        ("model.layers.1.mlp.alpha_values", [1.0, np.nan, 1.0, 1.0]),
        ("model.layers.1.mlp.alpha_values", [1.0, np.inf, 1.0, 1.0]),
        ("model.layers.4.mlp.alpha_values", [1.0, 1.0, 1.0, 1.0]),
        ("alpha_values", [1.0, 1.0, 1.0, 1.0]),
        ("model.layers.1.mlp.experts.4.alpha", 1.0),
    ],
)
def test_tensors_refused(sparse: Built, key: str, value: Any):
    damage.add_tensor(sparse.path, key, np.array(value, np.float32))
    with pytest.raises(CheckpointError, match=f"^model.safetensors: {key}: "):
        alphas(sparse.path)


def test_an_override_wins_over_all(sparse: Built, tmp_path: Path):
    damage.add_tensor(
        sparse.path, "model.layers.1.mlp.alpha_values", np.array([0.5, 0.5, 0.5, 0.5], np.float32)
    )
    mine = tmp_path / "mine.json"
    mine.write_text(dump({"1": {"2": -1}, "3": {"0": 0.25}}))
    found = alphas(sparse.path, {"3": [0.125] * 4}, override=mine)
    np.testing.assert_array_equal(found, [[0.5, 0.5, -1, 0.5], [0.25, 0.125, 0.125, 0.125]])
    # It does not change what is meant by leaving an expert out.
    np.testing.assert_array_equal(alphas(sparse.path, override=mine)[1], [0.25, 1, 1, 1])
    mine.write_text(dump({"1": {"4": 1}}))
    with pytest.raises(CheckpointError, match=r"^mine\.json: layer 1, expert 4"):
        alphas(sparse.path, override=mine)
