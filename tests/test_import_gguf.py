"""GGUF models imported: weights bit for bit, logits, files, and what is told of losses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf.quants import dequantize
from mlx.utils import tree_flatten
from mlx_lm import stream_generate
from mlx_lm.utils import load as stock_load
from mlx_lm.utils import load_model as stock_load_model

import outlier_mlx
from kernels.emulator import virtual_metal
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.engine.generate import Options, generate_text
from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.needs import Use
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.paged import store_of
from outlier_mlx.engine.plan import plan
from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports import Imported, import_model
from outlier_mlx.runtime.switch import TernarySwitchLinear
from outlier_mlx.storage.gguf import read_gguf
from outlier_mlx.storage.rounding import narrowed, widened
from tests.gguf_builder import Model, build
from tests.goldens import require_shared
from tests.hub import Hub, opened
from tests.importing import assert_same_weights, stored_weights, unquantized_logits
from tests.metal import needs_emulator
from tests.tensor_file import read_arrays

K_SIZES: dict[str, Any] = {"hidden": 256, "width": 256, "layers": 1}
TOKENS = [1, 260, 5, 9, 261, 30, 77, 200]


def imported(model: Model, folder: Path, **how: Any) -> tuple[Imported, dict[str, Any]]:
    """Import a model from one file; what was told, and the config."""
    path = model.write(folder / "model.gguf")
    done = import_model(path, folder / "out", **how)
    return done, json.loads((done.path / "config.json").read_text())


def logits(model: nn.Module) -> np.ndarray:
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([TOKENS])))


def assert_logits(found: np.ndarray, expected: np.ndarray, atol: float = 2e-5) -> None:
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=atol)


DENSE: dict[str, dict[str, str]] = {
    "F32": {},
    "F16": dict.fromkeys(("embed", "attn", "gate", "up", "down", "output"), "F16"),
    "BF16": dict.fromkeys(("embed", "attn", "gate", "up", "down", "output"), "BF16"),
    "Q4_0, Q8_0": {"embed": "Q8_0", "attn": "Q4_0", "gate": "Q4_1", "up": "Q5_0", "down": "Q5_1"},
    "Q4_K, Q5_K": {"embed": "Q4_K", "attn": "Q4_K", "gate": "Q5_K", "up": "Q4_K", "down": "Q5_K"},
    "TQ1_0, TQ2_0": {"attn": "TQ1_0", "gate": "TQ2_0", "up": "TQ1_0", "down": "TQ2_0"},
}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("case", DENSE)
def test_dense(case: str, arch: str, tmp_path: Path):
    sizes = K_SIZES if case[0] in "QT" else {}
    # Qwen3's heads have a width of their own: here twice that of the others.
    wide = {"head_dim": 2 * sizes.get("hidden", 64) // 4} if arch == "qwen3" else {}
    model = build(arch=arch, kinds=DENSE[case], vocab=320, tied=arch == "qwen2", **sizes | wide)
    stock: dict[str, Any] = {"experts": "affine2"} if case.startswith("TQ") else {}
    done, config = imported(model, tmp_path, **stock)
    found = assert_same_weights(done.path, model.weights)
    assert config["model_type"] == arch
    assert config["tie_word_embeddings"] is (arch == "qwen2")
    assert_logits(logits(found), unquantized_logits(config, model.weights, TOKENS))
    assert not any("off by" in note for note in done.notes)


EXPERTS: dict[str, tuple[str, dict[str, str]]] = {
    "stacked": ("stacked", {"gate": "Q4_0", "up": "Q4_0", "down": "Q8_0", "attn": "Q8_0"}),
    "split": ("split", {"gate": "F16", "up": "F16", "down": "Q4_1", "router": "F16"}),
    "fused": ("fused", {"gate": "Q5_0", "down": "Q4_K", "embed": "F16", "output": "BF16"}),
    "mixed affine": ("split", {"gate": "Q4_0", "gate.1": "Q8_0", "up": "Q5_1", "up.2": "Q4_1"}),
    "mixed with floats": ("split", {"down": "Q4_0", "down.1": "F16", "down.2": "F32"}),
    "mixed ternary": ("split", {"up": "TQ1_0", "up.1": "Q4_K", "down": "TQ2_0", "down.0": "TQ1_0"}),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts(case: str, tmp_path: Path):
    layout, kinds = EXPERTS[case]
    model = build(experts=3, layout=layout, kinds=kinds, **K_SIZES)
    done, config = imported(model, tmp_path)
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 3)
    assert config["num_experts_per_tok"] == 2
    found = assert_same_weights(done.path, model.weights)
    assert_logits(logits(found), unquantized_logits(config, model.weights, TOKENS))


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("layout", ["stacked", "split", "fused"])
def test_ternary_experts(kind: str, layout: str, tmp_path: Path):
    kinds = {"gate": kind, "up": kind, "down": kind, "attn": "Q8_0"}
    model = build(experts=3, layout=layout, kinds=kinds, **K_SIZES | {"layers": 2})
    done, config = imported(model, tmp_path)
    assert config["ternary_switch"] == {
        "format": "tq1_0_strided",
        "version": 2,
        "layers": [0, 1],
    }
    assert any("--experts affine2" in note for note in done.notes)
    assert "outlier-mlx generate" in (done.path / "README.md").read_text()
    counted = {row.kind: row.params for row in inspect(done.path).rows}
    assert counted["experts"] == 2 * 3 * 3 * 256 * 256
    found, _ = load_model(done.path)
    scales = [m.scales for m in found.modules() if isinstance(m, TernarySwitchLinear)]
    assert len(scales) == 6 and all(s.dtype == mx.float32 for s in scales)
    expected = unquantized_logits(config, model.weights, TOKENS)
    assert_logits(np.array(found(mx.array([TOKENS]))), expected)
    found.set_dtype(mx.float16)
    assert all(m.scales.dtype == mx.float32 for m in found.modules() if hasattr(m, "prepared"))
    with pytest.raises(ValueError, match="ternary_mixtral not supported"):
        stock_load_model(done.path)
    stock = import_model(tmp_path / "model.gguf", tmp_path / "stock", experts="affine2")
    assert "ternary_switch" not in json.loads((stock.path / "config.json").read_text())
    assert_logits(logits(assert_same_weights(stock.path, model.weights)), expected)


def test_ternary_experts_can_be_paged(tmp_path: Path):
    kinds = {"gate": "TQ1_0", "up": "TQ1_0", "down": "TQ1_0"}
    model = build(experts=3, layout="stacked", kinds=kinds, **K_SIZES | {"layers": 2})
    folder = imported(model, tmp_path)[0].path
    planned = plan(folder, Use(50), ExpertMemory.parse("70%"))
    assert planned.paged is not None and (planned.paged.total, planned.slots) == (6, 4)
    paged, _ = load_model(folder, expert_memory=planned)
    assert store_of(paged) is not None
    assert np.array_equal(logits(paged), logits(load_model(folder)[0]))


def test_ternary_experts_of_version_1(tmp_path: Path):
    kinds = {"gate": "TQ1_0", "up": "TQ1_0", "down": "TQ1_0"}
    model = build(experts=3, layout="stacked", kinds=kinds, **K_SIZES | {"layers": 1})
    done, config = imported(model, tmp_path)
    old = {"format": "tq1_0_rows", "version": 1, "layers": [0]}
    (done.path / "config.json").write_text(json.dumps(config | {"ternary_switch": old}))
    with pytest.raises(CheckpointError, match=r"by outlier-mlx 0\.1: .* import the model, again"):
        load_model(done.path)


@needs_emulator
def test_ternary_experts_through_the_kernels(tmp_path: Path):
    """On Metal, experts stay packed: a kernel routes, two decode them, and no copy is made."""
    kinds = {"gate": "TQ1_0", "up": "TQ2_0", "down": "TQ1_0"}
    model = build(experts=3, kinds=kinds, **K_SIZES)
    done, config = imported(model, tmp_path)
    with virtual_metal(count=False) as metal:
        found, _ = load_model(done.path)
        ternary = [m for m in found.modules() if isinstance(m, TernarySwitchLinear)]
        assert len(ternary) == 3 and all(m.prepared is None for m in ternary)
        metal.clear()
        assert_logits(
            np.array(found(mx.array([TOKENS]))), unquantized_logits(config, model.weights, TOKENS)
        )
        assert metal.names == ["tq1_0_route", "tq1_0_swiglu", "tq1_0_down"]


def test_ternary_rows_without_one_scale(tmp_path: Path):
    kinds = {"gate": "TQ1_0", "up": "TQ1_0", "down": "TQ1_0"}
    sizes = K_SIZES | {"width": 512, "vocab": 300}
    model = build(experts=2, kinds=kinds, row_scales=False, **sizes)
    done, config = imported(model, tmp_path)
    assert "ternary_switch" not in config
    assert_same_weights(done.path, model.weights)


@pytest.mark.parametrize("form", ["8bit", "float16", "float32"])
def test_k_quants(form: Any, tmp_path: Path):
    kinds = {"attn": "Q3_K", "gate": "Q4_K", "up": "Q2_K", "down": "Q6_K", "output": "Q6_K"}
    model = build(kinds=kinds, **K_SIZES)
    done, config = imported(model, tmp_path, k_quants=form)
    assert config["dtype"] == "float32"  # for Q4_K
    found, _ = stock_load_model(done.path)
    if form == "float32":
        assert_same_weights(done.path, model.weights)
        assert not any("off by" in note for note in done.notes)
        return
    notes = [note for note in done.notes if "off by up to" in note]
    assert {note.split()[0] for note in notes} == {"Q2_K", "Q3_K", "Q6_K"}
    said = {"8bit": "as 8-bit codes in groups of 32", "float16": "as float16"}[form]
    assert all(said in note for note in notes)
    assert any("lm_head" in note and "model.layers.N.mlp.down_proj" in note for note in notes)
    told = json.loads((done.path / "checksums.json").read_text())["source"]["largest_errors"]
    stored = stored_weights(found)
    for path, error in told.items():
        true = np.abs(stored[f"{path}.weight"] - model.weights[f"{path}.weight"]).max()
        assert error == pytest.approx(true, rel=1e-3) and 0 < error < 0.02
    exact = set(stored) - {f"{path}.weight" for path in told}
    assert len(told) == 7 and all(np.array_equal(stored[n], model.weights[n]) for n in exact)


def test_float16_tells_what_it_loses(tmp_path: Path):
    kinds = {"attn": "Q4_K", "gate": "Q4_0", "up": "Q4_0", "down": "Q4_0", "embed": "BF16"}
    model = build(kinds=kinds, **K_SIZES)
    exact, config = imported(model, tmp_path)
    assert config["dtype"] == "float32" and any("--dtype float16" in n for n in exact.notes)
    done = import_model(tmp_path / "model.gguf", tmp_path / "half", dtype="float16")
    found, config = stock_load_model(done.path)
    assert config["dtype"] == "float16"
    arrays: Any = tree_flatten(found.parameters())
    assert {array.dtype for _, array in arrays} == {mx.float16, mx.uint32}
    told = {note.split()[0] for note in done.notes if "off by up to" in note}
    assert told == {"Q4_K", "F32", "BF16"}  # norms and head, embeddings: but not Q4_0
    expected = unquantized_logits(config, model.weights, TOKENS)
    assert_logits(logits(found), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kind, attention, dtype",
    [
        ("F16", "Q8_0", "float16"),
        ("F16", "BF16", "float32"),
        ("F16", "Q4_K", "float32"),
        ("BF16", "BF16", "bfloat16"),
    ],
)
def test_the_smallest_dtype_that_is_exact(kind: str, attention: str, dtype: str, tmp_path: Path):
    halves = dict.fromkeys(("embed", "gate", "up", "down", "output"), kind)
    model = build(kinds=halves | {"attn": attention}, **K_SIZES)
    if dtype != "float32":  # norms in float32 that need no more than the others
        for name, item in model.tensors.items():
            if name.endswith("norm.weight"):
                item.data[:] = widened(narrowed(item.data, dtype, name), dtype)
    _, config = imported(model, tmp_path)
    assert config["dtype"] == dtype
    assert_same_weights(tmp_path / "out", model.weights)


def test_split_files(tmp_path: Path):
    model = build(experts=2, kinds={"gate": "Q4_0", "up": "Q4_0"})
    paths = model.split(tmp_path, 3)
    for n, source in enumerate([tmp_path, paths[0], paths[2]]):
        done = import_model(source, tmp_path / f"out{n}")
        assert_same_weights(done.path, model.weights)


def test_one_of_several_files(tmp_path: Path):
    small, other = build(kinds={"attn": "Q4_0"}), build(kinds={"attn": "Q8_0"}, seed=1)
    small.write(tmp_path / "small.gguf")
    other.split(tmp_path, 2, "other")
    with pytest.raises(CheckpointError, match=r"2 GGUF models; name one with --file: other-"):
        import_model(tmp_path, tmp_path / "out")
    done = import_model(tmp_path, tmp_path / "out", file="other-00002-of-00002.gguf")
    assert_same_weights(done.path, other.weights)


def test_a_split_model_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All files of the model that was named are fetched, and no others."""
    folder = tmp_path / "repo"
    (folder / "Q4_0").mkdir(parents=True)
    model = build(kinds={"gate": "Q4_0"}, layers=1)
    paths = model.split(folder / "Q4_0", 2)
    build(layers=1).write(folder / "other.gguf")
    hub = Hub()
    hub.add("owner/model", folder)
    with opened(hub, tmp_path, monkeypatch):
        done = import_model("owner/model", tmp_path / "out", file=f"Q4_0/{paths[1].name}")
        with pytest.raises(CheckpointError, match="name a GGUF file of a repository with --file"):
            import_model("owner/model", tmp_path / "b")
    assert_same_weights(done.path, model.weights)
    asked = {name for name in hub.files_asked("owner/model") if name.endswith(".gguf")}
    assert asked == {f"Q4_0/{path.name}" for path in paths}


