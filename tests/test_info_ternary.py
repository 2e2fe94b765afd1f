"""What `info` says of quantized matrices: which are ternary, and what they take as packed rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.cli.tables import patterns
from outlier_mlx.imports import import_model
from outlier_mlx.storage.shards import read_shards
from tests.hub import Handler, Hub, opened
from tests.program import assert_refused, run
from tests.tensor_file import stored
from tests.ternary_sources import (
    GgufFile,
    Pack,
    affine2,
    bitnet_pack,
    dense_gguf,
    master_pack,
    mlx_pack,
    prism_pack,
)

SOURCES: dict[str, Callable[[], Pack | GgufFile]] = {
    "mlx 128": mlx_pack,
    "mlx 64": lambda: mlx_pack(group=64),
    "rotated": prism_pack,
    "rotated, schema 1": lambda: prism_pack(1),
    "bitnet": bitnet_pack,
    "master": master_pack,
    "TQ1_0": lambda: dense_gguf("TQ1_0"),
    "one scale a row": lambda: dense_gguf("TQ2_0", one_scale=True),
    "Q2_0": lambda: dense_gguf("Q2_0"),
    "Q2_0 in pairs": lambda: dense_gguf("Q2_0", pairs=True),
    "PQ2_0": lambda: dense_gguf("PQ2_0"),
    "PTQ1_0": lambda: dense_gguf("PTQ1_0"),
}
# Whose headers already say that they are ternary.
CERTAIN = ("bitnet", "master", "TQ1_0", "PTQ1_0")


def written(made: Pack | GgufFile, folder: Path) -> Path:
    return made.write(folder / ("model.gguf" if isinstance(made, GgufFile) else "model"))


@pytest.mark.parametrize("name", SOURCES)
def test_every_form(name: str, tmp_path: Path):
    """With the codes, `info` knows what an import will write, to the byte."""
    made = SOURCES[name]()
    source = written(made, tmp_path)
    shallow, deep = inspect(source).ternary, inspect(source, deep=True).ternary
    assert shallow is not None and deep is not None
    certain = name in CERTAIN
    assert {matrix.ternary for matrix in shallow.matrices} == {True if certain else None}
    assert {matrix.ternary for matrix in deep.matrices} == {True}
    assert len(shallow.matrices) == len(deep.matrices) == len(made.matrices)
    tensors = read_shards(import_model(source, tmp_path / "rows").path)
    for path, matrix in made.matrices.items():
        one = next(m for m in deep.matrices if m.shape == matrix.trits.shape)
        packed = tensors[f"{path}.weight"].nbytes + tensors[f"{path}.scales"].nbytes
        assert one.packed_nbytes == packed, path


def test_what_is_not(tmp_path: Path):
    pack = mlx_pack()
    path = "model.layers.0.mlp.up_proj"
    pack.matrices[path].trits[3, 5] = 2
    pack.tensors |= affine2(path, pack.matrices[path])
    source = pack.write(tmp_path / "model")
    result = run("info", source, "--deep", "--json").json["ternary"]
    wrong = [matrix for matrix in result["matrices"] if not matrix["ternary"]]
    assert [matrix["name"] for matrix in wrong] == [path]
    assert "not ternary: row 3, group 0 holds" in wrong[0]["reason"]
    assert wrong[0]["packed_nbytes"] is None and result["deep"] is True
    said = run("info", source, "--deep").out
    assert f"ternary: {len(pack.matrices) - 1} of {len(pack.matrices)} quantized matrices" in said
    assert "  not ternary (2-bit codes, groups of 128):\n    model.layers.0.mlp.up_proj\n" in said
    assert "    model.layers.{0-1}.mlp.{gate,down}_proj\n" in said
    assert max(map(len, said.splitlines())) <= 80
    said = run("info", source).out
    count = len(pack.matrices)
    assert f"ternary: perhaps {count} of {count} quantized matrices (--deep reads" in said


def test_rotated_matrices_are_named(tmp_path: Path):
    """Those with signs: of a pack's modules, some are not rotated."""
    pack = prism_pack()
    found = inspect(pack.write(tmp_path / "model")).ternary
    assert found is not None
    rotated = {name.removesuffix(".signs") for name in pack.tensors if name.endswith(".signs")}
    said = {m.name for m in found.matrices if m.form == "2-bit codes, groups of 128, rotated"}
    assert said == rotated and len(rotated) < len(found.matrices)


