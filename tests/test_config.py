"""The rules for config.json: names, defaults, contradictions."""

from __future__ import annotations

import math
from typing import Any

import pytest

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import Defaults, ModelConfig, parse_config
from tests.builders import Dims, model_config

PLAIN = model_config(Dims()) | {"n_experts": 4, "top_k": 2, "moe_layer_indices": [1, 3]}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
READ_YARN = YARN | {"rope_type": "yarn"}
del READ_YARN["type"]


def parse(*without: str, **changes: Any) -> ModelConfig:
    raw = {key: value for key, value in PLAIN.items() if key not in without}
    return parse_config(raw | changes, Defaults())


def refused(*parts: object, without: tuple[str, ...] = (), **changes: Any) -> None:
    """It is refused in one line that has all of `parts` in it."""
    with pytest.raises(CheckpointError) as error:
        parse(*without, **changes)
    message = str(error.value)
    assert "config.json" in message and "\n" not in message
    assert all(str(part) in message for part in parts), message


ALIASES = [
    ("hidden_dim", "hidden_size", "hidden", 128),
    ("intermediate_dim", "intermediate_size", "intermediate", 99),
    ("n_layers", "num_hidden_layers", "layers", 7),
    ("n_heads", "num_attention_heads", "heads", 2),
    ("n_kv_heads", "num_key_value_heads", "kv_heads", 1),
    ("max_seq_len", "max_position_embeddings", "max_positions", 4096),
    ("n_experts", "outlier_num_experts", "experts", 9),
    ("top_k", "outlier_num_experts_per_tok", "top_k", 3),
]


@pytest.mark.parametrize(("first", "second", "field", "value"), ALIASES)
def test_aliases(first: str, second: str, field: str, value: int):
    for names in ((first,), (second,), (first, second)):
        found = parse(first, second, **dict.fromkeys(names, value))
        assert getattr(found, field) == value
    assert getattr(parse(first, second, **{first: value, second: None}), field) == value
    disagreeing: dict[str, Any] = {first: value, second: value + 1}
    refused(first, second, value, value + 1, **disagreeing)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "vocab_size"])
def test_required(name: str):
    refused(name, "missing", without=(name,))


@pytest.mark.parametrize("value", [0, -1, 64.0, "64", True, [64], 2**31])
@pytest.mark.parametrize("name", ["hidden_size", "num_key_value_heads", "vocab_size", "top_k"])
def test_sizes_are_whole_numbers(name: str, value: Any):
    refused(name, **{name: value})


def test_defaults():
    found = parse_config(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": 288,
            "n_experts": 4,
        },
        Defaults(),
    )
    assert found.kv_heads == 4 and found.head_dim == 16
    assert found.rope_theta == 1e6 and found.rope_scaling is None
    assert found.rms_norm_eps == 1e-6 and found.max_positions == 32768
    assert found.top_k == 2 and found.moe_layers == (0, 1, 2) and found.tied is False


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 5},
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        {"num_attention_heads": 2, "num_key_value_heads": 4},
        {"hidden_size": 60},  # head width 15
    ],
    ids=str,
)
def test_heads_must_divide(changes: dict[str, Any]):
    refused("heads", **changes)


def test_no_separate_head_dim():
    assert parse(head_dim=999).head_dim == 16


@pytest.mark.parametrize("value", [0, -1e-6, "1e-6", True, [1e-6]])
def test_constants_are_positive_numbers(value: object):
    refused("rms_norm_eps", rms_norm_eps=value)
    refused("rope_theta", rope_theta=value)
    assert parse(rms_norm_eps=1).rms_norm_eps == 1.0


def test_top_k_is_at_most_the_number_of_experts():
    assert parse(top_k=9).top_k == 4


@pytest.mark.parametrize("value", [0, 1, "false", []])
def test_tied_is_true_or_false(value: object):
    assert parse(tie_word_embeddings=True).tied is True
    refused("tie_word_embeddings", tie_word_embeddings=value)


@pytest.mark.parametrize("kind", ["outlier_moe", "qwen2", "qwen2_moe"])
def test_model_types(kind: str):
    assert parse(model_type=kind).moe_layers == (1, 3)


@pytest.mark.parametrize("kind", ["mixtral", "gemma3", 7])
def test_other_model_types(kind: object):
    refused("model_type", kind, model_type=kind)


# MoE layers

LISTS = ("moe_layer_indices", "v3_2_moe_layers", "moe_layers")


