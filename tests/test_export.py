"""Exports: what comes back from them is what went into the tier, to the bit."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from outlier_mlx import open_overlay
from outlier_mlx.checkpoints.base import join, open_base
from outlier_mlx.checkpoints.export import FORMATS, export_tier
from outlier_mlx.errors import CheckpointError, OutlierError, OutputExistsError
from tests import damage
from tests.builders import PARTS, Built, write_base, write_overlay
from tests.engine import engine, forward, tier_of
from tests.folders import copy_writable
from tests.forms import BLOCKS, ODD, assert_same_contents, contents, written
from tests.goldens import assert_logits_close, golden
from tests.library import Library
from tests.program import run
from tests.tensor_file import read_arrays, read_stored

FOUND_AS = {"overlay": "v3.2", "packed": "monolith", "gguf-experts": "gguf"}
WEIGHTS = "model-00001-of-00001.safetensors"
# Padded rows, several scales, alphas of six digits, an alpha.json that leaves experts out.
SHAPES: dict[str, dict[str, Any]] = {
    "odd": ODD | {"scale_form": ("0d", "per_row", "one"), "alpha": "partial"},
    "blocks": BLOCKS | {"scale_form": "per_row", "alpha": "both"},
    "every layer": ODD | {"moe_layers": None, "tied": True, "base_dtype": "F32", "alpha": "none"},
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.25}


def expected(built: Built, *, base: bool = True) -> dict[str, np.ndarray]:
    """What the builder wrote; routers and alphas are float32 in a tier, scales whatever fits."""
    return {key: v for key, v in written(built).items() if base or key not in built.base}


# 256 divides the widths of one of them, which is what GGUF takes.
ROUND_TRIPS = [(f, s) for f in FORMATS for s in SHAPES if f != "gguf-experts" or s == "blocks"]


@pytest.mark.parametrize(("format", "shape"), ROUND_TRIPS)
def test_round_trip(format: str, shape: str, tmp_path: Path):
    """Overlay, tier, export, overlay: trits, scales, alphas, routers and base are the same."""
    built = write_overlay(tmp_path / "o", **({"base_dtype": "BF16"} | SHAPES[shape]))
    tier = tier_of(built.path, None, tmp_path / "t")
    done: list[tuple[int, int]] = []
    exported = export_tier(tier, tmp_path / "e", format, progress=lambda *p: done.append(p))
    assert exported.path == tmp_path / "e" and exported.base is None
    files = [path for path in exported.path.rglob("*") if path.is_file()]
    assert exported.nbytes == sum(path.stat().st_size for path in files)
    assert done[-1][0] == done[-1][1] and [d for d, _ in done] == sorted(d for d, _ in done)
    overlay = open_overlay(exported.path)
    assert overlay.form == FOUND_AS[format] and not overlay.unused
    assert_same_contents(contents(overlay), expected(built))
    assert (exported.path / "tokenizer.json").exists()
    table = json.loads((exported.path / "alpha.json").read_text())
    for layer, alphas in built.alphas.items():
        stated = [table[str(layer)][str(e)] for e in range(len(alphas))]
        np.testing.assert_array_equal(np.array(stated, np.float32), alphas)
    # The overlay itself is exported in the same way.
    direct = export_tier(built.path, tmp_path / "d", format)
    assert direct.base is None
    assert_same_contents(contents(open_overlay(direct.path)), contents(open_overlay(built.path)))
    # And once more, through a tier that is made from the export.
    again = tier_of(exported.path, None, tmp_path / "t2")
    assert (again / WEIGHTS).read_bytes() == (tier / WEIGHTS).read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads(
        (tier / "config.json").read_text()
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("experts", ["tq1_0", "affine2"])
def test_without_the_base(format: str, experts: str, tmp_path: Path):
    """A base in int4 is not the base any more; the export says which one it needs."""
    options = BLOCKS | {"seed": 3}
    built = write_overlay(tmp_path / "o", with_base=False, **options)
    base = write_base(tmp_path / "b", **options)
    tier = tier_of(built.path, base.path, tmp_path / "t", tier="q4", experts=experts)
    exported = export_tier(tier, tmp_path / "e", format)
    assert exported.base == "b"
    overlay = open_overlay(exported.path)
    assert_same_contents(contents(overlay), expected(built, base=False))
    with pytest.raises(CheckpointError, match=r"--base \(its config names 'b'\)"):
        join(overlay, None)
    whole = join(overlay, open_base(base.path))
    assert len(whole.base) == len(base.base)


@pytest.mark.parametrize("format", ["overlay", "packed"])
def test_yarn_and_logits_survive(format: str, tmp_path: Path):
    built = write_overlay(tmp_path / "o", **ODD, yarn=YARN, seed=2)
    model = engine(built.path, None, tmp_path / "t")
    exported = export_tier(tmp_path / "t", tmp_path / "e", format)
    stated = json.loads((exported.path / "config.json").read_text())
    assert stated["rope_scaling"] == YARN | {"type": "yarn", "rope_type": "yarn"}
    again = engine(exported.path, None, tmp_path / "t2")
    np.testing.assert_array_equal(forward(model, built.prompt()), forward(again, built.prompt()))


# Byte for byte what the published runtime writes


@pytest.mark.parametrize("name", ["packed_experts_dir", "packed_monolith"])
def test_packed_as_the_reference_packs(name: str, tmp_path: Path):
    case = golden(name)
    tier = tier_of(case.overlay, None, tmp_path / "t")
    exported = export_tier(tier, tmp_path / "e", "packed").path / "packed_experts"
    stated = {path.name: path for path in (case.overlay / "packed_experts").iterdir()}
    assert len(stated) == {"packed_experts_dir": 50, "packed_monolith": 3}[name]
    for path in stated.values():
        found = (exported / path.name).read_bytes()
        if path.suffix == ".bin":
            assert found == path.read_bytes(), path.name
    index = json.loads((exported / "index.json").read_text())
    assert index == json.loads(stated["index.json"].read_text())
    assert list(index) == list(json.loads(stated["index.json"].read_text()))
    meta = json.loads((exported / "meta.json").read_text())
    assert meta.pop("model_ref") == "checkpoint"
    expected_meta = json.loads(stated["meta.json"].read_text())
    del expected_meta["model_ref"]
    assert meta == expected_meta


@pytest.mark.parametrize("format", ["overlay", "packed"])
def test_golden_after_an_export(format: str, tmp_path: Path):
    """An overlay with a base, YaRN and newer alphas, exported whole: the same logits."""
    case = golden("v33_overlay_yarn")
    tier = tier_of(case.overlay, case.base, tmp_path / "t")
    exported = export_tier(tier, tmp_path / "e", format)
    model = engine(exported.path, None, tmp_path / "t2")
    assert_logits_close(forward(model, case.tokens), case.expected["logits"])


# What the files look like to others


def test_v32_keys(tmp_path: Path):
    built = write_overlay(tmp_path / "o", "real", **ODD, shards=2, scale_form="0d")
    exported = export_tier(tier_of(built.path, None, tmp_path / "t"), tmp_path / "e").path
    stored = read_stored(exported / WEIGHTS)
    assert stored["model.layers.1.mlp.router.weight"].shape == (4, 44)
    assert stored["model.layers.1.mlp.alpha_values"].dtype == "F32"
    assert stored["model.layers.3.mlp.experts.2.down_ternary"].dtype == "I8"
    scale = stored["model.layers.3.mlp.experts.2.down_scale"]
    assert (scale.dtype, scale.shape) == ("F16", (1,))
    assert set(built.base) < set(stored)
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "outlier_moe" and config["moe_layer_indices"] == [1, 3]
    assert (config["n_experts"], config["top_k"]) == (4, 2)
    assert not {"ternary", "model_file", "quantization", "num_experts"} & set(config)


def test_packed_keys_are_those_of_the_published_runtime(tmp_path: Path):
    built = write_overlay(tmp_path / "o", **ODD)
    tier = tier_of(built.path, None, tmp_path / "t")
    exported = export_tier(tier, tmp_path / "e", "packed").path
    stored = read_stored(exported / WEIGHTS)
    assert all(key.startswith(("base.model.", "base.lm_head.")) for key in stored)
    assert "base.model.layers.1.mlp.shared_expert.gate_W" in stored
    assert "base.model.layers.0.mlp.gate_proj.weight" in stored
    names = sorted(path.name for path in (exported / "packed_experts").iterdir())
    assert len(names) == 2 * 4 * 6 + 3 and "experts.bin" in names
    meta = json.loads((exported / "packed_experts/meta.json").read_text())
    assert meta["model_ref"] == "o" and meta["model_dir"] == "."


def test_gguf_as_its_package_reads_it(tmp_path: Path):
    built = write_overlay(tmp_path / "o", **BLOCKS, scale_form="per_row", with_base=False)
    base = write_base(tmp_path / "b", **BLOCKS)
    tier = tier_of(built.path, base.path, tmp_path / "t", tier="q4")
    exported = export_tier(tier, tmp_path / "e", "gguf-experts").path
    reader = gguf.GGUFReader(exported / "experts.gguf")
    assert reader.fields["general.architecture"].contents() == "outlier"
    assert reader.fields["outlier.expert_count"].contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {"blk.1.ffn_gate_inp.weight"} | {
        f"blk.1.ffn_{part}_exps.weight" for part in PARTS
    }
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    router = tensors.pop("blk.1.ffn_gate_inp.weight")
    np.testing.assert_array_equal(router.data.reshape(2, 256), built.routers[1])
    for name, tensor in tensors.items():
        assert tensor.tensor_type == gguf.GGMLQuantizationType.TQ1_0
        part = name.split("_")[1]
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for e in range(2):
            scale = built.scales[1, e, part].reshape(-1, 1)
            np.testing.assert_array_equal(weights[e], scale * built.trits[1, e, part])


def test_float32_scales_stay_exact(tmp_path: Path):
    built = write_overlay(tmp_path / "o", **ODD, scale_dtype="F32")
    tier = tier_of(built.path, None, tmp_path / "t")
    exported = export_tier(tier, tmp_path / "e")
    stored = read_stored(exported.path / WEIGHTS)
    assert stored["model.layers.1.mlp.experts.0.up_scale"].dtype == "F32"
    assert_same_contents(contents(open_overlay(exported.path)), expected(built))


def test_one_scale_for_a_matrix_only_where_all_matrices_have_one(tmp_path: Path):
    """So that every expert of a monolith has parts of the same length."""
    built = write_overlay(tmp_path / "o", **ODD, scale_form=("one", "per_row", "per_row"))
    same = np.full((44, 1), 0.5, np.float16)
    key = "model.layers.1.mlp.experts.2.down_scale"
    damage.replace_tensor(built.path, key, same)
    tier = tier_of(built.path, None, tmp_path / "t")
    exported = export_tier(tier, tmp_path / "e").path
    stored = read_stored(exported / WEIGHTS)
    assert stored[key].shape == (44, 1) and stored[key.replace("down", "gate")].shape == (1,)


# What is refused


def refused(tier: Path, out: Path, format: str, *said: str) -> None:
    """In one line, and nothing is left at or beside the output."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(OutlierError) as error:
        export_tier(tier, out, format)
    message = str(error.value)
    assert all(part in message for part in said), message
    assert "\n" not in message and sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize("format", ["packed", "gguf-experts"])
