"""`verify`: any damage to a tier is found, and named by its file or tensor."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import outlier_mlx
from outlier_mlx.errors import CheckpointError
from outlier_mlx.tiers.verify import verify_tier
from tests.builders import Built
from tests.damage import edit_json
from tests.library import Library
from tests.tensor_file import read_stored, stored, write_stored


@pytest.fixture(scope="module")
def overlay(library: Library) -> Built:
    return library.overlay(expert_intermediate=96)


@pytest.fixture(scope="module")
def whole(library: Library, overlay: Built) -> Path:
    return library.tier(overlay, tier="q4")


@pytest.fixture
def tier(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "tier")


def listed(tier: Path) -> dict:
    return json.loads((tier / "tier.json").read_text())["files"]


def sign_again(tier: Path, *more: str) -> None:
    """Make the manifest agree with the files, as one who means harm would; `more` is added."""
    files = {}
    for name in [*listed(tier), *more]:
        data = (tier / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit_json(tier / "tier.json", files=files)


def put(tier: Path, name: str, text: str = "{}") -> None:
    (tier / name).parent.mkdir(parents=True, exist_ok=True)
    (tier / name).write_text(text)


@pytest.mark.parametrize("options", [{}, {"tier": "f32"}, {"experts": "affine2"}, {"tier": "q8"}])
def test_what_convert_writes_is_whole(overlay: Built, tmp_path: Path, options: dict) -> None:
    tier = outlier_mlx.convert(overlay.path, out=tmp_path / "tier", **options)
    seen: list[tuple[int, int | None]] = []
    found = verify_tier(tier, lambda done, total: seen.append((done, total)))
    assert found.files == len(listed(tier))
    assert seen[-1] == (found.nbytes, found.nbytes)


def test_any_changed_byte_is_found_and_its_file_named(tier: Path) -> None:
    chance = random.Random(1)
    for name in listed(tier):
        path = tier / name
        data = path.read_bytes()
        places = {0, len(data) - 1, *(chance.randrange(len(data)) for _ in range(12))}
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=name.split("-")[0]):
                verify_tier(tier)
        path.write_bytes(data)
    verify_tier(tier)


def test_missing_short_and_long_files_are_named(tier: Path) -> None:
    for name in listed(tier):
        path = tier / name
        data = path.read_bytes()
        for damage in (data[:-1], data + b"\0"):
            path.write_bytes(damage)
            with pytest.raises(CheckpointError, match=f"{name}: .* bytes, expected"):
                verify_tier(tier)
        path.unlink()
        with pytest.raises(CheckpointError, match=name):
            verify_tier(tier)
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["model-extra.safetensors", "helper.py", "sitecustomize.py"])
def test_files_that_would_be_loaded_but_are_not_listed(tier: Path, name: str) -> None:
    (tier / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{name}: not listed"):
        verify_tier(tier)


# What mlx-lm and transformers would read beside the listed files
READ = [
    *("chat_template.jinja", "chat_template.json", "added_tokens.json", "special_tokens_map.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "spiece.model"),
    *("adapter_config.json", "hf_quant_config.json", "preprocessor_config.json", "x.tiktoken"),
    *("additional_chat_templates/tool.jinja", "model.safetensors.index.json", "Vocab.JSON"),
]


@pytest.mark.parametrize("name", READ)
def test_files_that_would_change_answers(tier: Path, name: str) -> None:
    if name in listed(tier):
        files = listed(tier)
        del files[name]
        edit_json(tier / "tier.json", files=files)
    else:
        put(tier, name)
    with pytest.raises(CheckpointError, match=f"{name}: not listed in tier.json"):
        verify_tier(tier)


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", "picture.png", "measured.json", "scores.json", "LICENSE-base", "deep/x.txt"),
        *("._config.json", "._outlier_moe.py", ".DS_Store", "deep/config.json"),
    ],
)
def test_files_that_nothing_reads(tier: Path, name: str) -> None:
    put(tier, name)
    verify_tier(tier)


@pytest.mark.parametrize(
    "name", ["deep/er/x.py", "x.pyc", "x.so", "X.PY", "deep/__pycache__/x.cpython-311.pyc"]
)
@pytest.mark.parametrize("signed", [False, True])
def test_code_anywhere_below_the_folder(tier: Path, name: str, signed: bool) -> None:
    put(tier, name, "")
    if signed:
        sign_again(tier, name)
    with pytest.raises(CheckpointError, match=rf"{name}: (code, and|compiled code|not listed)"):
        verify_tier(tier)


def test_bytecode_that_python_left(tier: Path) -> None:
    """It would run in place of the text that was verified."""
    put(tier, "__pycache__/outlier_moe.cpython-311.pyc")
    with pytest.raises(CheckpointError, match=r"__pycache__/outlier_moe.*\.pyc: .* delete it"):
        verify_tier(tier)


@pytest.mark.parametrize(
    "name",
    ["sub/x.py", "x.pyc", "../x.py", "/tmp/x.py", "outlier_moe.pyc", "./outlier_moe.py", 3, None],
)
def test_only_the_code_of_a_tier_may_be_named(tier: Path, name: object) -> None:
    edit_json(tier / "config.json", model_file=name)
    sign_again(tier)
    with pytest.raises(CheckpointError, match=r"config\.json: model_file is "):
        verify_tier(tier)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_transformers_would_run(tier: Path, file: str) -> None:
    edit_json(tier / file, auto_map={"AutoTokenizer": ["owner/repo--x.T", None]})
    sign_again(tier)
    with pytest.raises(CheckpointError, match=f"{file}: auto_map names code"):
        verify_tier(tier)


def test_a_tier_without_its_code(tier: Path) -> None:
    files = listed(tier)
    del files["outlier_moe.py"]
    (tier / "outlier_moe.py").unlink()
    edit_json(tier / "tier.json", files=files)
    with pytest.raises(CheckpointError, match=r"outlier_moe\.py: not listed"):
        verify_tier(tier)


def rewrite(tier: Path, *pairs: tuple[str, str]) -> None:
    path = tier / "outlier_moe.py"
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    sign_again(tier)


def test_a_tier_stays_whole_when_only_comments_change(tier: Path) -> None:
    """Comments, docstrings, line breaks, and the comments of kernels."""
    rewrite(
        tier,
        ('"""Model code of an Outlier tier', '"""Once the model code of a tier'),
        ("\nclass Model(", "\n# A comment.\n\n\nclass Model("),
        ("// Shared by the tq1_0 kernels", "// Another comment\n//"),
        ("enum Decode", "/* long\n comment */\n  enum   Decode"),
        ("def use_metal() -> bool:", "def use_metal(\n) -> bool:"),
    )
    verify_tier(tier)


FOREIGN_CODE = {
    "statement": ("\nclass Model(", "\nimport os\n\n\nclass Model("),
    "number": ("SORT_FROM_PAIRS = 64", "SORT_FROM_PAIRS = 65"),
    "text": ('"signs", "floor"', '"signs", "flaw"'),
    "kernel": ("sums[i] += DECODE", "sums[i] -= DECODE"),
    "kernel-comment": ("sums[i] += DECODE", "// sums[i] += DECODE"),
    "kernel-line": ("// Shared by the tq1_0 kernels", "// \\\\\n// Shared by the tq1_0 kernels"),
    "kernel-quote": ("// Shared by the tq1_0 kernels", "' // ' // Shared by the tq1_0 kernels"),
    "kernel-return": (
        "// Shared by the tq1_0 kernels",
        "// \\x0d x // Shared by the tq1_0 kernels",
    ),
    "kernel-directive": ("#define UNROLL", "// #define UNROLL"),
    "default": ("sorted_indices: bool = False", "sorted_indices: bool = True"),
    "encoding": ('"""Model code', '# coding: utf-7\n"""Model code'),
    "no-python": ("def use_metal() -> bool:", "def use_metal() -> bool"),
}