def test_stock_mlx_lm_generates(tmp_path: Path):
    model = build(experts=2, layout="split", kinds={"gate": "Q4_0", "up": "Q4_0", "down": "Q8_0"})
    done, _ = imported(model, tmp_path)
    found, tokenizer = stock_load(str(done.path))[:2]
    assert tokenizer.encode("he") == [1, 263]
    found.set_dtype(mx.float32)
    last = list(stream_generate(found, tokenizer, "he he", max_tokens=4))[-1]
    assert 1 <= last.generation_tokens <= 4


def test_rope_scaling(tmp_path: Path):
    model = build(kv_heads=4)
    model.fields |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    done, config = imported(model, tmp_path)
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}
    assert_logits(
        logits(stock_load_model(done.path)[0]), unquantized_logits(config, model.weights, TOKENS)
    )


def test_yarn(tmp_path: Path):
    model = build(arch="qwen2", vocab=320)
    model.fields |= {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 128,
    }
    done, config = imported(model, tmp_path)
    rope = stock_load_model(done.path)[0].layers[0].self_attn.rope
    assert (type(rope).__name__, config["rope_theta"]) == ("YarnRoPE", 10000.0)
    assert rope.mscale == pytest.approx(0.1 * np.log(4) + 1)  # llama.cpp's, too
    assert config["rope_scaling"]["original_max_position_embeddings"] == 128
    # llama.cpp and transformers take the context itself where the file does not say.
    del model.fields["qwen2.rope.scaling.original_context_length"]
    (tmp_path / "without").mkdir()
    _, config = imported(model, tmp_path / "without")
    assert config["rope_scaling"]["original_max_position_embeddings"] == 512


