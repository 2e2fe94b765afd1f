"""What every model folder has, whichever command wrote it: a manifest, a card, what came along."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import outlier_mlx
from outlier_mlx.checkpoints.export import FORMATS, export_tier
from outlier_mlx.errors import CheckpointError, CheckpointWarning, OutlierError
from outlier_mlx.imports import import_model
from outlier_mlx.merge import merge
from outlier_mlx.tiers.verify import verify_tier
from tests.awq_builder import Awq, write_awq
from tests.builders import write_overlay
from tests.forms import BLOCKS
from tests.merging import write_merge_config, write_models

Write = Callable[..., Any]


def converted(place: Path) -> Write:
    write_overlay(place / "overlay", layers=2, moe_layers=(1,))
    return lambda out, **more: outlier_mlx.convert(place / "overlay", None, out, **more)


def imported(place: Path) -> Write:
    write_awq(place / "awq", Awq(vocab=288))
    return lambda out, **more: import_model(place / "awq", out, **more)


def merged(place: Path) -> Write:
    write_models(place)
    merge_config = write_merge_config(place)
    return lambda out, **more: merge(merge_config, out, measure=False, **more)


def exported(format: str) -> Callable[[Path], Write]:
    def make(place: Path) -> Write:
        write_overlay(place / "overlay", with_base=True, base_dtype="BF16", **BLOCKS)
        tier = outlier_mlx.convert(place / "overlay", out=place / "tier", tier="bf16")
        return lambda out, **more: export_tier(tier, out, format, **more)

    return make


WRITERS = {"convert": converted, "import": imported, "merge": merged} | {
    f"export {format}": exported(format) for format in FORMATS
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_folder_can_be_verified_replaced_and_found_damaged(name: str, tmp_path: Path) -> None:
    write, out = WRITERS[name](tmp_path), tmp_path / "out"
    write(out)
    for legal in ("LICENSE", "README.md"):  # these change no results
        (out / legal).write_text("of another")
    found = verify_tier(out)
    (manifest,) = (out / name for name in ("tier.json", "checksums.json") if (out / name).exists())
    content = json.loads(manifest.read_text())
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(content["files"]) == files - {"LICENSE", "README.md", manifest.name}
    assert list(content["files"]) == sorted(content["files"])
    assert found.files == len(content["files"]) and content["producer"].startswith("outlier-mlx ")
    with pytest.raises(OutlierError, match="exists; --force replaces it"):
        write(out)
    (out / "theirs").write_text("")
    with pytest.raises(OutlierError, match=f"out: holds theirs, which {manifest.name} does not"):
        write(out, force=True)
    (out / "theirs").rename(out / "NOTICE")
    write(out, force=True)
    assert not (out / "NOTICE").exists() and verify_tier(out) == found
    assert content["format_version"] == {"tier.json": 2, "checksums.json": 1}[manifest.name]
    last = sorted(content["files"])[-1]
    data = (out / last).read_bytes()
    (out / last).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        verify_tier(out)


@pytest.mark.parametrize("name", WRITERS)
def test_a_source_that_goes_away_is_named_not_the_output(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, out = WRITERS[name](tmp_path), tmp_path / "out"
    before = sorted(tmp_path.rglob("*.safetensors"))

    def pulled_out(*_: object) -> None:
        for path in before:
            path.unlink()

    monkeypatch.setattr("outlier_mlx.writing.model_folder.check_space", pulled_out)
    with pytest.raises(OutlierError, match="No such file or directory") as error:
        write(out)
    message = str(error.value)
    assert any(message.startswith(f"{path}: ") for path in before), message
    assert "cannot be read" in message and "cannot write" not in message
    assert not out.exists()


def test_a_card_or_tokenizer_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, source = converted(tmp_path), tmp_path / "overlay"
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    real = Path.open

    def failing(self: Path, *how: Any, **more: Any) -> Any:
        if self == broken:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return real(self, *how, **more)

    monkeypatch.setattr(Path, "open", failing)
    broken = source / "README.md"
    with pytest.warns(CheckpointWarning, match="its metadata cannot be read, so its licence is no"):
        write(tmp_path / "one")
    for name in ("tokenizer.json", "generation_config.json"):
        broken = source / name
        with pytest.raises(CheckpointError, match=f"overlay/{name}: Input/output error"):
            write(tmp_path / "two")


@pytest.mark.parametrize("name", WRITERS)
def test_a_model_without_a_tokenizer_is_written_with_a_warning(name: str, tmp_path: Path) -> None:
    write = WRITERS[name](tmp_path)
    if name == "merge":
        pytest.skip("prompts need one")
    for path in tmp_path.rglob("*token*"):
        path.unlink()
    with pytest.warns(CheckpointWarning, match=": no tokenizer beside it; the model has none"):
        write(tmp_path / "out")


def test_a_tokenizer_that_the_embeddings_do_not_fit(tmp_path: Path) -> None:
    write = converted(tmp_path)
    path = tmp_path / "overlay" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 10**6, "content": "<far>"})
    path.write_text(json.dumps(content))
    words = "overlay: tokenizer.json: the token '<far>' has id 1000000, .* has 288 rows"
    with pytest.raises(CheckpointError, match=words):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def licensed(folder: Path, licence: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Of others\n")
    (folder / "LICENSE").write_text(f"the terms of {licence}")


def test_the_card_of_a_merge_names_all_models_and_their_licences(tmp_path: Path) -> None:
    write = merged(tmp_path)
    models = ["base", *(f"expert_{n}" for n in range(3))]
    for name in models:
        licensed(tmp_path / name, "mit" if name == "base" else "apache-2.0")
    write(tmp_path / "out", bits=4)
    text = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == ["mit", "apache-2.0"] and "merge" in head["tags"]
    assert "- base `base`\n- expert 0 `expert_0`\n- expert 1 `expert_1`\n" in text
    assert "- expert 2 `expert_2`: `apache-2.0`" in text and "quantized to 4 bits" in text
    assert "`LICENSE`, `LICENSE-expert`" in text and str(tmp_path) not in text
    assert (tmp_path / "out" / "LICENSE").read_text() == "the terms of mit"
    assert (tmp_path / "out" / "LICENSE-expert").read_text() == "the terms of apache-2.0"
    (tmp_path / "expert_1" / "README.md").unlink()
    write(tmp_path / "out", force=True)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license" not in yaml.safe_load(text.split("---\n")[1])
    assert "No licence is known for the expert 1; none is assumed." in text


def test_names_of_folders_are_no_markdown(tmp_path: Path) -> None:
    odd = write_awq(tmp_path / "[a](b)`|<i>", Awq(vocab=288)).path
    import_model(odd, tmp_path / "_out_ [c](d)<i>")
    text = (tmp_path / "_out_ [c](d)<i>" / "README.md").read_text()
    assert "- source `[a](b)<i>`\n" in text
    assert "\n# _out_ c(d)i\n" in text