@pytest.mark.parametrize("name", FOREIGN_CODE)
def test_foreign_model_code_is_refused_even_if_the_manifest_agrees(tier: Path, name: str) -> None:
    rewrite(tier, FOREIGN_CODE[name])
    version = outlier_mlx.__version__
    words = rf"not what this version .*{version}; the tier is by 'outlier-mlx {version}'"
    with pytest.raises(CheckpointError, match=rf"outlier_moe\.py: {words}"):
        verify_tier(tier)


def test_code_of_any_length_is_refused_unread(tier: Path) -> None:
    (tier / "outlier_moe.py").write_text("(" * 100_000 + "\n" * 10**6)
    sign_again(tier)
    with pytest.raises(CheckpointError, match=r"outlier_moe\.py: not what this version"):
        verify_tier(tier)


# Values

EXPERTS = "model.layers.1.mlp.switch_mlp."
NEVER_WRITTEN = sorted(set(range(256)) - {(256 * q + 242) // 243 for q in range(243)})


def change_values(tier: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change the values of a tensor in place; the manifest agrees afterwards."""
    shard = tier / "model-00001-of-00001.safetensors"
    tensors = read_stored(shard)
    value = tensors[name].array().copy()
    change(value)
    tensors[name] = stored(value, tensors[name].dtype)
    write_stored(shard, tensors)
    sign_again(tier)


def test_bytes_that_no_trits_are_packed_into(whole: Path, tmp_path: Path) -> None:
    assert len(NEVER_WRITTEN) == 13
    for byte in NEVER_WRITTEN:
        tier = shutil.copytree(whole, tmp_path / str(byte))

        def change(rows: Any, byte: int = byte) -> None:
            rows[2, 17, 5] = byte

        change_values(tier, f"{EXPERTS}gate_proj.weight", change)
        words = r"gate_proj\.weight\[2\]: .*17, 5"
        with pytest.raises(CheckpointError, match=words):
            verify_tier(tier)


def test_padding_that_is_not_zero(tier: Path) -> None:
    def change(rows: Any) -> None:  # 64 columns are 12 bytes and 4 trits; the row has 16 bytes
        rows[0, 3, -1] = 0

    change_values(tier, f"{EXPERTS}up_proj.weight", change)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\[0\]: "):
        verify_tier(tier)


VALUES: dict[str, tuple[str, float, str]] = {
    "negative": (
        f"{EXPERTS}down_proj.scales",
        -1.0,
        r"down_proj\.scales\[1\]: scale -1.0",
    ),
    "scale": (f"{EXPERTS}down_proj.scales", float("nan"), r"down_proj\.scales\[1\]: scale nan"),
    "router": (
        "model.layers.1.mlp.gate.weight",
        float("inf"),
        "gate.weight: holds NaN",
    ),
    "norm": ("model.norm.weight", float("nan"), "model.norm.weight: holds NaN or infinity"),
    "alpha": ("model.layers.3.mlp.alpha", float("-inf"), "alpha: holds NaN or infinity"),
    "bias": ("model.layers.0.self_attn.q_proj.biases", float("nan"), "biases: holds NaN"),
}


@pytest.mark.parametrize("name", VALUES)
def test_numbers_that_are_not_finite(tier: Path, name: str) -> None:
    tensor, value, words = VALUES[name]

    def change(values: Any) -> None:
        values[-3 if values.ndim > 1 else -1, ...] = value

    change_values(tier, tensor, change)
    with pytest.raises(CheckpointError, match=words):
        verify_tier(tier)


def test_experts_in_mlx_own_format_are_looked_into(overlay: Built, tmp_path: Path) -> None:
    tier = outlier_mlx.convert(overlay.path, out=tmp_path / "tier", experts="affine2", tier="f32")
    whole = shutil.copytree(tier, tmp_path / "whole")

    def code_3(words: Any) -> None:
        words[1, 2, 3] |= 3 << 6

    def group(scales: Any) -> None:
        scales[0, 0, 0] *= 2

    change_values(tier, f"{EXPERTS}up_proj.weight", code_3)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\[1\]: .*code 3"):
        verify_tier(tier)
    change_values(whole, f"{EXPERTS}up_proj.scales", group)
    with pytest.raises(CheckpointError, match=r"up_proj\.scales\[0\]: not the scales of ternary"):
        verify_tier(whole)


def test_tensors_are_held_against_the_config(tier: Path) -> None:
    shard = tier / "model-00001-of-00001.safetensors"
    tensors = read_stored(shard)
    name = "model.layers.1.mlp.switch_mlp.up_proj.scales"
    del tensors[name]
    write_stored(shard, tensors)
    edit_json(tier / "model.safetensors.index.json", weight_map=dict.fromkeys(tensors, shard.name))
    sign_again(tier)
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        verify_tier(tier)


def test_a_config_for_other_shapes_is_refused(tier: Path) -> None:
    edit_json(tier / "config.json", moe_intermediate_size=95)
    sign_again(tier)
    with pytest.raises(CheckpointError, match=r"switch_mlp.*expected"):
        verify_tier(tier)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 3}, "format_version 3, expected 2"),
        ({"format_version": 1}, "^tier.json: .* by outlier-mlx 0.1: convert the overlay again$"),
        ({"files": []}, "no list of files"),
        ({"files": {"config.json": {}}}, "config.json: sha256 and bytes"),
        ({"files": {"../x": {"sha256": "", "bytes": 0}}}, "does not list config.json"),
    ],
)
def test_a_manifest_that_is_none(tier: Path, change: dict, words: str) -> None:
    edit_json(tier / "tier.json", **change)
    with pytest.raises(CheckpointError, match=words):
        verify_tier(tier)