@pytest.mark.parametrize("scale", [0.1, 1e-9, 1e6])
def test_scales_that_float16_does_not_hold(format: str, scale: float, tmp_path: Path):
    built = write_overlay(tmp_path / "o", **BLOCKS, scale_dtype="F32", scale_form="0d")
    for n, e, part in built.scales:
        value = scale if (e, part) == (1, "up") else 0.5
        key = f"model.layers.{n}.mlp.experts.{e}.{part}_scale"
        damage.replace_tensor(built.path, key, np.float32(value))
    tier = tier_of(built.path, None, tmp_path / "t")
    said = ("up_proj.scales[1]", f"{float(np.float32(scale))!r}", "float16", "--format overlay")
    refused(tier, tmp_path / "e", format, *said)


def test_rows_that_blocks_do_not_divide(tmp_path: Path):
    built = write_overlay(tmp_path / "o", **(BLOCKS | {"hidden": 252, "heads": 2}))
    tier = tier_of(built.path, None, tmp_path / "t")
    said = ("hidden size 252", "256", "TQ1_0 and TQ2_0", "--format packed")
    refused(tier, tmp_path / "e", "gguf-experts", *said)


def test_experts_are_widened_to_whole_blocks(tmp_path: Path):
    """The experts that are read again have more neurons, and those do nothing."""
    built = write_overlay(tmp_path / "o", **(BLOCKS | {"expert_intermediate": 500}))
    tier = tier_of(built.path, None, tmp_path / "t")
    exported = export_tier(tier, tmp_path / "e", "gguf-experts")
    assert exported.notes == ("experts are 512 wide instead of 500: the rest is zeros",)
    wide, own = open_overlay(exported.path), open_overlay(built.path)
    for layer, members in own.experts.items():
        for expert, other in zip(members, wide.experts[layer], strict=True):
            for (_, matrix), (_, more) in zip(expert, other, strict=True):
                trits, padded = matrix.trits.read(), more.trits.read()
                out, width = trits.shape
                np.testing.assert_array_equal(padded[:out, :width], trits)
                assert not padded[out:].any() and not padded[:, width:].any()
                np.testing.assert_array_equal(more.row_scales()[:out], matrix.row_scales())


