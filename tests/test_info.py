"""What `info` says is exact: parameters and bytes of overlays, bases and tiers of every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.checkpoints.info import Info, inspect
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage.safetensors import TensorRef
from tests.builders import Built, write_base, write_overlay
from tests.damage import add_tensor, edit_config, replace_tensor
from tests.folders import copy_writable
from tests.library import Library
from tests.program import assert_refused, run
from tests.tensor_file import read_stored

HIDDEN, FFN, WIDTH, VOCAB, LAYERS, MOE, EXPERTS, TOP_K = 64, 128, 96, 288, 4, 2, 4, 2
KV_WIDTH = 32
DIMS: dict[str, Any] = {"expert_intermediate": WIDTH}

ATTENTION = LAYERS * (2 * HIDDEN * HIDDEN + 2 * KV_WIDTH * HIDDEN + HIDDEN + 2 * KV_WIDTH)
PARAMS = {
    "embeddings": VOCAB * HIDDEN,
    "attention": ATTENTION,
    "dense FFN": (LAYERS - MOE) * 3 * HIDDEN * FFN,
    "shared FFN": MOE * 3 * HIDDEN * FFN,
    "experts": MOE * EXPERTS * 3 * HIDDEN * WIDTH,
    "router": MOE * (EXPERTS * HIDDEN + EXPERTS),
    "norms": (2 * LAYERS + 1) * HIDDEN,
    "head": VOCAB * HIDDEN,
}
TOTAL = sum(PARAMS.values())


@pytest.fixture(scope="module")
def overlay(library: Library) -> Built:
    return library.overlay(**DIMS)


def params(info: Info) -> dict[str, int]:
    assert info.rows[-1].kind == "total"
    assert info.rows[-1].params == info.params == sum(row.params for row in info.rows[:-1])
    assert info.rows[-1].nbytes == info.nbytes == sum(row.nbytes for row in info.rows[:-1])
    return {row.kind: row.params for row in info.rows[:-1]}


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors, as another reader finds them."""
    files = folder.rglob("*.safetensors")
    return sum(len(tensor.data) for file in files for tensor in read_stored(file).values())


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: TensorRef, *_: Any) -> None:
        raise AssertionError(f"{self.where} was read")

    monkeypatch.setattr(TensorRef, "read", read)


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("form", ["v32", "real"])
def test_an_overlay_with_its_base(form: str, tmp_path: Path) -> None:
    path = write_overlay(tmp_path / "overlay", form, scale_form="per_row", **DIMS).path
    info = inspect(path)
    assert (info.name, info.kind) == ("overlay", "overlay")
    assert info.form == {"v32": "v3.2", "real": "real"}[form]
    assert params(info) == PARAMS
    assert info.nbytes == stored_bytes(path)
    assert info.active_params == TOTAL - PARAMS["experts"] * (EXPERTS - TOP_K) // EXPERTS
    assert info.kv_bytes_per_token == 2 * 2 * LAYERS * KV_WIDTH
    assert (info.layers, info.moe_layers) == (4, 2)
    assert (info.experts, info.experts_per_token) == (4, 2)
    # int8 trits and a float16 scale a row; bfloat16 routers and float32 alphas
    sizes = {row.kind: row.nbytes for row in info.rows}
    rows = MOE * EXPERTS * (2 * WIDTH + HIDDEN)
    assert sizes["experts"] == PARAMS["experts"] + 2 * rows
    assert sizes["router"] == MOE * (2 * EXPERTS * HIDDEN + 4 * EXPERTS)


@pytest.mark.usefixtures("headers_only")
def test_an_overlay_without_base(tmp_path: Path) -> None:
    path = write_overlay(tmp_path / "overlay", with_base=False, alpha="json", **DIMS).path
    info = inspect(path)
    assert params(info) == {
        "experts": PARAMS["experts"],
        "router": PARAMS["router"] - MOE * EXPERTS,
    }
    assert info.nbytes == stored_bytes(path)


def test_experts_that_a_token_uses(tmp_path: Path) -> None:
    """Whichever of its names the number has, and also where it is more than there are."""
    for number, (form, top_k) in enumerate([("real", 1), ("v32", 3), ("v32", 9)]):
        path = write_overlay(tmp_path / str(number), form, top_k=top_k, **DIMS).path
        used = min(top_k, EXPERTS)
        idle = PARAMS["experts"] * (EXPERTS - used) // EXPERTS
        assert inspect(path).active_params == TOTAL - idle
        tier = outlier_mlx.convert(path, out=tmp_path / f"tier-{number}")
        assert inspect(tier).active_params == TOTAL - idle


