"""AWQ models as MLX folders: every weight to the bit, in stock mlx-lm; what is refused, and how."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import generate
from mlx_lm.utils import _get_classes
from mlx_lm.utils import load as stock_load
from mlx_lm.utils import load_model as stock_load_model

from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports import awq_parts, import_model
from outlier_mlx.imports.awq import open_awq_model
from outlier_mlx.imports.awq_layout import to_five_bits, to_four_bits, unpack
from outlier_mlx.imports.codes import WIDTHS, pack_codes
from outlier_mlx.writing import parts as storage_parts
from tests.awq_builder import Awq, Built, dequantized, model_config, pack, write_awq
from tests.damage import REMOVE, add_tensor, drop_tensor, edit_config, replace_tensor
from tests.folders import copy_writable
from tests.goldens import assert_logits_close, require_shared
from tests.tensor_file import read_arrays, read_stored, write_stored

TOKENS = list(range(3, 43))
EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def stored_weights(folder: Path) -> dict[str, np.ndarray]:
    """What MLX dequantizes a folder to in float32, by the names of the unquantized checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, mx.array] = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= cast("dict[str, mx.array]", mx.load(str(path)))
    result = {}
    for name, array in tensors.items():
        path_, leaf = name.rsplit(".", 1)
        if leaf in ("scales", "biases"):
            continue
        if f"{path_}.scales" in tensors and leaf == "weight":
            how = config["quantization"].get(path_, config["quantization"])
            scales, biases = (
                tensors[f"{path_}.{n}"].astype(mx.float32) for n in ("scales", "biases")
            )
            array = mx.dequantize(array, scales, biases, how["group_size"], how["bits"])
        values = np.array(array.astype(mx.float32))
        if ".switch_mlp." not in name:
            result[name] = values
            continue
        prefix, projection = path_.split(".switch_mlp.")
        letter = next(w for w, p in EXPERT.items() if p == projection)
        result |= {f"{prefix}.experts.{e}.{letter}.weight": v for e, v in enumerate(values)}
    return result