@pytest.fixture(scope="module")
def tier(library: Library) -> Path:
    return library.tier(library.overlay(**ODD))


def test_what_is_no_tier(tier: Path, tmp_path: Path):
    overlay = write_overlay(tmp_path / "o").path
    refused(overlay, tmp_path / "e", "gguf", "an overlay", "first outlier-mlx convert")
    base = write_base(tmp_path / "b").path
    refused(base, tmp_path / "e", "overlay", "neither a tier nor an overlay")
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", tmp_path / "e", "packed", "no config.json")
    refused(tier, tmp_path / "e", "onnx", "'onnx'", "overlay, packed, gguf-experts, gguf")


def test_a_dense_tier_has_nothing_to_export(tmp_path: Path):
    case = golden("v0_toy_dense")
    dense = tier_of(case.overlay, None, tmp_path / "t")
    refused(dense, tmp_path / "e", "overlay", "has no experts")


def test_an_output_that_exists(tier: Path, tmp_path: Path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e/mine").write_text("mine")
    with pytest.raises(OutputExistsError):
        export_tier(tier, tmp_path / "e")
    assert (tmp_path / "e/mine").read_text() == "mine"


SWITCH = "model.layers.1.mlp.switch_mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [("weight", (2, 5, 3), 1), ("weight", (2, 5, 11), 0), ("scales", (2, 5), np.nan)]
    + [("scales", (2, 5), -1.0)],
)
def test_damaged_tiers(name: str, at: tuple[int, ...], value: Any, tier: Path, tmp_path: Path):
    """Bytes that are no trits, padding that is not zero, scales that are none."""
    broken = copy_writable(tier, tmp_path / "t")
    array = read_arrays(broken / WEIGHTS)[f"{SWITCH}.{name}"].copy()
    array[at] = value
    damage.replace_tensor(broken, f"{SWITCH}.{name}", array)
    for format in ("overlay", "packed"):
        refused(broken, tmp_path / "e", format, f"{SWITCH}.{name}[2]")


