"""What a conversion writes, file by file: the tier format that other people's tools rely on."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.errors import CheckpointWarning
from outlier_mlx.tiers.convert import convert_tier
from outlier_mlx.tiers.presets import Recipe
from outlier_mlx.writing import parts as parts_module
from outlier_mlx.writing.writer import ShardedWriter
from tests import builders, damage
from tests.builders import Built, write_base, write_overlay
from tests.engine import forward, load, pack_rows, random_experts, tier_name, tier_of
from tests.tensor_file import Stored, read_stored

ONE_FILE = "model-00001-of-00001.safetensors"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# config.json


def test_config(tmp_path: Path):
    """Names of the overlay's own become the usual ones, and what it may have left out is said."""
    built = write_overlay(tmp_path / "overlay", "real", tokenizer=False)
    renames = {
        "hidden_dim": "hidden_size",
        "intermediate_dim": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "max_seq_len": "max_position_embeddings",
    }
    changes = {new: built.config[old] for new, old in renames.items()}
    unsaid = [*renames.values(), "rms_norm_eps", "rope_theta", "tie_word_embeddings"]
    changes |= dict.fromkeys(unsaid, damage.REMOVE)
    changes |= {"auto_map": {"AutoModel": "x.py"}, "base_model_name_or_path": "/scratch/qwen"}
    changes |= {"torch_dtype": "float32", "v3_pipeline": {"a": 1}, "notes": "none"}
    changes |= {"quantization_config": {"quant_method": "awq"}, "sliding": 7}
    damage.edit_config(built.path, **changes)
    tier = tier_of(built.path, None, tmp_path / "tier", tier="q4", dtype="bfloat16")
    assert config_of(tier) == {
        "architectures": ["OutlierMoEForCausalLM"],
        "model_type": "outlier_moe",
        "model_file": "outlier_moe.py",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "vocab_size": 288,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "sliding": 7,
        "moe_layers": [1, 3],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 80,
        "ternary": {"format": "tq1_0_strided", "version": 2},
        "quantization": {"group_size": 64, "bits": 4, "mode": "affine"},
    }


def test_config_of_other_recipes(tmp_path: Path):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.9}
    options: dict[str, Any] = {"expert_intermediate": 160, "tokenizer": False, "yarn": yarn}
    built = write_overlay(tmp_path / "overlay", rope="new", top_k=9, tied=True, **options)
    plain = config_of(tier_of(built.path, None, tmp_path / "f32"))
    assert "quantization" not in plain and "rope_parameters" not in plain
    assert plain["rope_scaling"] == {"rope_type": "deepseek_yarn", **yarn}
    assert plain["rope_theta"] == built.dims.rope_theta and plain["tie_word_embeddings"] is True
    assert plain["num_experts_per_tok"] == 4  # no more than there are
    assert plain["dtype"] == "float32"
    affine = config_of(tier_of(built.path, None, tmp_path / "affine2", experts="affine2"))
    assert affine["ternary"] == {"format": "affine2", "version": 2}
    default = {"group_size": 64, "bits": 2, "mode": "affine"}
    others = {
        f"model.layers.{n}.mlp.switch_mlp.down_proj": default | {"group_size": 32} for n in (1, 3)
    }
    assert affine["quantization"] == default | others
    assert affine == plain | {key: affine[key] for key in ("ternary", "quantization")}


@pytest.mark.parametrize(
    ("stored", "dtype"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "bfloat16")]
)
def test_dtype_follows_the_checkpoint(stored: str, dtype: str, tmp_path: Path):
    built = write_overlay(tmp_path / "overlay", base_dtype=stored, tokenizer=False)
    tier = tier_of(built.path, None, tmp_path / "tier", tier="q4")
    assert config_of(tier)["dtype"] == dtype
    norm = read_stored(tier / ONE_FILE)["model.norm.weight"]
    assert norm.dtype == {"bfloat16": "BF16", "float16": "F16"}[dtype]


# Tensors