@pytest.mark.usefixtures("headers_only")
def test_a_plain_base(tmp_path: Path) -> None:
    path = write_base(tmp_path / "base", shards=2).path
    info = inspect(path)
    assert (info.kind, info.form) == ("model", "qwen2")
    dense = PARAMS["dense FFN"] + PARAMS["shared FFN"]
    plain = {kind: PARAMS[kind] for kind in ("embeddings", "attention", "norms", "head")}
    assert params(info) == plain | {"dense FFN": dense}
    assert info.active_params == info.params
    assert info.nbytes == stored_bytes(path) == 2 * info.params
    assert (info.experts, info.experts_per_token, info.moe_layers) == (0, None, 0)
    assert "experts:" not in run("info", path).out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tier": "q8", "group_size": 32},
        {"tier": "f32"},
        {"tier": "bf16"},
        {"experts": "affine2"},
        {"base_bits": "none", "experts": "affine2", "dtype": "float16"},
        {"tier": "q4-mixed"},
    ],
    ids=str,
)
def test_tiers_have_the_parameters_of_their_overlay(
    overlay: Built, tmp_path: Path, options: dict[str, Any]
) -> None:
    tier = outlier_mlx.convert(overlay.path, out=tmp_path / "tier", **options)
    info = inspect(tier)
    assert info.kind == "tier"
    assert info.form == ("affine2" if "experts" in options else "tq1_0_strided")
    assert params(info) == PARAMS
    assert info.active_params == TOTAL - PARAMS["experts"] * (EXPERTS - TOP_K) // EXPERTS
    assert info.nbytes == stored_bytes(tier)
    assert info.kv_bytes_per_token == 2 * 2 * LAYERS * KV_WIDTH


def test_a_portable_tier(tmp_path: Path) -> None:
    """It stores biases that are zero, and no alphas: they are folded into the experts."""
    path = write_overlay(tmp_path / "overlay", moe_layers=None, expert_intermediate=64).path
    tier = outlier_mlx.convert(path, out=tmp_path / "tier", portable=True)
    ours, plain = inspect(path), inspect(tier)
    zeros = {
        "attention": LAYERS * HIDDEN,
        "shared FFN": LAYERS * (2 * FFN + HIDDEN),
        "experts": LAYERS * EXPERTS * (2 * 64 + HIDDEN),
        "router": -LAYERS * EXPERTS,
    }
    assert params(plain) == {kind: n + zeros.get(kind, 0) for kind, n in params(ours).items()}
    assert plain.active_params == plain.params - params(plain)["experts"] // 2
    assert plain.nbytes == stored_bytes(tier)
    assert (plain.experts, plain.experts_per_token) == (4, 2)


def test_bits_per_weight(overlay: Built, tmp_path: Path) -> None:
    info = inspect(outlier_mlx.convert(overlay.path, out=tmp_path / "tier"))
    rows = {row.kind: row for row in info.rows}
    # 4 bits, and two bfloat16 numbers for 64 weights
    assert rows["head"].bits_per_weight == rows["shared FFN"].bits_per_weight == 4.5
    # gate and up: 64 trits in 16 bytes; down: 96 in 32; float32 scales
    packed = 2 * WIDTH * (16 + 4) + HIDDEN * (32 + 4)
    assert rows["experts"].nbytes == MOE * EXPERTS * packed
    assert rows["experts"].bits_per_weight == 8 * packed / (3 * HIDDEN * WIDTH)
    assert info.quantization == {"bits": 4, "group_size": 64}


def test_json(overlay: Built) -> None:
    result = run("info", overlay.path, "--json")
    assert result.err == ""
    read = result.json
    assert read == inspect(overlay.path).as_json()
    assert read["params"] == TOTAL
    assert read["rows"][-1] == {
        "kind": "total",
        "params": TOTAL,
        "nbytes": read["nbytes"],
        "bits_per_weight": 8 * read["nbytes"] / TOTAL,
    }