def test_missing_and_misshapen_tensors(tier: Path, tmp_path: Path):
    broken = copy_writable(tier, tmp_path / "t")
    damage.drop_tensor(broken, f"{SWITCH}.scales")
    refused(broken, tmp_path / "e", "overlay", f"{SWITCH}.scales", "missing", "(4, 37)")
    broken = copy_writable(tier, tmp_path / "t2")
    damage.replace_tensor(broken, f"{SWITCH}.scales", np.ones((4, 36), np.float32))
    refused(broken, tmp_path / "e", "packed", f"{SWITCH}.scales", "F32 (4, 36)")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("weight", 2**32 - 1, "code 3"),
        ("scales", 0.5, "not the scales"),
        ("biases", 0.5, "not the"),
    ],
)
def test_affine_experts_that_are_not_ternary(name: str, value: float, said: str, tmp_path: Path):
    built = write_overlay(tmp_path / "o", **BLOCKS)
    made = tier_of(built.path, None, tmp_path / "t", experts="affine2")
    array = read_arrays(made / WEIGHTS)[f"{SWITCH}.{name}"].copy()
    array[1, 5, 1] = value
    damage.replace_tensor(made, f"{SWITCH}.{name}", array)
    refused(made, tmp_path / "e", "overlay", SWITCH, said)


def test_a_disk_that_is_too_small(tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"total": 1, "used": 1, "free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    refused(tier, tmp_path / "e", "packed", "the export takes", "are free")


def test_an_error_midway_leaves_nothing(
    tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("outlier_mlx.checkpoints.export_packed.rows_to_flat", fail)
    refused(tier, tmp_path / "e", "packed", "cannot write: No space left on device")


# The command, and what it costs


def test_command(tier: Path, tmp_path: Path):
    done = run("export", tier, "--format", "packed", "--out", tmp_path / "e")
    assert done.out == ""
    assert "packed" in done.err and "with the base" in done.err
    assert open_overlay(tmp_path / "e").form == "monolith"
    done = run("export", tier, "--out", tmp_path / "e", code=1)
    assert done.err.startswith("error: ") and "exists" in done.err
    run("export", tier, code=2)


@pytest.mark.parametrize("format", FORMATS)
def test_memory_is_a_few_slabs(format: str, tmp_path: Path):
    """A matrix of 3.9 million trits goes through in slabs of one."""
    options = BLOCKS | {"hidden": 1280, "expert_intermediate": 3072, "experts": 1, "vocab": 64}
    built = write_overlay(tmp_path / "o", **options, heads=4, top_k=1, tokenizer=False)
    made = tier_of(built.path, None, tmp_path / "t", tier="q4")
    tracemalloc.start()
    export_tier(made, tmp_path / "e", format)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000, peak