def expected_tensors(built: Built) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes in a float16 tier of an unquantized base."""
    dims = built.dims
    tensors = {tier_name(key, dims): ("F16", value.shape) for key, value in built.base.items()}
    for n in dims.routed_layers:
        prefix = f"model.layers.{n}.mlp."
        tensors[prefix + "gate.weight"] = ("F32", (dims.experts, dims.hidden))
        tensors[prefix + "alpha"] = ("F32", (dims.experts,))
        widths = {"gate": dims.hidden, "up": dims.hidden, "down": dims.expert_intermediate}
        for part, width in widths.items():
            out = dims.hidden if part == "down" else dims.expert_intermediate
            module = f"{prefix}switch_mlp.{part}_proj"
            row = -(-width // 80) * 16
            tensors[f"{module}.weight"] = ("U8", (dims.experts, out, row))
            tensors[f"{module}.scales"] = ("F32", (dims.experts, out))
    return tensors


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "real", "scale_form": "per_row", "tied": True, "scale_dtype": "F32"},
        {"hidden": 44, "heads": 2, "expert_intermediate": 37, "scale_form": ("0d",) * 3},
    ],
    ids=["v32", "real", "odd-widths"],
)
def test_tensors(options: dict[str, Any], tmp_path: Path):
    built = write_overlay(tmp_path / "overlay", base_dtype="F16", tokenizer=False, **options)
    found = read_stored(tier_of(built.path, None, tmp_path / "tier", tier="f16") / ONE_FILE)
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == expected_tensors(built)
    for key, value in built.base.items():
        np.testing.assert_array_equal(found[tier_name(key, built.dims)].array(), value)
    for n, router in built.routers.items():
        prefix = f"model.layers.{n}.mlp."
        np.testing.assert_array_equal(found[prefix + "gate.weight"].array(), router)
        np.testing.assert_array_equal(found[prefix + "alpha"].array(), built.alphas[n])
    for (n, expert, part), trits in built.trits.items():
        module = f"model.layers.{n}.mlp.switch_mlp.{part}_proj"
        rows = found[f"{module}.weight"].array()[expert]
        np.testing.assert_array_equal(rows, pack_rows(trits))
        scales = np.broadcast_to(built.scales[n, expert, part].reshape(-1), len(trits))
        np.testing.assert_array_equal(found[f"{module}.scales"].array()[expert], scales)


@pytest.mark.parametrize("width", [1, 37, 80, 5120, 13824])
def test_the_page_decodes_rows(width: int):
    """The code on the page of the format, run as it stands."""
    page = (Path(__file__).parents[1] / "docs" / "tier-format.md").read_text()
    names: dict[str, Any] = {"np": np}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    rows, _ = random_experts((2, width))
    for packed, trits in zip(pack_rows(rows), rows, strict=True):
        np.testing.assert_array_equal(names["trits"](packed, width), trits)


def test_experts_in_mlx_own_format(tmp_path: Path):
    """Codes are trit + 1, sixteen to a word from the lowest bits; scale s and bias -s."""
    widths: dict[str, Any] = {"hidden": 128, "expert_intermediate": 96}
    built = write_overlay(tmp_path / "overlay", scale_form="per_row", tokenizer=False, **widths)
    found = read_stored(tier_of(built.path, None, tmp_path / "tier", experts="affine2") / ONE_FILE)
    for (n, expert, part), trits in built.trits.items():
        module = f"model.layers.{n}.mlp.switch_mlp.{part}_proj"
        weight = found[f"{module}.weight"]
        assert (weight.dtype, weight.shape[1:]) == ("U32", (len(trits), trits.shape[1] // 16))
        words = weight.array()[expert][..., None] >> np.arange(0, 32, 2, dtype=np.uint32) & 3
        np.testing.assert_array_equal(words.reshape(trits.shape), trits + 1)
        group = {128: 128, 96: 32}[trits.shape[1]]
        scales = np.repeat(built.scales[n, expert, part], trits.shape[1] // group, axis=1)
        np.testing.assert_array_equal(found[f"{module}.scales"].array()[expert], scales)
        np.testing.assert_array_equal(found[f"{module}.biases"].array()[expert], -scales)


def test_many_shards_hold_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = write_overlay(tmp_path / "overlay", tokenizer=False)
    whole = tier_of(built.path, None, tmp_path / "whole", tier="q4")
    limit = 30_000
    small = partial(ShardedWriter, max_shard_bytes=limit)
    monkeypatch.setattr(parts_module, "ShardedWriter", small)
    tier = tier_of(built.path, None, tmp_path / "tier", tier="q4")
    shards = sorted(tier.glob("*.safetensors"))
    assert len(shards) > 4
    index = json.loads((tier / "model.safetensors.index.json").read_text())
    found: dict[str, Stored] = {}
    for number, shard in enumerate(shards, 1):
        assert shard.name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = read_stored(shard)
        assert {key for key, name in index["weight_map"].items() if name == shard.name} == {
            *tensors
        }
        assert sum(len(t.data) for t in tensors.values()) <= limit or len(tensors) == 1
        found |= tensors
    assert found == read_stored(whole / ONE_FILE)
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in found.values())
    np.testing.assert_array_equal(
        forward(load(tier), built.prompt()), forward(load(whole), built.prompt())
    )


# The files beside


def test_manifest(tmp_path: Path):
    overlay = write_overlay(tmp_path / "overlay", with_base=False).path
    base = write_base(tmp_path / "Qwen2.5-0.1B").path
    (base / "LICENSE").write_text("Apache-2.0\n")
    tier = tier_of(overlay, base, tmp_path / "tier", tier="q8", group_size=32)
    manifest = json.loads((tier / "tier.json").read_text())
    listed = manifest.pop("files")
    assert {p.name for p in tier.iterdir()} - set(listed) == {"README.md", "LICENSE", "tier.json"}
    for name, entry in listed.items():
        data = (tier / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    recipe = manifest.pop("recipe")
    stated = {"name": "q8-g32", "base_bits": 8, "group_size": 32}
    stated |= {"experts": "tq1_0", "dtype": "bfloat16"}
    assert recipe == recipe | stated
    assert manifest == {
        "format_version": 2,
        "producer": f"outlier-mlx {outlier_mlx.__version__}",
        "overlay": {"name": "overlay", "revision": None, "form": "v3.2"},
        "base": {"name": "Qwen2.5-0.1B", "revision": None},
    }
    for path in tier.iterdir():  # a tier may be published: it names no folder of this machine
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_tokenizer_and_friends_come_along(tmp_path: Path):
    """As a whole from the overlay if it has a tokenizer, else from the base."""
    overlay = write_overlay(tmp_path / "overlay", with_base=False, tokenizer=False).path
    base = write_base(tmp_path / "base").path
    builders.write_tokenizer(base, 288, special_list=True)
    damage.edit_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.py", None]})
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (overlay / "generation_config.json").write_text('{"eos_token_id": 7}')
    (base / "code.py").write_text("raise SystemExit")
    tier = tier_of(overlay, base, tmp_path / "tier")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tier / name).read_bytes() == (base / name).read_bytes()
    assert not (tier / "code.py").exists()
    tokenizer = json.loads((tier / "tokenizer_config.json").read_text())
    before = json.loads((base / "tokenizer_config.json").read_text())
    assert tokenizer == {
        **{k: v for k, v in before.items() if k not in ("auto_map", "extra_special_tokens")},
        "additional_special_tokens": before["extra_special_tokens"],
    }
    assert json.loads((tier / "generation_config.json").read_text()) == {"eos_token_id": 7}

    builders.write_tokenizer(overlay, 110, chat_template=False)
    other = tier_of(overlay, base, tmp_path / "other")
    assert (other / "tokenizer.json").read_bytes() == (overlay / "tokenizer.json").read_bytes()
    assert not (other / "chat_template.jinja").exists()  # it would not fit the other tokenizer


def test_without_a_tokenizer_it_warns(tmp_path: Path):
    built = write_overlay(tmp_path / "overlay", tokenizer=False)
    with pytest.warns(CheckpointWarning, match="no tokenizer"):
        outlier_mlx.convert(built.path, out=tmp_path / "tier")


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    built = write_overlay(tmp_path / "Outlier-1B")
    steps: list[tuple[int, int]] = []
    report = convert_tier(
        built.path, recipe=Recipe(group_size=128), progress=lambda *step: steps.append(step)
    )
    assert report.path == Path("Outlier-1B-q4-g128") and report.path.is_dir()
    assert report.form == "v3.2" and report.tokenizer and report.unquantized == []
    done, totals = zip(*steps, strict=True)
    assert list(done) == sorted(done) and set(totals) == {done[-1]}
    tensors = read_stored(report.path / ONE_FILE)
    rows = {row.kind: row for row in report.rows}
    counts = {key: value.size for key, value in built.base.items()}
    trits = sum(value.size for value in built.trits.values())
    routing = sum(value.size for value in [*built.routers.values(), *built.alphas.values()])
    assert rows["total"].nbytes == sum(len(tensor.data) for tensor in tensors.values())
    assert rows["total"].params == sum(counts.values()) + trits + routing
    assert (rows["experts"].params, rows["router"].params) == (trits, routing)
    shared = sum(n for key, n in counts.items() if ".mlp." in key and key.split(".")[2] in "13")
    assert rows["shared FFN"].params == rows["dense FFN"].params == shared
    stored = [len(t.data) for key, t in tensors.items() if ".switch_mlp." in key]
    assert rows["experts"].bits_per_weight == 8 * sum(stored) / trits
    assert report.rows[-1].kind == "total"