def assert_same_weights(folder: Path, expected: dict[str, np.ndarray]) -> None:
    found = stored_weights(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def dense_logits(case: Awq, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Of mlx-lm's own model with these weights, unquantized in float32."""
    config = model_config(case)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    arrays = {name: mx.array(value) for name, value in weights.items()}
    model.load_weights(list(model.sanitize(arrays).items()), strict=True)
    return np.array(model(mx.array([TOKENS])))


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


@pytest.mark.parametrize("bits", WIDTHS)
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
    "qwen2, groups of 256": Awq("qwen2", hidden=256, intermediate=512, group=256, layers=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bits", [4, 5])
def test_every_weight_to_the_bit(case: Awq, bits: int, tmp_path: Path) -> None:
    built = write_awq(tmp_path / "awq", case)
    written = import_model(built.path, tmp_path / "mlx", bits=bits)
    assert_same_weights(tmp_path / "mlx", built.weights)
    expected = dense_logits(case, built.weights)
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
    assert_same_weights(tmp_path / "mlx", built.weights)
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
    found = stored_weights(tmp_path / "mlx")
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
    expected = dense_logits(Awq(vocab=288), built.weights)
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
    expected = dense_logits(case, built.weights)
    for folder in (old, new):
        with pytest.warns(match="no tokenizer"):
            import_model(folder, tmp_path / f"{folder.name}-mlx")
        assert_same_weights(tmp_path / f"{folder.name}-mlx", built.weights)
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
    assert_same_weights(tmp_path / "mlx", built.weights)


# What is refused


def without(*names: str) -> Any:
    def change(folder: Path) -> None:
        for name in names:
            drop_tensor(folder, name)

    return change


def unquantized(module: str, shape: tuple[int, int], leaf: str = "weight") -> Any:
    """A module that is quantized, unquantized (or the other way around)."""

    def change(folder: Path) -> None:
        held = [n for n in read_stored(folder / "model.safetensors") if n.startswith(f"{module}.")]
        without(*held)(folder)
        kind = np.int32 if leaf == "qweight" else np.float16
        add_tensor(folder, f"{module}.{leaf}", np.zeros(shape, kind))

    return change


def settings_of(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        old = json.loads((folder / "config.json").read_text())["quantization_config"]
        new = {k: v for k, v in (old | changes).items() if v is not REMOVE}
        edit_config(folder, quantization_config=new)

    return change


def as_gptq(folder: Path) -> None:
    """Rows in / 8, columns out: packed along the input."""
    value = np.zeros((8, 64), np.int32)
    replace_tensor(folder, "model.layers.0.self_attn.q_proj.qweight", value)


def put(name: str, value: Any, dtype: str | None = None) -> Any:
    return lambda folder: replace_tensor(folder, name, value, dtype)


Q = "model.layers.0.self_attn.q_proj"
W1 = "model.layers.1.block_sparse_moe.experts.1.w1"
REFUSED = {
    "no zeros": (without(f"{W1}.qzeros"), rf"{W1}\.qzeros is missing, but .* has zero_point"),
    "no scales": (without(f"{Q}.scales"), rf"{Q}\.scales is missing"),
    "no weight": (
        without(f"{Q}.qweight"),
        rf"awq: the tensor {Q}\.weight \(or \.qweight\) is missing",
    ),
    "no norm": (without("model.norm.weight"), r"model\.norm\.weight .*is missing"),
    "scales of another shape": (
        put(f"{Q}.scales", np.ones((1, 64), np.float16)),
        rf"{Q}\.scales: F16 \(1, 64\), expected F16 \(2, 64\)",
    ),
    "scales of another type": (
        put(f"{Q}.scales", np.ones((2, 64)), "F32"),
        rf"{Q}\.scales: F32 \(2, 64\), expected F16",
    ),
    "zeros of another shape": (
        put(f"{Q}.qzeros", np.ones((2, 64), np.int32)),
        rf"{Q}\.qzeros: I32 \(2, 64\), expected I32 \(2, 8\)",
    ),
    "a weight of another shape": (
        put(f"{Q}.qweight", np.ones((32, 8), np.int32)),
        rf"{Q}\.qweight: I32 \(32, 8\), expected I32 \(64, 8\)",
    ),
    "NaN": (put(f"{Q}.scales", np.full((2, 64), np.nan), "F16"), rf"{Q}\.scales: holds NaN"),
    "columns": (
        lambda folder: edit_config(folder, intermediate_size=100),
        r"w1\.qweight: 100 columns, expected a multiple of 8",
    ),
    "GPTQ by its order": (
        lambda folder: add_tensor(folder, f"{Q}.g_idx", np.zeros(64, np.int32)),
        rf"{Q}\.g_idx: a tensor of GPTQ",
    ),
    "GPTQ by its shape": (as_gptq, r"q_proj\.qweight: .*GPTQ"),
    "GPTQ by its name": (settings_of(quant_method="gptq"), "quant_method gptq"),
    **{
        f"version {name}": (settings_of(version=name), f"version {name} .*only gemm")
        for name in ("gemv", "gemv_fast", "marlin", "exllama")
    },
    "an unknown version": (settings_of(version="new"), r"version new \(unknown\)"),
    "backend": (settings_of(backend="llm-awq"), "backend llm-awq"),
    "bits as text": (settings_of(bits="4"), "bits '4', expected 4"),
    "8 bits": (settings_of(bits=8), "bits 8, expected 4"),
    "no bits": (settings_of(bits=REMOVE), "bits None, expected 4"),
    "groups of 16": (settings_of(group_size=16), "group_size 16, expected"),
    "groups that do not fit": (settings_of(group_size=128), "groups of 128 do not fit 64 inputs"),
    "zero_point": (settings_of(zero_point=1), "zero_point 1"),
    "nothing said": (
        lambda folder: edit_config(folder, quantization_config=REMOVE),
        "config.json has no quantization_config",
    ),
    "MLX": (lambda folder: edit_config(folder, quantization={"bits": 4}), "already an MLX model"),
    "an expert is missing": (
        without(f"{W1}.qweight", f"{W1}.qzeros", f"{W1}.scales"),
        rf"{W1}\.weight \(or \.qweight\) is missing",
    ),
    "one expert too many": (
        lambda folder: edit_config(folder, num_local_experts=1, num_experts_per_tok=1),
        r"experts\.1\.w1\.qweight: unknown tensor for this model|gate.*expected.*\(1, 64\)",
    ),
    "more experts a token than there are": (
        lambda folder: edit_config(folder, num_experts_per_tok=3),
        "num_experts_per_tok is 3, of 2",
    ),
    "an unknown tensor": (
        lambda folder: add_tensor(folder, "model.extra.weight", np.zeros(3, np.float16)),
        r"model\.extra\.weight: unknown tensor for this model",
    ),
    "a bias": (
        lambda folder: add_tensor(folder, f"{Q}.bias", np.zeros(64, np.float16)),
        rf"{Q}\.bias: unknown tensor",
    ),
    "both forms": (
        lambda folder: add_tensor(folder, f"{Q}.weight", np.zeros((64, 64), np.float16)),
        rf"{Q}\.weight: unknown tensor",
    ),
    "the same twice": (
        lambda folder: add_tensor(
            folder, "model.layers.0.mlp.gate.weight", np.zeros((2, 64), np.float16)
        ),
        "under another name",
    ),
    "an expert that is not quantized": (
        unquantized(W1, (96, 64)),
        rf"{W1}\.weight: not quantized, but other experts",
    ),
    "quantized embeddings": (
        unquantized("model.embed_tokens", (64, 20), "qweight"),
        "linear layers only",
    ),
    "another family": (lambda folder: edit_config(folder, model_type="gpt2"), "model_type 'gpt2'"),
    "heads": (lambda folder: edit_config(folder, head_dim=32), "head_dim 32 is not hidden_size"),
    "RoPE": (
        lambda folder: edit_config(folder, rope_scaling={"type": "linear", "factor": 2}),
        "rope_scaling 'linear'; MLX's mixtral has none",
    ),
    "contradiction": (
        lambda folder: edit_config(folder, rope_parameters={"rope_theta": 5.0}),
        "rope_theta is 10000.0, but",
    ),
    "activation": (lambda folder: edit_config(folder, hidden_act="gelu"), "hidden_act 'gelu'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    "pickled": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickled weights are not read",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return write_awq(tmp_path_factory.mktemp("awq") / "sound")


@pytest.mark.parametrize(("damage", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(damage: Any, words: str, sound: Built, tmp_path: Path) -> None:
    folder = copy_writable(sound.path, tmp_path / "awq")
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        import_model(folder, tmp_path / "out" / "mlx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_biases_that_qwen2_must_have(tmp_path: Path) -> None:
    built = write_awq(tmp_path / "awq", Awq("qwen2"))
    drop_tensor(built.path, f"{Q}.bias")
    with pytest.raises(CheckpointError, match=rf"{Q}\.bias is missing"):
        import_model(built.path, tmp_path / "mlx")


def test_scales_too_large_for_float16(sound: Built, tmp_path: Path) -> None:
    folder = copy_writable(sound.path, tmp_path / "awq")
    replace_tensor(folder, f"{Q}.scales", np.full((2, 64), 6e4, np.float16))
    for options in ({"dtype": "float16"}, {"bits": 5}):
        with pytest.raises(CheckpointError, match=rf"{Q}\.scales: .*--dtype float32"):
            import_model(folder, tmp_path / "mlx", **options)
    import_model(folder, tmp_path / "mlx")
    found = stored_weights(tmp_path / "mlx")[f"{Q}.weight"]
    assert np.isfinite(found).all() and np.abs(found).max() > 65504


def test_what_is_beside_the_model(sound: Built, tmp_path: Path) -> None:
    """Other weights, code and frequencies of RoPE are left; a tokenizer of SentencePiece is not."""
    folder = copy_writable(sound.path, tmp_path / "awq")
    write_stored(folder / "consolidated.safetensors", read_stored(folder / "model.safetensors"))
    add_tensor(
        folder, f"{Q[:-7]}.rotary_emb.inv_freq", np.ones(8, np.float32), file="model.safetensors"
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "modeling.py").write_text("import os")
    edit_config(folder, auto_map={"AutoModel": "modeling.Model"})
    written = import_model(folder, tmp_path / "mlx")
    assert written.tokenizer
    names = {path.name for path in (tmp_path / "mlx").iterdir()}
    assert "tokenizer.model" in names and "modeling.py" not in names
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & config.keys()
    assert config["dtype"] == config["torch_dtype"] == "float32" and config["rope_theta"] == 1e4
    assert_same_weights(tmp_path / "mlx", sound.weights)


ODD: tuple[Any, ...] = (
    None,
    "x",
    -1,
    0,
    2.5,
    10**30,
    True,
    [],
    [1],
    {},
    {"type": []},
    {"rope_theta": {}, "b": []},
)


@pytest.mark.parametrize("family", ["mixtral", "qwen2"])
def test_odd_values_in_configs_are_refused_or_harmless(family: str, tmp_path: Path) -> None:
    """Whatever a field holds: a refusal, or a config that is otherwise the same as before."""
    folder = write_awq(tmp_path / "awq", Awq(family, layers=1)).path
    sound = json.loads((folder / "config.json").read_text())
    fields = [*sound, "head_dim", "rope_scaling", "rope_parameters", "attention_bias", "dtype"]
    opened, refused = open_awq_model(folder).config, 0
    for field in fields:
        for value in ODD:
            (folder / "config.json").write_text(json.dumps(sound | {field: value}))
            try:
                found = open_awq_model(folder).config
            except CheckpointError:
                refused += 1
                continue
            for name in opened.keys() - {field}:
                assert found[name] == opened[name], (field, value, name)
    assert refused > 100


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
    found = stored_weights(tmp_path / "mlx")
    sums = {n: hashlib.sha256(w.tobytes()).hexdigest() for n, w in found.items()}
    assert sums == meta["dequantized_sha256_of_fp32_bytes"]
    expected = read_arrays(source / "expected.safetensors")
    model, _ = load_model(tmp_path / "mlx")
    assert_logits_close(np.array(model(mx.array(expected["input_ids"]))), expected["logits"])