def test_frequencies_of_llama3(tmp_path: Path):
    """Factors of frequencies become `rope_scaling`, whose frequencies are those divided."""
    model = build(hidden=256, layers=1, heads=4)
    model.fields["llama.rope.freq_base"] = 500000.0
    lengths = 2 * np.pi * 500000.0 ** (np.arange(0, 64, 2) / 64)
    smooth = np.clip((8192 / lengths - 1) / 3, 0, 1)
    factors = 1 / ((1 - smooth) / 8 + smooth)
    item = model.tensors["output_norm.weight"]
    model.tensors["rope_freqs.weight"] = type(item)(factors.astype(np.float32), "F32", factors)
    done, config = imported(model, tmp_path)
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 8.0
    rope = stock_load_model(done.path)[0].layers[0].self_attn.rope
    expected = 500000.0 ** (np.arange(0, 64, 2) / 64) * factors
    np.testing.assert_allclose(np.array(rope._freqs), expected, rtol=2e-5)
    model.tensors["rope_freqs.weight"].data = np.ones(32, np.float32)
    assert "rope_scaling" not in json.loads(
        (
            import_model(model.write(tmp_path / "b.gguf"), tmp_path / "b").path / "config.json"
        ).read_text()
    )


def test_biases_are_permuted(tmp_path: Path):
    model = build()
    for n in range(2):
        for name, size in (("q", 64), ("k", 32), ("v", 32), ("output", 64)):
            values = np.arange(size, dtype=np.float32)
            made = type(model.tensors["output_norm.weight"])(values, "F32", values)
            model.tensors[f"blk.{n}.attn_{name}.bias"] = made
            if name in "qk":
                values = values.reshape(-1, 8, 2).swapaxes(1, 2).reshape(-1)
            mlx = "o" if name == "output" else name
            model.weights[f"model.layers.{n}.self_attn.{mlx}_proj.bias"] = values
    done, _ = imported(model, tmp_path)
    assert_same_weights(done.path, model.weights)