def test_models_that_are_quantized_otherwise(tmp_path: Path):
    pack = mlx_pack()
    settings = {"group_size": 128, "bits": 4, "mode": "affine"}
    pack.config |= {"quantization": settings, "quantization_config": settings}
    for path, matrix in pack.matrices.items():
        out, width = matrix.trits.shape
        pack.tensors[f"{path}.weight"] = stored(np.zeros((out, width // 8), np.uint32))
    said = run("info", pack.write(tmp_path / "model"), "--deep").out
    assert f"ternary: none of {len(pack.matrices)} quantized matrices" in said


def floats_pack() -> Pack:
    """The weights of a ternary pack as float16, unquantized."""
    pack = mlx_pack()
    for field in ("quantization", "quantization_config"):
        del pack.config[field]
    for path, matrix in pack.matrices.items():
        pack.tensors[f"{path}.weight"] = stored(matrix.values.astype(np.float16))
        del pack.tensors[f"{path}.scales"], pack.tensors[f"{path}.biases"]
    return pack


def test_unquantized_weights(tmp_path: Path):
    """They may be ternary in fact, as those of any model: the weights tell."""
    pack = floats_pack()
    count = len(pack.matrices)
    source = pack.write(tmp_path / "model")
    assert "ternary" not in run("info", source).out
    listed = run("info", source, "--json").json["ternary"]["matrices"]
    assert [matrix["ternary"] for matrix in listed] == [None] * count
    found = inspect(source, deep=True).ternary
    assert found is not None and {m.ternary for m in found.matrices} == {True}
    tensors = read_shards(import_model(source, tmp_path / "rows").path)
    for matrix in found.matrices:
        rows = [tensors[f"{matrix.name}.{leaf}"].nbytes for leaf in ("weight", "scales")]
        assert matrix.packed_nbytes == sum(rows)
    path = "model.layers.1.mlp.up_proj"
    pack.tensors[f"{path}.weight"] = stored(
        np.random.default_rng(1).random((512, 256), np.float32).astype(np.float16)
    )
    said = run("info", pack.write(tmp_path / "other"), "--deep").out
    assert f"ternary: {count - 1} of {count} matrices\n" in said
    assert f"  not ternary (16-bit floats):\n    {path}\n" in said


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_of_packed_bitnet(value: float, tmp_path: Path):
    pack = bitnet_pack()
    name = next(name for name in pack.tensors if name.endswith(".weight_scale"))
    pack.tensors[name] = stored(np.array([value], np.float32))
    source = pack.write(tmp_path / "model")
    assert_refused(run("info", source, "--deep", code=1), name, "positive number")


def test_master_weights_are_those_that_an_import_rounds(tmp_path: Path):
    """Also where the model type alone says that they are; and what the config excepts is none."""
    pack = master_pack()
    path = next(iter(pack.matrices))
    pack.config["quantization_config"] = pack.config["quantization_config"] | {
        "modules_to_not_convert": [path]
    }
    found = inspect(pack.write(tmp_path / "model")).ternary
    assert found is not None
    done = import_model(tmp_path / "model", tmp_path / "rows")
    rows = {name for name, tensor in read_shards(done.path).items() if tensor.dtype == "U8"}
    assert {f"{matrix.name}.weight" for matrix in found.matrices} == rows
    assert path not in {matrix.name for matrix in found.matrices}
    del pack.config["quantization_config"]
    pack.config["model_type"] = "bitnet"
    found = inspect(pack.write(tmp_path / "typed")).ternary
    assert found is not None and {m.form for m in found.matrices} == {"master weights"}
    assert len(found.matrices) == len(rows) + 1


def test_names_are_short():
    mlp = [f"model.layers.{n}.mlp.{leaf}_proj" for n in range(28) for leaf in ("gate", "up")]
    full = [f"blk.{n}.attn_{leaf}.weight" for n in range(3, 64, 4) for leaf in "qkv"]
    assert patterns(["lm_head", *mlp, *full]) == [
        "lm_head",
        "model.layers.{0-27}.mlp.{gate,up}_proj",
        "blk.{3,7,...,63}.attn_{q,k,v}.weight",
    ]


def test_names_of_experts_are_short():
    experts = [
        f"model.layers.{n}.mlp.experts.{e}.{leaf}_proj"
        for n in range(1, 48)
        for e in range(128)
        for leaf in ("gate", "up", "down")
        if (n, e, leaf) != (3, 7, "up")
    ]
    assert patterns([*experts, "visual.blocks.2", "weight"]) == [
        "model.layers.{1-47}.mlp.experts.{0-127}.{gate,down}_proj",
        "model.layers.{1-2,4-47}.mlp.experts.{0-127}.up_proj",
        "model.layers.3.mlp.experts.{0-6,8-127}.up_proj",
        "visual.blocks.2",
        "weight",
    ]


def test_a_gguf_file(tmp_path: Path):
    made = dense_gguf("Q2_0")
    source = made.write(tmp_path / "model.gguf")
    read = run("info", source, "--json").json
    params = sum(int(np.prod(shape)) for _, shape, _ in made.tensors.values())
    assert (read["kind"], read["architecture"], read["params"]) == ("model", "qwen3", params)
    assert read["nbytes"] == sum(len(data) for _, _, data in made.tensors.values())
    assert (read["layers"], read["vocab"], read["context_length"]) == (2, 300, 512)
    kinds = {row["kind"]: row["params"] for row in read["rows"]}
    assert kinds["embeddings"] == 300 * 256 and "head" not in kinds
    assert kinds["dense FFN"] == 2 * 3 * 256 * 512
    assert run("info", tmp_path, "--json").json["params"] == params  # the folder
    for option in ("--file", "--revision"):
        assert_refused(run("info", source, option, "other", code=1), source.name, option)
    dense_gguf("PQ2_0").write(tmp_path / "other.gguf")
    assert_refused(run("info", tmp_path, code=1), "2 GGUF models", "--file")
    assert run("info", tmp_path, "--file", "model.gguf", "--json").json["params"] == params


def test_a_ternary_model_that_was_imported(tmp_path: Path):
    pack = mlx_pack()
    done = import_model(pack.write(tmp_path / "model"), tmp_path / "rows")
    read = run("info", done.path, "--deep", "--json").json
    before = run("info", tmp_path / "model", "--json").json
    assert read["params"] == before["params"]
    assert read["form"] == "ternary qwen3" and read["kind"] == "model"
    assert read["nbytes"] < before["nbytes"]
    assert read["ternary"]["nbytes"] == before["ternary"]["packed_nbytes"]
    count = len(pack.matrices)
    said = run("info", done.path).out
    assert f"ternary: {count} of {count} quantized matrices\n" in said
    assert "(packed rows, groups of 128)" in said and "in place of" not in said
    rotated = import_model(prism_pack().write(tmp_path / "rotated"), tmp_path / "rotated-rows")
    assert "groups of 128, rotated in blocks of 512)" in run("info", rotated.path).out


def test_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only headers are fetched."""
    pack, made = mlx_pack(), dense_gguf("PQ2_0")
    folder = pack.write(tmp_path / "pack")
    (tmp_path / "gguf").mkdir()
    made.write(tmp_path / "gguf" / "model-PQ2_0.gguf")
    hub = Hub()
    hub.add("some/pack", folder)
    hub.add("some/gguf", tmp_path / "gguf")
    with opened(hub, tmp_path, monkeypatch):
        found: Any = inspect("some/pack").ternary
        assert len(found.matrices) == len(pack.matrices)
        found = inspect("some/gguf", file="model-PQ2_0.gguf").ternary
        assert len(found.matrices) == len(made.matrices)
        assert_refused(run("info", "some/gguf", code=1), "some/gguf", "--file")


REMOTE: dict[str, Callable[[], Pack | GgufFile]] = {
    "rotated": prism_pack,
    "bitnet": bitnet_pack,
    "floats": floats_pack,
    "PQ2_0": lambda: dense_gguf("PQ2_0"),
}


@pytest.mark.parametrize("name", REMOTE)
def test_codes_of_repositories(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are read by ranges: nothing is stored, and nothing fetched that is not needed."""
    made = REMOTE[name]()
    folder = tmp_path / "there"
    folder.mkdir()
    source = made.write(folder / "model.gguf" if isinstance(made, GgufFile) else folder / "m")
    local = inspect(source, deep=True).ternary
    assert local is not None
    hub = Hub()
    hub.add("some/model", source.parent if source.is_file() else source)
    more = ("--file", source.name) if source.is_file() else ()
    with opened(hub, tmp_path, monkeypatch):
        result = run("info", "some/model", "--deep", "--json", *more)
    assert result.json["ternary"] == json.loads(json.dumps(local.as_json()))
    assert "of weights from the hub" in result.err
    sent = sum(
        r.sent for r in hub.asked("some/model") if r.path.endswith((".gguf", ".safetensors"))
    )
    assert sent < local.as_json()["nbytes"] + 210_000


def test_an_imported_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done = import_model(mlx_pack().write(tmp_path / "model"), tmp_path / "rows")
    hub = Hub()
    hub.add("some/rows", done.path)
    with opened(hub, tmp_path, monkeypatch):
        result = run("info", "some/rows", "--deep", "--json")
    assert result.json["ternary"] == run("info", done.path, "--deep", "--json").json["ternary"]


def test_many_codes_take_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Slabs are smaller than what is asked for at a time."""
    pack = mlx_pack()
    monkeypatch.setattr("outlier_mlx.storage.ternary_matrix.SLAB_BYTES", 1 << 12)
    monkeypatch.setattr("outlier_mlx.storage.wide_reads.BLOCK_BYTES", 1 << 14)
    hub = Hub()
    hub.add("some/pack", pack.write(tmp_path / "pack"))
    with opened(hub, tmp_path, monkeypatch):
        found = inspect("some/pack", deep=True).ternary
    assert found is not None and {m.ternary for m in found.matrices} == {True}
    parts = [r.part for r in hub.asked("some/pack") if r.path.endswith(".safetensors") and r.part]
    tensors = [t for t in read_shards(tmp_path / "pack").values() if len(t.shape) == 2]
    expected = sum(-(-tensor.nbytes // (1 << 14)) for tensor in tensors)
    assert len(parts) == len(set(parts)) and expected <= len(parts) < expected + 5


def test_a_repository_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files that were downloaded are not asked for again."""
    hub = Hub()
    hub.add("some/pack", mlx_pack().write(tmp_path / "pack"))
    with opened(hub, tmp_path, monkeypatch):
        huggingface_hub.snapshot_download("some/pack")
        before = len(hub.asked("some/pack"))
        result = run("info", "some/pack", "--deep", "--json")
        later = hub.asked("some/pack")[before:]
    assert {matrix["ternary"] for matrix in result.json["ternary"]["matrices"]} == {True}
    assert "from the hub" not in result.err
    assert sum(r.sent for r in later if r.path.endswith(".safetensors")) <= 100_000  # the header


class WithoutRanges(Handler):
    """A hub that has no ranges: the whole file is the answer."""

    def send(self, path: Path, headers: dict[str, str]) -> None:
        del self.headers["Range"]
        super().send(path, headers)


def test_a_hub_without_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub()
    hub.add("some/pack", mlx_pack().write(tmp_path / "pack"))
    with opened(hub, tmp_path, monkeypatch, WithoutRanges):
        result = run("info", "some/pack", "--deep", code=1)
    # The stand-in may tell in between that nobody reads on.
    assert (
        "error: some/pack: model.safetensors: the hub did not send the requested range; download"
        " the model, and name its folder\n"
    ) in result.err


def test_damaged_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = mlx_pack().write(tmp_path / "pack")
    (shard,) = folder.glob("*.safetensors")
    whole = shard.read_bytes()
    index = {"weight_map": dict.fromkeys(read_shards(folder), "other.safetensors")}
    hub = Hub()
    hub.add("some/pack", folder)
    with opened(hub, tmp_path, monkeypatch):
        shard.write_bytes(whole[:-100])
        assert_refused(run("info", "some/pack", "--deep", code=1), shard.name, "truncated")
        shard.write_bytes(whole)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert_refused(run("info", "some/pack", "--deep", code=1), "other.safetensors")
        (folder / "model.safetensors.index.json").unlink()

        # It became shorter after its header was read.
        def shorten(_: str, name: str, part: str | None) -> None:
            if name == shard.name and part and not part.startswith("bytes=0-"):
                shard.write_bytes(whole[:200_000])

        hub.on_file = shorten
        result = run("info", "some/pack", "--deep", code=1)
    assert result.err.splitlines()[1:] == [
        f"error: some/pack: {shard.name}: the hub did not send the requested range"
    ]
