"""Configs of plain models: both spellings of RoPE and dtype mean the same to `load`."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load_model as stock_load_model

from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.spelling import normalised

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
TOKENS = mx.array([list(range(40))])


def write_llama(folder: Path, **rope: Any) -> mx.array:
    """A tiny llama of theta 1e6 with these fields in its config; its true logits."""
    folder.mkdir()
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(LLAMA | {"rope_theta": 1e6}))
    flat = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    weights = {name: value * 4 if "proj" in name else value for name, value in flat}
    model.load_weights(list(weights.items()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(LLAMA | rope))
    return model(TOKENS)


def test_a_theta_that_stock_mlx_lm_misses_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    expected = np.array(
        write_llama(folder, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    )
    ours, config = load_model(folder)
    np.testing.assert_array_equal(np.array(ours(TOKENS)), expected)
    assert config["rope_theta"] == 1e6
    stock, _ = stock_load_model(folder)
    assert np.abs(np.array(stock(TOKENS)) - expected).max() > 0.01


def test_old_and_new_names_are_equal() -> None:
    old = {
        "rope_theta": 5e5,
        "torch_dtype": "bfloat16",
        "vocab_size": 9,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
    }
    nested = {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4, "partial_rotary_factor": 0.5}
    new = {"rope_parameters": nested, "dtype": "bfloat16", "vocab_size": 9}
    before = json.dumps(new)
    result = normalised(new)
    assert json.dumps(new) == before
    assert result["rope_theta"] == 5e5 and result["partial_rotary_factor"] == 0.5
    assert result["rope_scaling"]["rope_type"] == "yarn" and result["rope_scaling"]["factor"] == 4
    assert result["dtype"] == result["torch_dtype"] == normalised(old)["dtype"] == "bfloat16"
    assert normalised(result) == result
    plain = {"rope_theta": 1e4, "rope_scaling": None, "dtype": "float16", "torch_dtype": "float16"}
    assert normalised(plain) == plain
    by_layer = {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}}
    assert normalised(by_layer) == by_layer


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000.0, but"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16'"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "linear", "factor": 4},
            },
            "rope_scaling is .*2.*rope_parameters is .*4",
        ),
        ({"rope_parameters": 3}, "rope_parameters is not an object"),
        ({"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": 3}, "rope_scaling is not"),
    ],
)
def test_contradictions_are_errors(config: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{words}"):
        normalised(config)


def test_a_contradiction_ends_loading_in_one_line(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama", rope_theta=1e4, rope_parameters={"rope_theta": 1e6})
    with pytest.raises(CheckpointError, match=r"llama/config\.json: rope_theta is"):
        load_model(tmp_path / "llama")
