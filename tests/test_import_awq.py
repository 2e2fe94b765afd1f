"""AWQ models as MLX folders: every weight to the bit, in stock mlx-lm; what is refused, and how."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import generate
from mlx_lm.utils import load as stock_load
from mlx_lm.utils import load_model as stock_load_model

from outlier_mlx.engine.loading import load_model
from outlier_mlx.imports import awq_parts, import_model
from outlier_mlx.imports.awq_layout import to_five_bits, to_four_bits, unpack
from outlier_mlx.imports.codes import pack_codes
from outlier_mlx.writing import parts as storage_parts
from tests.awq_builder import Awq, dequantized, model_config, pack, write_awq
from tests.goldens import assert_logits_close, require_shared
from tests.importing import EXPERT, apart, assert_same_weights, stored_weights, unquantized_logits
from tests.tensor_file import read_arrays, read_stored

TOKENS = list(range(3, 43))


def logits(folder: Path) -> np.ndarray:
    model, _ = load_model(folder)
    return np.array(model(mx.array([TOKENS])))


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3), st.sampled_from((32, 64)))
@settings(max_examples=40, deadline=None)
def test_codes_keep_their_place(seed: int, groups: int, words: int, group: int) -> None:
    random = np.random.default_rng(seed)
    q = random.integers(0, 16, (groups * group, 8 * words), dtype=np.uint8)
    z = random.integers(0, 16, (groups, 8 * words), dtype=np.uint8)
    packed = pack(q)
    np.testing.assert_array_equal(unpack(packed), q)
    ones, zeros = mx.ones((8 * words, groups)), mx.zeros((8 * words, groups))
    for bits, rows, codes in (
        (4, to_four_bits(packed), q),
        (5, to_five_bits(packed, pack(z)), q + 16 - np.repeat(z, group, 0)),
        (5, to_five_bits(packed, None), q + 8),
    ):
        found = mx.dequantize(mx.array(rows), ones, zeros, group, bits)
        np.testing.assert_array_equal(np.array(found), codes.T)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_codes_are_packed_as_mlx_packs_them(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 5, 96), dtype=np.uint8)
    ones = mx.ones((2, 5, 3))
    found = mx.dequantize(mx.array(pack_codes(codes, bits)), ones, 0 * ones, 32, bits)
    np.testing.assert_array_equal(np.array(found), codes)


CASES = {
    "mixtral, as Confinus": Awq(vocab=200),
    "mixtral, groups of a row": Awq(group=-1, experts=3, intermediate=128, shards=3),
    "mixtral, no zeros": Awq(zero_point=False, theta=1e6, seed=2),
    "llama, groups of 64": Awq("llama", intermediate=128, group=64, tied=True),
    "mistral, old config": Awq("mistral", hidden=128, intermediate=256, group=128, old_config=True),
    "mistral, wide heads": Awq("mistral", config={"head_dim": 32}),
    "qwen3": Awq("qwen3", config={"head_dim": 24}, tied=True),
    "qwen2, groups of 256": Awq("qwen2", hidden=256, intermediate=512, group=256, layers=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bits", [4, 5])
def test_every_weight_to_the_bit(case: Awq, bits: int, tmp_path: Path) -> None:
    built = write_awq(tmp_path / "awq", case)
    written = import_model(built.path, tmp_path / "mlx", bits=bits)
    assert_same_weights(tmp_path / "mlx", built.weights, experts_apart=True)
    expected = unquantized_logits(model_config(case), built.weights, TOKENS)
    assert_logits_close(logits(tmp_path / "mlx"), expected, atol=2e-5)
    assert written.tokenizer and "exact" in written.notes[-1]
    dtype = {4: "F32", 5: "F16"}[bits]
    tensors = read_stored(tmp_path / "mlx" / "model-00001-of-00001.safetensors")
    kinds = {t.dtype for n, t in tensors.items() if n.endswith((".scales", ".biases"))}
    assert kinds == {dtype}
    total = written.rows[-1]
    assert total.params == sum(value.size for value in built.weights.values())
    assert total.nbytes == sum(len(tensor.data) for tensor in tensors.values())


def test_groups_that_differ_by_module(tmp_path: Path) -> None:
    """Groups as wide as a row: 64 and 96 inputs, of which MLX has 64 and 32."""
    built = write_awq(tmp_path / "awq", Awq("llama", group=-1))
    seen: list[tuple[int, int]] = []
    import_model(built.path, tmp_path / "mlx", progress=lambda *step: seen.append(step))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert_same_weights(tmp_path / "mlx", built.weights, experts_apart=True)
    quantization = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert quantization["group_size"] == 64
    assert quantization["model.layers.1.mlp.down_proj"]["group_size"] == 32
    model, _ = stock_load_model(tmp_path / "mlx")
    assert model.layers[1].mlp.down_proj.group_size == 32


def test_float16_says_what_it_loses(tmp_path: Path) -> None:
    built = write_awq(tmp_path / "awq")
    notes = import_model(built.path, tmp_path / "mlx", dtype="float16").notes
    errors, steps = [], []
    for name, scales in built.scales.items():
        exact = built.zeros[name] * scales.astype(np.float64)
        error = np.abs(exact.astype(np.float16).astype(np.float64) - exact)
        errors.append(error.ravel())
        steps.append((error / scales).ravel())
    error = np.concatenate(errors)
    assert 0 < (error == 0).mean() < 1
    share = f"{100 * (error == 0).mean():.1f} % of {error.size:,} biases"
    step = np.concatenate(steps).max()
    assert share in notes[-1] and f"up to {error.max():.3g}" in notes[-1]
    assert f"{step:.2g} of the step" in notes[-1]
    found = apart(stored_weights(stock_load_model(tmp_path / "mlx")[0]))
    worst = max(np.abs(found[n] - w).max() for n, w in built.weights.items())
    assert 0 < worst <= error.max() * (1 + 1e-6)
    assert share in (tmp_path / "mlx" / "README.md").read_text()


@pytest.mark.parametrize("options", [{}, {"bits": 5}, {"dtype": "float16"}])
def test_stock_mlx_lm_generates(options: dict[str, Any], tmp_path: Path) -> None:
    built = write_awq(tmp_path / "awq", Awq(vocab=288))
    import_model(built.path, tmp_path / "mlx", **options)
    model, tokenizer, *_ = stock_load(str(tmp_path / "mlx"))
    text = generate(model, tokenizer, "The heron stands", max_tokens=8)
    assert text
    found = np.array(model(mx.array([TOKENS])).astype(mx.float32))
    expected = unquantized_logits(model_config(Awq(vocab=288)), built.weights, TOKENS)
    half = "bits" in options or "dtype" in options
    assert_logits_close(found, expected, atol=0.05 if half else 2e-5, rtol=0.02 if half else 1e-5)
    assert model(mx.array([TOKENS])).dtype == (mx.float16 if half else mx.float32)


def test_both_spellings_of_mixtral(tmp_path: Path) -> None:
    """Unquantized, as transformers 5 writes it: experts fused, RoPE and dtype by the new names."""
    case = Awq(theta=1e6)
    built = write_awq(tmp_path / "awq", case)
    old, new = tmp_path / "old", tmp_path / "new"
    weights = dict(built.weights)
    write_model(old, weights, model_config(case))
    for n in range(case.layers):
        moe, mlp = f"model.layers.{n}.block_sparse_moe", f"model.layers.{n}.mlp"
        one = {w: [weights.pop(f"{moe}.experts.{e}.{w}.weight") for e in (0, 1)] for w in EXPERT}
        pairs = zip(one["w1"], one["w3"], strict=True)
        weights[f"{mlp}.experts.gate_up_proj"] = np.stack([np.concatenate(p) for p in pairs])
        weights[f"{mlp}.experts.down_proj"] = np.stack(one["w2"])
        weights[f"{mlp}.gate.weight"] = weights.pop(f"{moe}.gate.weight")
    config = model_config(case)
    del config["rope_theta"], config["torch_dtype"]
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    write_model(new, weights, config | {"rope_parameters": rope, "dtype": "float32"})
    expected = unquantized_logits(model_config(case), built.weights, TOKENS)
    for folder in (old, new):
        with pytest.warns(match="no tokenizer"):
            import_model(folder, tmp_path / f"{folder.name}-mlx")
        assert_same_weights(tmp_path / f"{folder.name}-mlx", built.weights, experts_apart=True)
        model, _ = stock_load_model(tmp_path / f"{folder.name}-mlx")
        assert_logits_close(np.array(model(mx.array([TOKENS]))), expected, atol=1e-5)


def write_model(folder: Path, weights: dict[str, np.ndarray], config: dict) -> None:
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "model.safetensors"), {k: mx.array(v) for k, v in weights.items()}
    )
    (folder / "config.json").write_text(json.dumps(config))


def test_memory_is_that_of_a_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 experts of 393,216 weights a projection: their codes together are 3.1 MB, one 0.2 MB."""
    monkeypatch.setattr(awq_parts, "_SLAB_BYTES", 1 << 14)
    monkeypatch.setattr(awq_parts, "_WORDS", 8)
    monkeypatch.setattr(storage_parts, "AHEAD", 2)
    case = Awq(hidden=512, intermediate=768, experts=16, layers=1, group=128)
    built = write_awq(tmp_path / "awq", case)
    import_model(built.path, tmp_path / "warm")
    tracemalloc.start()
    written = import_model(built.path, tmp_path / "mlx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written.rows[-1].nbytes > 10_000_000
    assert peak < 1_800_000, peak
    assert_same_weights(tmp_path / "mlx", built.weights, experts_apart=True)


# The reference cases


def test_packing_of_the_reference_case() -> None:
    case = read_arrays(require_shared() / "goldens/frankenmoe/awq_unit/awq_unit.safetensors")
    assert pack(np.arange(8)[None]).view(np.uint32)[0, 0] == 0x75316420
    q, words = case["q"], case["qweight"]
    np.testing.assert_array_equal(pack(q), words)
    np.testing.assert_array_equal(unpack(words), q)
    weight = dequantized(q, unpack(case["qzeros"]), case["scales"])
    np.testing.assert_array_equal(weight, case["weight_fp32"])


@pytest.mark.parametrize("name", ["awq_2x_g32", "awq_4x_g128"])
@pytest.mark.parametrize("bits", [4, 5])
def test_a_reference_case(name: str, bits: int, tmp_path: Path) -> None:
    source = require_shared() / "goldens" / "frankenmoe" / name
    with pytest.warns(match="no tokenizer"):
        import_model(source, tmp_path / "mlx", bits=bits)
    meta = json.loads((source / "meta.json").read_text())
    found = apart(stored_weights(stock_load_model(tmp_path / "mlx")[0]))
    sums = {n: hashlib.sha256(w.tobytes()).hexdigest() for n, w in found.items()}
    assert sums == meta["dequantized_sha256_of_fp32_bytes"]
    expected = read_arrays(source / "expected.safetensors")
    model, _ = load_model(tmp_path / "mlx")
    assert_logits_close(np.array(model(mx.array(expected["input_ids"]))), expected["logits"])
