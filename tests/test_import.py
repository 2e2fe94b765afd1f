"""The command `import`: what it prints, repositories, damage found by `verify`, its page."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.engine.loading import load_model
from outlier_mlx.errors import CheckpointError
from outlier_mlx.tiers.verify import verify_tier
from tests.awq_builder import Awq, write_awq
from tests.damage import edit_config
from tests.gguf_builder import build as build_gguf
from tests.hub import Hub, opened
from tests.program import assert_refused, run


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("import") / "Mixtral-2x-AWQ"
    (write_awq(folder, Awq(vocab=288)).path / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\nA card.\n"
    )
    (folder / "pytorch_model.bin").write_text("not for us")
    return folder


@pytest.fixture(scope="module")
def imported(awq: Path) -> Path:
    run("import", awq, "--out", awq.parent / "mlx")
    return awq.parent / "mlx"


def test_what_it_prints(awq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = run("import", awq)
    assert told.out == ""
    assert "Mixtral-2x-AWQ-mlx: from AutoAWQ int4" in told.err
    assert "exact: scales and biases are float32" in told.err
    assert told.err.endswith("wrote Mixtral-2x-AWQ-mlx\n")
    card = (tmp_path / "Mixtral-2x-AWQ-mlx" / "README.md").read_text()
    assert "license: apache-2.0" in card and "AutoAWQ int4" in card
    assert "exists; --force replaces it" in run("import", awq, code=1).err
    assert run("import", awq, "--force", "--quiet").err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--bits", "6"], 2, "--bits"),
        (["--dtype", "bfloat16"], 2, "--dtype"),
        (["--bits", "5", "--dtype", "float32"], 2, "4 bits are exact"),
        (["--k-quants", "8bit"], 1, "are for GGUF"),
        (["--revision", "v1"], 1, "a folder has no revision"),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str], code: int, words: str, awq: Path, tmp_path: Path
) -> None:
    told = run("import", awq, "--out", tmp_path / "mlx", *arguments, code=code)
    assert words in told.err
    assert not list(tmp_path.iterdir())


def test_sources_that_are_none(tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    for source, words in [
        (tmp_path / "nothing", "no such folder"),
        (tmp_path, "no *.safetensors and no *.gguf files"),
        (tmp_path / "model.gguf", "no such folder"),
        (Path(__file__), "test_import.py: expected a folder or a .gguf file"),
    ]:
        assert_refused(run("import", source, "--out", out, code=1), words)
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.gguf").write_bytes(b"")
    assert_refused(run("import", tmp_path / "two", "--out", out, code=1), "--file")
    assert not out.exists()


def test_gguf_beside_safetensors(awq: Path, tmp_path: Path) -> None:
    """GGUF is taken where the safetensors are no model, such as an adapter; else they are."""
    folder, out = tmp_path / "both", tmp_path / "mlx"
    folder.mkdir()
    build_gguf().write(folder / "MODEL.GGUF")
    mx.save_safetensors(str(folder / "adapter.safetensors"), {"q.lora_a": mx.zeros((2, 2))})
    assert "both: no config.json" in run("import", folder, "--out", out, code=1).err
    assert "from GGUF F" in run("import", folder / "MODEL.GGUF", "--out", out).err
    (folder / "MODEL.GGUF").rename(folder / "model.gguf")
    assert "from GGUF F" in run("import", folder, "--out", out, "--force").err
    for name in ("config.json", "model.safetensors"):
        shutil.copy(awq / name, folder)
    assert "from AutoAWQ" in run("import", folder, "--out", out, "--force").err
    told = run("import", folder, "--out", out, "--force", "--file", "model.gguf")
    assert "from GGUF F" in told.err


def test_a_tokenizer_with_more_tokens_than_embeddings(awq: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(awq, tmp_path / "awq")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 288, "content": "<x>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused = run("import", folder, "--out", tmp_path / "mlx", code=None)
    assert_refused(refused, "tokenizer.json: the token '<x>' has id 288", "288 rows")


def test_a_sliding_window_is_noted(awq: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(awq, tmp_path / "awq")
    edit_config(folder, sliding_window=4096)
    assert "beyond 4096 tokens" in run("import", folder, "--out", tmp_path / "mlx").err


def test_info_knows_its_experts(imported: Path, awq: Path) -> None:
    found = inspect(imported)
    rows = {row.kind: row.params for row in found.rows}
    assert rows["router"] == 2 * 2 * 64 and rows["experts"] == 2 * 2 * 3 * 64 * 96
    # With two experts and top-2, all of a frankenMoE is active.
    assert found.active_params == found.params == inspect(awq).params


def test_loading_the_source_says_what_to_do(awq: Path) -> None:
    told = run("generate", "--model", awq, "--prompt", "a", code=1)
    assert "convert it with `outlier-mlx import`" in told.err


def test_models_that_mlx_lm_wrote_have_both_names(imported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(imported, tmp_path / "mlx")
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    edit_config(folder, quantization_config=quantization)
    load_model(folder)
    assert "already an MLX model" in run("import", folder, "--out", tmp_path / "b", code=1).err


def test_any_changed_byte_is_found_and_its_file_named(imported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(imported, tmp_path / "mlx")
    listed = json.loads((folder / "checksums.json").read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {*listed, "checksums.json", "README.md"}
    assert "whole" in run("verify", folder).out
    chance = random.Random(2)
    for name in listed:
        data = (folder / name).read_bytes()
        for place in {0, len(data) - 1, *(chance.randrange(len(data)) for _ in range(8))}:
            changed = bytearray(data)
            changed[place] ^= 1 << chance.randrange(8)
            (folder / name).write_bytes(changed)
            with pytest.raises(CheckpointError, match=name.split("-")[0]):
                verify_tier(folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            verify_tier(folder)
        (folder / name).write_bytes(data)
    (folder / "model-extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra\.safetensors: not listed in checksums\.json"):
        verify_tier(folder)


def test_a_repository(awq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    (commit,) = hub.add("owner/Mixtral-2x-AWQ", awq)
    (tmp_path / "lora").mkdir()
    mx.save_safetensors(str(tmp_path / "lora" / "lora.safetensors"), {"q.lora_a": mx.zeros((2,))})
    hub.add("owner/lora", tmp_path / "lora")
    with opened(hub, tmp_path, monkeypatch):
        run("import", "owner/Mixtral-2x-AWQ", "--out", tmp_path / "mlx", "--quiet")
        other = run("import", "owner/lora", "--out", tmp_path / "other", code=1)
        assert "owner/lora: no config.json; name a GGUF file of a repository" in other.err
    asked = hub.files_asked("owner/Mixtral-2x-AWQ")
    assert "model.safetensors" in asked and "pytorch_model.bin" not in asked
    source = json.loads((tmp_path / "mlx" / "checksums.json").read_text())["source"]
    assert source["name"] == "owner/Mixtral-2x-AWQ" and source["revision"] == commit
    card = (tmp_path / "mlx" / "README.md").read_text()
    assert "base_model: owner/Mixtral-2x-AWQ" in card and commit in card