def test_stops_and_unread_metadata(tmp_path: Path):
    model = build()
    model.fields |= {"tokenizer.ggml.eot_token_id": 7, "llama.logit_scale": 2.0}
    done, config = imported(model, tmp_path)
    assert config["eos_token_id"] == [2, 7]
    assert "ignored metadata: llama.logit_scale" in done.notes


def test_replies_end_at_known_tokens(tmp_path: Path):
    """A token that the model writes gets the text of one that ends a turn, and its own type."""
    model = build()
    done, config = imported(model, tmp_path)
    assert config["eos_token_id"] == 2

    def said() -> list[int]:
        loaded = outlier_mlx.load(tmp_path / "out")
        options = Options(max_tokens=12)
        return [response.token for response in generate_text(*loaded, "he he", options)]

    tokens = said()
    place = next(n for n in range(2, 12) if tokens[n] not in tokens[:n])
    model.fields["tokenizer.ggml.tokens"][tokens[place]] = "<|eot_id|>"
    model.fields["tokenizer.ggml.token_type"][tokens[place]] = 1
    done, config = imported(model, tmp_path, force=True)
    assert config["eos_token_id"] == [2, tokens[place]]
    assert "tokens that are special, whatever their type says: <|eot_id|>" in done.notes
    assert said() == tokens[: place + 1]