def test_json_has_numbers_as_numbers(overlay: Built, tmp_path: Path) -> None:
    tier = outlier_mlx.convert(overlay.path, out=tmp_path / "tier")
    (tier / "README.md").write_text("---\nlicense: [apache-2.0, mit]\n---\n# A model\n")
    read = run("info", tier, "--json").json
    del read["rows"]
    assert {key: value for key, value in read.items() if not isinstance(value, int)} == {
        "name": "tier",
        "kind": "tier",
        "form": "tq1_0_strided",
        "architecture": "outlier_moe",
        "base_architecture": "qwen2",
        "dtype": "bfloat16",
        "quantization": {"bits": 4, "group_size": 64},
        "licence": "apache-2.0, mit",
    }
    numbers = ("layers", "moe_layers", "experts", "experts_per_token", "vocab", "context_length")
    assert [read[name] for name in numbers] == [LAYERS, MOE, EXPERTS, TOP_K, VOCAB, 512]
    assert read["chat_template"] is True


CARDS = {
    "license: other\nlicense_name: research-only": "research-only",
    "license: other": "other",
    "tags: [a]": None,
}


@pytest.mark.parametrize("card", CARDS)
def test_a_licence_as_the_card_states_it(card: str, tmp_path: Path) -> None:
    path = write_base(tmp_path / "base").path
    (path / "README.md").write_text(f"---\n{card}\n---\n")
    assert inspect(path).licence == CARDS[card]
    assert f"licence: {CARDS[card] or 'not stated'}\n" in run("info", path).out


def test_where_a_chat_template_may_be(tmp_path: Path) -> None:
    path = write_base(tmp_path / "base").path
    for file in path.glob("*token*"):
        file.unlink()
    assert not inspect(path).chat_template
    assert "chat template: no\n" in run("info", path).out
    (path / "tokenizer_config.json").write_text('{"chat_template": ""}')
    assert not inspect(path).chat_template
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert inspect(path).chat_template
    (path / "tokenizer_config.json").unlink()
    (path / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect(path).chat_template
    assert "chat template: yes\n" in run("info", path).out


def test_text(overlay: Built) -> None:
    result = run("info", overlay.path)
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == "overlay: overlay (v3.2)"
    active = TOTAL - PARAMS["experts"] // 2
    assert f"parameters: {TOTAL / 1e3:.1f} K, of which a token uses {active / 1e3:.1f} K" in lines
    weights = inspect(overlay.path).nbytes
    assert (
        f"memory: {weights / 1e3:.1f} kB of weights, and 262.1 kB of KV cache for 512 tokens in"
        " 16 bits" in lines
    )
    assert [line.split()[0] for line in lines if line[:4] in ("tota", "expe")][-1] == "total"


ODD: dict[str, dict[str, Any]] = {
    "quantization is a list": {"quantization": [4, 64]},
    "bits are text": {"quantization": {"bits": "four", "group_size": 64}},
    "no bits": {"quantization": {"bits": 0, "group_size": 64}},
    "ternary is text": {"ternary": "tq1_0_strided"},
    "experts are text": {"num_experts": "many"},
    "experts are a list": {"num_experts": [4]},
    "no width": {"moe_intermediate_size": None},
}


@pytest.mark.parametrize("name", ODD)
def test_a_config_that_makes_no_sense(
    library: Library, overlay: Built, tmp_path: Path, name: str
) -> None:
    tier = copy_writable(library.tier(overlay, tier="q4"), tmp_path / "tier")
    edit_config(tier, **ODD[name])
    assert_refused(run("info", tier, code=1), "error: tier: config.json ")


def test_damage_is_named(tmp_path: Path) -> None:
    path = write_overlay(tmp_path / "overlay", **DIMS).path
    key = "model.layers.1.mlp.experts.0.up_ternary"
    replace_tensor(path, key, np.zeros((3, 3), np.int8))
    with pytest.raises(CheckpointError, match=key):
        inspect(path)


def test_other_models_are_counted_too(tmp_path: Path) -> None:
    """A config that names none of what Qwen2 needs: counts need none of it."""
    path = write_base(tmp_path / "base").path
    (path / "config.json").write_text('{"model_type": "other"}')
    add_tensor(path, "some.other.weight", np.zeros((3, 5), np.uint8))
    info = inspect(path)
    assert (info.form, info.kv_bytes_per_token) == ("other", None)
    assert info.params == info.rows[-1].params == (stored_bytes(path) - 15) // 2 + 15
    assert "KV cache" not in run("info", path).out
