"""GGUF files that cannot be imported: one line that names file, tensor and what was expected."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx.errors import CheckpointError, OutputExistsError
from outlier_mlx.imports import import_model
from outlier_mlx.imports.gguf import open_gguf_model
from outlier_mlx.storage.gguf import read_gguf
from tests.gguf_builder import Model, Tensor, blocks, build
from tests.program import assert_refused, run


def moe(**how: Any) -> Model:
    return build(experts=3, layout="split", layers=1, **how)


def drop(*names: str) -> Callable[[Model], Any]:
    return lambda m: [m.tensors.pop(name) for name in names]


def say(**fields: Any) -> Callable[[Model], Any]:
    """Set fields of the architecture."""
    return lambda m: m.fields.update(
        {f"llama.{k.replace('__', '.')}": v for k, v in fields.items()}
    )


def floats(*shape: int) -> Tensor:
    values = np.full(shape, 2.0, np.float32)
    return Tensor(values, "F32", values)


def put(name: str, item: Tensor) -> Callable[[Model], Any]:
    return lambda m: m.tensors.update({name: item})


def other_type(name: str, kind: str, nbytes: int) -> Callable[[Model], Any]:
    """Give a tensor blocks of another type."""

    def change(model: Model) -> None:
        out = model.tensors[name].values.shape[:-1]
        model.tensors[name] = Tensor(np.zeros((*out, nbytes), np.uint8), kind, np.zeros(0))

    return change


MODELS: dict[str, tuple[Callable[..., Model], Callable[[Model], Any], str]] = {
    "an expert is missing": (
        moe,
        drop("blk.0.ffn_down.1.weight"),
        "x.gguf: blk.0.ffn_down.1.weight is missing; expert_count is 3",
    ),
    "fewer experts counted": (
        moe,
        say(expert_count=2),
        "x.gguf: blk.0.ffn_gate_inp.weight: shape (3, 64), expected (2, 64)",
    ),
    "an expert too many": (
        moe,
        put("blk.0.ffn_up.3.weight", floats(96, 64)),
        "x.gguf: blk.0.ffn_up.3.weight: expert 3, but expert_count is 3",
    ),
    "other experts stacked": (
        lambda: build(experts=3, layers=1),
        put("blk.0.ffn_up_exps.weight", floats(2, 96, 64)),
        "x.gguf: blk.0.ffn_up_exps.weight: 2 experts, but expert_count is 3",
    ),
    "two layouts": (
        moe,
        put("blk.0.ffn_up_exps.weight", floats(3, 96, 64)),
        "layer 0 has its up experts twice: as blk.0.ffn_up_exps.weight and"
        " as blk.0.ffn_up.0.weight",
    ),
    "an expert twice": (
        moe,
        put("blk.0.ffn_up.01.weight", floats(96, 64)),
        "x.gguf: blk.0.ffn_up.01.weight: duplicate expert 1",
    ),
    "more experts used than there are": (
        moe,
        say(expert_used_count=4),
        "num_experts_per_tok is 4, of 3 experts",
    ),
    "no experts at all": (
        moe,
        lambda m: [m.tensors.pop(n) for n in list(m.tensors) if ".ffn_up." in n],
        "x.gguf: the tensor blk.0.ffn_up_exps.weight (3, 96, 64) is missing",
    ),
    "a type that is not read": (
        lambda: build(layers=1),
        other_type("blk.0.attn_v.weight", "IQ4_NL", 36),
        "x.gguf: blk.0.attn_v.weight: type IQ4_NL, expected one of F32, F16, BF16, Q4_0,",
    ),
    "norms in blocks": (
        lambda: build(layers=1),
        other_type("blk.0.attn_norm.weight", "Q8_0", 68),
        "x.gguf: blk.0.attn_norm.weight: type Q8_0, expected one of F32, F16, BF16",
    ),
    "fewer tokens than rows": (
        build,
        put("token_embd.weight", floats(300, 64)),
        "x.gguf: 288 tokens, but token_embd.weight has 300 rows",
    ),
    "another size of vocabulary": (
        build,
        say(vocab_size=300),
        "x.gguf: llama.vocab_size is 300, but token_embd.weight has 288 rows",
    ),
    "no embeddings": (build, drop("token_embd.weight"), "the matrix token_embd.weight is missing"),
    "a matrix is missing": (
        build,
        drop("blk.1.ffn_up.weight"),
        "x.gguf: the tensor blk.1.ffn_up.weight (96, 64) is missing",
    ),
    "a matrix too many": (
        build,
        put("blk.1.attn_q_norm.weight", floats(16)),
        "x.gguf: blk.1.attn_q_norm.weight: unknown tensor for a llama model of 2 layers",
    ),
    "a layer too many": (
        build,
        put("blk.2.attn_norm.weight", floats(64)),
        "x.gguf: blk.2.attn_norm.weight: unknown tensor for a llama model of 2 layers",
    ),
    "another shape": (
        build,
        put("blk.1.ffn_up.weight", floats(64, 96)),
        "x.gguf: blk.1.ffn_up.weight: shape (64, 96), expected (96, 64)",
    ),
    "another architecture": (
        build,
        lambda m: m.fields.update({"general.architecture": "gemma"}),
        "x.gguf: architecture 'gemma', expected one of llama, qwen2, qwen3",
    ),
    "no layers": (
        build,
        lambda m: m.fields.pop("llama.block_count"),
        "num_hidden_layers is missing",
    ),
    "heads by layer": (
        build,
        say(attention__head_count=[4, 4]),
        "llama.attention.head_count is '[4 4]', expected int",
    ),
    "heads of another width": (
        build,
        say(rope__dimension_count=8),
        "llama.rope.dimension_count is 8, but a head has 16 dimensions",
    ),
    "scaling that is not known": (
        build,
        say(rope__scaling__type="longrope", rope__scaling__factor=2.0),
        "rope.scaling.type 'longrope' with factor 2.0; only linear and yarn are supported",
    ),
    "more than YaRN": (
        build,
        say(
            rope__scaling__type="yarn",
            rope__scaling__factor=2.0,
            rope__scaling__original_context_length=128,
            rope__scaling__yarn_beta_fast=8.0,
        ),
        "llama.rope.scaling.yarn_beta_fast is not supported",
    ),
    "scaled positions of a Mixtral": (
        moe,
        say(rope__scaling__type="linear", rope__scaling__factor=2.0),
        "rope_scaling 'linear', expected none",
    ),
    "other frequencies": (
        build,
        put("rope_freqs.weight", floats(8)),
        "x.gguf: rope_freqs.weight: frequency factors other than Llama 3's",
    ),
    "frequencies of another head": (
        build,
        put("rope_freqs.weight", floats(7)),
        "x.gguf: rope_freqs.weight: F32 (7,), expected floats (8,)",
    ),
    "Qwen2 with another tokenizer": (
        lambda: build(arch="qwen2"),
        lambda m: m.fields.update({"tokenizer.ggml.pre": "llama-bpe"}),
        "x.gguf: a qwen2 model with the tokenizer 'llama-bpe'",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_refused(case: str, tmp_path: Path):
    make, harm, said = MODELS[case]
    model = make()
    harm(model)
    path = model.write(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError) as error:
        open_gguf_model(path)
    assert said in str(error.value)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def type_of(data: bytes, name: str) -> int:
    """Where the type of a matrix is in a file."""
    return data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4 + 16


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another magic": (lambda d: b"GGML" + d[4:], "x.gguf: not a GGUF file"),
    "version 1": (
        lambda d: patched(d, 4, struct.pack("<I", 1)),
        "x.gguf: a GGUF file of version 1, expected 2 or 3",
    ),
    "big-endian": (
        lambda d: patched(d, 4, struct.pack(">I", 3)),
        "x.gguf: a big-endian GGUF file",
    ),
    "truncated data": (
        lambda d: d[:-400],
        "x.gguf: output.weight: the file ends within this tensor",
    ),
    "truncated metadata": (lambda d: d[:3000], "x.gguf: the file ends within its metadata"),
    "an empty file": (lambda d: b"", "x.gguf: the file ends within its metadata"),
    "an unknown type": (
        lambda d: patched(d, type_of(d, "blk.1.attn_v.weight"), struct.pack("<I", 999)),
        "x.gguf: blk.1.attn_v.weight: the unknown type 999",
    ),
    "a type whose blocks do not fit": (
        lambda d: patched(d, type_of(d, "blk.1.attn_v.weight"), struct.pack("<I", 12)),
        "x.gguf: blk.1.attn_v.weight: rows of 64, which is not a multiple of 256, the block of",
    ),
    "a huge tensor": (
        lambda d: patched(d, type_of(d, "blk.1.attn_v.weight") - 16, b"\xff" * 16),
        "x.gguf: blk.1.attn_v.weight: shape (18446744073709551615, 18446744073709551615)",
    ),
    "an empty tensor": (
        lambda d: patched(d, type_of(d, "blk.1.attn_v.weight") - 16, bytes(8)),
        "x.gguf: blk.1.attn_v.weight: shape (32, 0)",
    ),
    "a name twice": (
        lambda d: d.replace(b"blk.1.attn_v.weight", b"blk.0.attn_v.weight"),
        "x.gguf: blk.0.attn_v.weight: two tensors have this name",
    ),
    "a field twice": (
        lambda d: d.replace(b"llama.embedding_length", b"llama.feed_forward_len", 1).replace(
            b"llama.context_length", b"general.architecture", 1
        ),
        "x.gguf: the field general.architecture appears twice",
    ),
    "metadata of another kind": (
        lambda d: patched(d, d.index(b"llama.context_length") + 20, struct.pack("<I", 13)),
        "x.gguf: metadata of the unknown type 13",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files(case: str, tmp_path: Path):
    harm, said = FILES[case]
    path = build().write(tmp_path / "x.gguf")
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(CheckpointError) as error:
        open_gguf_model(path)
    assert said in str(error.value)


def test_missing_and_wrong_splits(tmp_path: Path):
    paths = build().split(tmp_path, 3)
    whole = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003.gguf: missing; the model has 3"):
        open_gguf_model(tmp_path)
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(
        CheckpointError,
        match=r"00002-of.*: token_embd.weight: duplicate tensor, also in model-00001",
    ):
        open_gguf_model(paths[2])
    at = whole.index(b"split.count") + 11 + 4
    paths[1].write_bytes(patched(whole, at, struct.pack("<I", 4)))
    with pytest.raises(CheckpointError, match=r"00002-of-00003.gguf: split.count is 4, expected 3"):
        open_gguf_model(tmp_path)
    build().write(paths[1])
    for path in (paths[0], paths[2]):
        path.unlink()
    paths[1].rename(tmp_path / "model-00001-of-00001.gguf")
    open_gguf_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"the name says file 00005 of 3"):
        open_gguf_model(tmp_path / "model-00005-of-00003.gguf")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "TQ1_0", "F16"])
def test_scales_that_are_no_numbers(kind: str, tmp_path: Path):
    """Found while the model is written: nothing of it stays."""
    model = build(kinds={"down": kind}, hidden=256, width=256, layers=1)
    item = model.tensors["blk.0.ffn_down.weight"]
    if kind == "F16":
        item.data[7, 0] = np.inf
    else:
        size = {"Q4_0": 18, "Q4_K": 144, "Q6_K": 210, "TQ1_0": 54}[kind]
        at = 0 if kind.startswith("Q4") else size - 2
        item.data[7, at : at + 2] = np.array([np.nan], "<f2").view(np.uint8)
    path = model.write(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"x.gguf: blk.0.ffn_down.weight: from row 0: .*7"):
        import_model(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_float16_that_overflows(tmp_path: Path):
    model = build(layers=1)
    model.tensors["output_norm.weight"].data[3] = 1e5
    path = model.write(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="too large for float16, as 100000; --dtype"):
        import_model(path, tmp_path / "out", dtype="float16")


def test_gguf_takes_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = build().write(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the package gguf: pip install"):
        import_model(path, tmp_path / "out")


def test_existing_output_is_kept(tmp_path: Path):
    path = build(layers=1).write(tmp_path / "x.gguf")
    import_model(path, tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--force replaces it"):
        import_model(path, tmp_path / "out")
    import_model(path, tmp_path / "out", force=True)


def test_command(tmp_path: Path):
    path = build(kinds={"down": "Q6_K"}, hidden=256, width=256, layers=1).write(tmp_path / "x.gguf")
    done = run("import", path, "--out", tmp_path / "out")
    assert done.out == ""
    assert "GGUF F32+Q6_K" in done.err
    assert "Q6_K as 8-bit codes in groups of 32" in done.err
    assert "model.layers.N.mlp.down_proj (1 layer)" in done.err
    assert_refused(run("import", path, "--out", tmp_path / "out", code=1), "--force")
    run("import", path, "--k-quants", "4bit", code=2)
    path.write_bytes(path.read_bytes()[:-9])
    assert_refused(run("import", path, "--out", tmp_path / "b", code=1))


@pytest.mark.slow
def test_memory_is_a_few_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stacked tensor of 48 MB as floats is read, decoded and written in pieces."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    sizes: dict[str, Any] = {"hidden": 1024, "width": 1024, "layers": 1, "vocab": 288}
    kinds = dict.fromkeys(("gate", "up", "down", "attn"), "Q4_0") | {"up": "Q6_K"}
    path = build(experts=12, kinds=kinds, **sizes).write(tmp_path / "x.gguf")
    tracemalloc.start()
    try:
        import_model(path, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32e6  # measured: 20e6, for the slabs of two threads and those that wait


def test_offsets_are_checked_before_anything_is_read(tmp_path: Path):
    raw = blocks("Q4_0", (4, 32), np.random.default_rng(0))
    model = build(layers=1)
    model.tensors["blk.0.attn_v.weight"] = Tensor(raw, "Q4_0", raw)
    path = model.write(tmp_path / "x.gguf")
    data = path.read_bytes()
    at = type_of(data, "blk.0.attn_v.weight") + 4
    path.write_bytes(patched(data, at, struct.pack("<Q", 2**63)))
    with pytest.raises(CheckpointError, match=r"attn_v.weight: the file ends within this tensor"):
        read_gguf(path)