@pytest.mark.parametrize("name", LISTS)
def test_moe_lists(name: str):
    others = [other for other in LISTS if other != name]
    assert parse(*LISTS, **{name: [2, 0]}).moe_layers == (0, 2)
    assert parse(*LISTS, **{name: []}).moe_layers == ()
    assert parse(*LISTS, **{name: [2, 0], others[0]: [0, 2]}).moe_layers == (0, 2)
    assert parse(*LISTS, **{name: [2], others[0]: None}).moe_layers == (2,)
    refused(name, others[0], **{name: [0, 2], others[0]: [0, 1]}, without=LISTS)
    refused(name, others[1], **{name: [], others[1]: [0, 1]}, without=LISTS)
    for bad in ([4], [-1], [1, 1], [True], [1.0], ["1"], {"0": 1}, "0", 1):
        refused(name, **{name: bad}, without=LISTS)


def test_no_list_makes_every_layer_moe():
    assert parse(*LISTS).moe_layers == (0, 1, 2, 3)


# RoPE


def test_rope_base():
    assert parse("rope_theta", rope_parameters={"rope_theta": 5e5}).rope_theta == 5e5
    both = {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000}}
    assert parse(**both).rope_theta == 5e5
    assert parse(rope_theta=5e5, rope_parameters={"rope_type": "default"}).rope_theta == 5e5
    assert parse(rope_theta=5e5, rope_parameters=None).rope_theta == 5e5
    refused(
        "rope_theta",
        "rope_parameters.rope_theta",
        1e4,
        1e6,
        rope_theta=1e4,
        rope_parameters={"rope_theta": 1e6},
    )


@pytest.mark.parametrize("kind", ["type", "rope_type", "both"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters", "both"])
def test_yarn(place: str, kind: str):
    extra = {"beta_fast": 16, "beta_slow": 2.0, "attention_factor": 0.7}
    kinds = ("type", "rope_type") if kind == "both" else (kind,)
    fields = {**YARN, **extra}
    del fields["type"]
    fields |= dict.fromkeys(kinds, "yarn")
    places = ("rope_scaling", "rope_parameters") if place == "both" else (place,)
    found = parse(**dict.fromkeys(places, fields))
    assert found.rope_scaling == READ_YARN | extra
    assert found.rope_theta == 1e6


def test_the_original_context_of_yarn():
    """As in transformers: by default, the context that the config says."""
    half = {"type": "yarn", "factor": 4.0}
    for found in (
        parse(rope_scaling=half),
        parse(rope_parameters=half | {"rope_theta": 1e6}),
        parse(rope_scaling=half | {"original_max_position_embeddings": None}),
    ):
        assert found.rope_scaling == READ_YARN | {"original_max_position_embeddings": 512}
    found = parse("max_position_embeddings", max_seq_len=128, rope_scaling=half)
    assert found.rope_scaling == READ_YARN | {"original_max_position_embeddings": 128}
    found = parse("max_position_embeddings", rope_scaling=half)
    assert found.rope_scaling == READ_YARN | {"original_max_position_embeddings": 32768}
    # Where Phi-3 has it, and where it counts more.
    found = parse(original_max_position_embeddings=256, rope_scaling=YARN)
    assert found.rope_scaling == READ_YARN | {"original_max_position_embeddings": 256}


def test_deepseeks_scale_of_yarn():
    """`mscale` over `mscale_all_dim`, as transformers computes it."""
    found = parse(rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}).rope_scaling
    assert found is not None
    expected = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert found["attention_factor"] == pytest.approx(expected, rel=1e-12)
    given = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 0.7}
    assert parse(rope_scaling=given).rope_scaling == READ_YARN | {"attention_factor": 0.7}
    assert parse(rope_scaling=YARN | {"mscale": 1.0}).rope_scaling == READ_YARN
    refused("truncate", rope_scaling=YARN | {"truncate": False})


def test_a_tiers_name_for_yarn():
    for name in ("yarn", "deepseek_yarn"):
        assert parse(rope_scaling=YARN | {"type": name}, ternary={}).rope_scaling == READ_YARN


def test_no_yarn():
    for scaling in (None, {}, {"type": "default"}, {"rope_type": "default"}):
        assert parse(rope_scaling=scaling).rope_scaling is None


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0},
        {"factor": 4.0, "type": ["yarn"]},
        YARN | {"type": "deepseek_yarn"},
        YARN | {"rope_type": "dynamic"},
        YARN | {"factor": 0},
        YARN | {"factor": -4.0},
        YARN | {"factor": None},
        YARN | {"original_max_position_embeddings": 0},
        YARN | {"attention_factor": 0.0},
        YARN | {"beta_slow": "1"},
        "yarn",
        [YARN],
    ],
    ids=str,
)
def test_other_scaling(scaling: object):
    refused(rope_scaling=scaling)
    refused(rope_parameters=scaling)


def test_two_scalings_that_disagree():
    refused(
        "rope_scaling",
        "rope_parameters",
        rope_scaling=YARN,
        rope_parameters=READ_YARN | {"factor": 2.0},
    )