def test_metadata_is_what_the_package_reads(tmp_path: Path):
    path = build(experts=2, layout="fused", kinds={"gate": "Q5_1"}).write(tmp_path / "m.gguf")
    ours, reader = read_gguf(path), gguf.GGUFReader(path)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert set(ours.fields) == set(theirs)
    for key, value in theirs.items():
        found = ours.fields[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == value, key
    for mine, other in zip(ours.tensors, reader.tensors, strict=True):
        assert (mine.name, mine.kind) == (other.name, other.tensor_type.name)
        assert list(mine.shape) == other.shape.tolist()[::-1]
        assert (mine.offset, mine.nbytes) == (other.data_offset, other.n_bytes)
        assert mine.read().tobytes() == other.data.tobytes()


GOLDENS = ["gguf_merged_4x", "gguf_split_2x", "gguf_kquant_2x"]


@pytest.mark.parametrize("case", GOLDENS)
def test_goldens(case: str, tmp_path: Path):
    folder = require_shared() / "goldens/frankenmoe" / case
    done = import_model(folder / "model.gguf", tmp_path / "out", k_quants="float32")
    meta = json.loads((folder / "meta.json").read_text())
    expected = read_arrays(folder / "expected.safetensors")
    model, config = stock_load_model(done.path)
    found = stored_weights(model)
    truth = {
        item.name: dequantize(item.data, item.tensor_type).reshape(item.shape[::-1])
        for item in gguf.GGUFReader(folder / "model.gguf").tensors
    }
    for name, item in meta["tensors"].items():
        values = truth[name]
        names = item["hf"] if isinstance(item["hf"], list) else [item["hf"]]
        for n, hf in enumerate(names):
            one = values[n] if isinstance(item["hf"], list) else values
            if ".q_proj" in hf or ".k_proj" in hf:
                head = config["hidden_size"] // config["num_attention_heads"]
                one = one.reshape(-1, head // 2, 2, values.shape[-1]).swapaxes(1, 2)
                one = np.ascontiguousarray(one).reshape(values.shape)
            # The golden's hash, and then the numbers: a zero may have another sign.
            digest = hashlib.sha256(np.ascontiguousarray(one, np.float32).tobytes()).hexdigest()
            assert digest == meta["hf_tensor_sha256_of_fp32_bytes"][hf], hf
            np.testing.assert_array_equal(_by_hf_name(found, hf), one, err_msg=hf)
    model.set_dtype(mx.float32)
    got = np.array(model(mx.array(expected["input_ids"].astype(np.int32))))
    assert np.abs(got - expected["logits"]).max() < 2e-4


def _by_hf_name(found: dict[str, np.ndarray], name: str) -> np.ndarray:
    if ".experts." not in name:
        return found[name]
    prefix, _, rest = name.partition(".experts.")
    number, projection, _ = rest.split(".")
    mlx = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[projection]
    return found[f"{prefix}.switch_mlp.{mlx}.weight"][int(number)]


def test_heads_of_qwen3_have_llama_cpps_default_width(tmp_path: Path):
    _, config = imported(build(arch="qwen3", vocab=320), tmp_path)
    assert config["head_dim"] == 16
