"""Packed experts: where they are looked for, and how files and index can disagree."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx import open_overlay
from outlier_mlx.checkpoints.packed import MONOLITH_VARIABLE, PackedTrits
from outlier_mlx.errors import CheckpointError, CheckpointWarning
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.ternary import pack_rows
from tests import damage
from tests.builders import Built, write_overlay
from tests.engine import tier_of
from tests.form_builders import pack_flat, to_packed
from tests.forms import ODD, assert_same_contents, build, contents, refused, written
from tests.tensor_file import read_arrays

KEY = "base.model.layers.1.mlp.experts.2.up_ternary"
SCALE = "base.model.layers.1.mlp.experts.2.up_scale"
FILE = "base_model_layers_1_mlp_experts_2_up_ternary.bin"


def inner(built: Built) -> Path:
    return built.path / "packed_experts"


def index(built: Built, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the parsed index.json."""
    path = inner(built) / "index.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def entry(**changes: Any) -> Callable[[Built], None]:
    """Change fields of one entry of the index, or take them out."""

    def change(value: dict[str, Any]) -> None:
        fields = value[KEY] | changes
        value[KEY] = {name: field for name, field in fields.items() if field is not damage.REMOVE}

    return lambda built: index(built, change)


def byte(value: int, at: int) -> Callable[[Built], None]:
    """Put one byte into a file of trits."""

    def write(built: Built) -> None:
        data = bytearray((inner(built) / FILE).read_bytes())
        data[at] = value
        (inner(built) / FILE).write_bytes(data)

    return write


def link_out(built: Built) -> None:
    (inner(built) / FILE).rename(built.path.parent / "outside")
    (inner(built) / FILE).symlink_to(built.path.parent / "outside")


FILES: dict[str, tuple[Callable[[Built], Any], tuple[str, ...]]] = {
    "no index": (lambda b: (inner(b) / "index.json").unlink(), ("packed_experts", "no index.json")),
    "an index that is no object": (
        lambda b: (inner(b) / "index.json").write_text("[]"),
        ("index.json", "object"),
    ),
    "a key twice": (
        lambda b: (inner(b) / "index.json").write_text('{"a": {}, "a": {}}'),
        ("index.json", "twice"),
    ),
    "two spellings": (
        lambda b: index(b, lambda i: i.update({KEY.removeprefix("base."): i[KEY]})),
        ("index.json", KEY.removeprefix("base."), "same weight"),
    ),
    "a key of nothing": (lambda b: index(b, lambda i: i.update({"x": i[KEY]})), ("index.json: x",)),
    "an entry that is no object": (
        lambda b: index(b, lambda i: i.update({KEY: 1})),
        ("index.json", KEY),
    ),
    "no file": (entry(file=damage.REMOVE), (KEY, "file")),
    "a file that is no name": (entry(file=["x"]), (KEY, "file")),
    "no shape": (entry(shape=damage.REMOVE), (KEY, "shape")),
    "a negative shape": (entry(shape=[-37, -44]), (KEY, "shape")),
    "a shape of floats": (entry(shape=[37.0, 44]), (KEY, "shape")),
    "a shape of booleans": (entry(shape=[True, 44]), (KEY, "shape")),
    "a shape without end": (entry(shape=[2**70, 2**70]), (KEY, "shape")),
    "a large shape": (entry(shape=[2**31 - 1, 2**31 - 1]), (KEY, "packed_bytes")),
    "a shape of three": (entry(shape=[37, 44, 1]), (KEY, "[37, 44, 1]")),
    "a shape of one": (entry(shape=[37 * 44]), (KEY, "[1628]")),
    "another shape of the same size": (entry(shape=[44, 37]), ("(44, 37)", "(37, 44)")),
    "another format": (entry(format="tq1_0"), (KEY, "tq1_0", "tq10")),
    "another dtype": (entry(dtype="int8"), (KEY, "int8", "uint8")),
    "other packed bytes": (entry(packed_bytes=327), (KEY, "327", "326")),
    "packed bytes as text": (entry(packed_bytes="326"), (KEY, "326")),
    "a scale in float32": (
        lambda b: index(b, lambda i: i[SCALE].update(dtype="float32")),
        (SCALE, "float32"),
    ),
    "an absolute file": (entry(file="/etc/passwd"), ("/etc/passwd", "plain path")),
    "a file that climbs out": (entry(file="../config.json"), ("../config.json", "plain path")),
    "a file with a backslash": (entry(file="..\\x"), ("plain path",)),
    "a file on a drive": (entry(file="C:x"), ("C:x", "plain path")),
    "a file with NUL": (entry(file="x\0y"), ("plain path",)),
    "a file of a long name": (entry(file=300 * "x"), ("xxx",)),
    "a file that is a folder": (entry(file="."), ("no such file",)),
    "a link out of the folder": (link_out, (FILE, "links out")),
    "a file is missing": (lambda b: (inner(b) / FILE).unlink(), (FILE, "no such file")),
    "a file is short": (lambda b: damage.truncate(inner(b) / FILE, 1), (FILE, "325", "326")),
    "a file is long": (lambda b: (inner(b) / FILE).open("ab").write(b"\x79"), (FILE, "327")),
    "a scale file is short": (
        lambda b: damage.truncate(inner(b) / FILE.replace("ternary", "scale"), 1),
        ("up_scale.bin", "73 bytes"),
    ),
    "a byte of 243": (byte(243, 7), (FILE, KEY, "243")),
    "a byte of 255, last": (byte(255, 325), (FILE, KEY, "255")),
    "an entry is missing": (
        lambda b: index(b, lambda i: i.pop(KEY)),
        ("layer 1, expert 2", "up trits"),
    ),
    "an expert too many": (
        lambda b: index(b, lambda i: i.update({KEY.replace("experts.2", "experts.4"): i[KEY]})),
        ("experts.4", "4 experts"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_refused(case: str, tmp_path: Path):
    built = build(tmp_path / "o", "packed")
    harm, said = FILES[case]
    harm(built)
    refused(built, *said)


HEAD = struct.Struct("<4s5I6Q")


def head(**changes: Any) -> Callable[[Built], None]:
    """Change the header of a monolith."""
    names = ["magic", "version", "layers", "experts", "entries", "parts", "length"]

    def write(built: Built) -> None:
        data = bytearray((inner(built) / "experts.bin").read_bytes())
        fields = list(HEAD.unpack_from(data))
        for name, value in changes.items():
            fields[names.index(name)] = value
        data[: HEAD.size] = HEAD.pack(*fields)
        (inner(built) / "experts.bin").write_bytes(data)

    return write


def row(number: int, **changes: int) -> Callable[[Built], None]:
    """Change a line of a monolith's table."""
    names = ["layer", "expert", "offset", "length"]

    def write(built: Built) -> None:
        data = bytearray((inner(built) / "experts.bin").read_bytes())
        at = 4096 + 32 * number
        fields = list(struct.unpack_from("<4Q", data, at))
        for name, value in changes.items():
            fields[names.index(name)] = value
        data[at : at + 32] = struct.pack("<4Q", *fields)
        (inner(built) / "experts.bin").write_bytes(data)

    return write


# 2 layers of 4 experts: the table ends at 8192, and an expert takes 4096 bytes.
MONOLITHS: dict[str, tuple[Callable[[Built], Any], tuple[str, ...]]] = {
    "no index": (lambda b: (inner(b) / "index.json").unlink(), ("index.json",)),
    "another magic": (head(magic=b"OEXT"), ("OEXS",)),
    "another version": (head(version=2), ("version 2",)),
    "five parts": (head(parts=5), ("5 parts",)),
    "other entries": (head(entries=9), ("9 entries", "2 layers of 4")),
    "absurd entries": (head(layers=2**31, experts=1, entries=2**31), ("2147483648 entries",)),
    "entries beyond the file": (head(layers=2**15, experts=16, entries=2**19), ("its table",)),
    "an entry twice": (row(1, expert=0), ("listed twice",)),
    "an expert too many": (row(3, expert=4), ("experts 0 to 3",)),
    "a layer too many": (row(3, layer=2), ("of 2 layers",)),
    "a layer that is not MoE": (
        lambda b: [row(n, layer=0)(b) for n in range(4)],
        ("layer 0", "index.json"),
    ),
    "an offset between": (row(2, offset=8192 + 8192 + 8), ("expert 2", "4096")),
    "an offset in the table": (row(2, offset=4096), ("expert 2", "8192")),
    "an offset beyond": (row(2, offset=2**40), ("expert 2", "before the file's end")),
    "the largest offset": (row(2, offset=2**64 - 4096), ("expert 2", "before the file's end")),
    "another length": (row(2, length=1100), ("expert 2", "1100 bytes")),
    "overlapping": (row(2, offset=8192 + 4096), ("overlaps",)),
    "parts of another size": (head(length=327), ("1", "parts take")),
    "truncated": (
        lambda b: damage.truncate(inner(b) / "experts.bin", 4000),
        ("before the file's",),
    ),
    "cut in its padding": (
        lambda b: damage.truncate(inner(b) / "experts.bin", 1),
        ("before the file's",),
    ),
    "cut in its header": (
        lambda b: (inner(b) / "experts.bin").write_bytes(b"OEXS\1\0\0\0"),
        ("OEXS",),
    ),
    "empty": (lambda b: (inner(b) / "experts.bin").write_bytes(b""), ("OEXS",)),
    "other shapes in the index": (
        entry(shape=[37, 45], packed_bytes=333),
        ("layer 1, expert 2, up trits", "(37, 45)"),
    ),
    "an entry of the index is missing": (
        lambda b: index(b, lambda i: i.pop(SCALE)),
        ("layer 1, expert 2, up scale", "index.json"),
    ),
}


@pytest.mark.parametrize("case", MONOLITHS)
def test_monolith_refused(case: str, tmp_path: Path):
    built = build(tmp_path / "o", "monolith", scale_form="one", with_base=True)
    harm, said = MONOLITHS[case]
    harm(built)
    refused(built, *said)


def test_the_example_of_the_format(tmp_path: Path):
    """+1 0 -1 -1 0 | +1 is 86, 122."""
    assert pack_flat(np.array([1, 0, -1, -1, 0, 1])) == bytes([86, 122])


def test_other_padding_only_warns(tmp_path: Path):
    built = build(tmp_path / "o", "packed")
    last = (inner(built) / FILE).read_bytes()[-1]  # 1628 trits: two pad the last byte
    byte(last - 81, 325)(built)
    with pytest.warns(CheckpointWarning, match="up_ternary: its last byte is padded"):
        found = open_overlay(built.path).experts[1][2].up.trits.read()
    np.testing.assert_array_equal(found, built.trits[1, 2, "up"])
    with pytest.warns(CheckpointWarning, match="up_ternary: its last byte is padded"):
        tier = tier_of(built.path, None, tmp_path / "tier")
    stored = read_arrays(tier / "model-00001-of-00001.safetensors")
    rows = stored["model.layers.1.mlp.switch_mlp.up_proj.weight"][2]
    np.testing.assert_array_equal(rows, pack_rows(built.trits[1, 2, "up"]))


@pytest.mark.parametrize("shape", [(12, 20), (12, 18), (7, 13), (1, 3), (5, 1)], ids=str)
def test_rows_for_a_tier(shape: tuple[int, int], tmp_path: Path):
    """Whatever rows are asked for, and whether or not they begin and end with a byte."""
    trits = np.random.default_rng(1).integers(-1, 2, shape, np.int8)
    (tmp_path / "x.bin").write_bytes(bytes(7) + pack_flat(trits) + bytes(7))
    stored = TensorRef("x", tmp_path / "x.bin", "U8", (-(-trits.size // 5),), 7)
    packed = PackedTrits(stored, shape)
    for start in range(shape[0]):
        for stop in (*range(start + 1, shape[0] + 1), None):
            np.testing.assert_array_equal(packed.read(start, stop), trits[start:stop])
            np.testing.assert_array_equal(
                packed.read_rows(start, stop), pack_rows(trits[start:stop])
            )


def test_a_monolith_goes_before_files(tmp_path: Path):
    """Experts from experts.bin where there is one, even if the files are there as well."""
    built = build(tmp_path / "o", "packed")
    whole = build(tmp_path / "w", "monolith", scale_form=("0d", "per_row", "one"))
    (inner(built) / "experts.bin").write_bytes((inner(whole) / "experts.bin").read_bytes())
    for path in inner(built).glob("*_ternary.bin"):
        path.write_bytes(b"")
    overlay = open_overlay(built.path)
    assert overlay.form == "monolith"
    assert_same_contents(contents(overlay), written(built))


def test_experts_in_shards_go_first(tmp_path: Path):
    built = write_overlay(tmp_path / "o", tokenizer=False, **ODD)
    packed = to_packed(write_overlay(tmp_path / "p", tokenizer=False, **ODD, seed=9))
    inner(packed).rename(inner(built))
    with pytest.warns(CheckpointWarning, match="packed_experts is ignored"):
        overlay = open_overlay(built.path)
    assert overlay.form == "v3.2"
    assert_same_contents(contents(overlay), written(built))


# A monolith that is told of by the environment


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    """An overlay without experts, whose monolith is in another folder that a variable names."""
    built = build(tmp_path / "o", "monolith")
    inner(built).rename(tmp_path / "packed")
    monkeypatch.setenv(MONOLITH_VARIABLE, str(tmp_path / "packed/experts.bin"))
    return built


def test_the_environment_names_a_monolith(elsewhere: Built):
    with pytest.warns(CheckpointWarning, match=r"come from .*packed from synthetic"):
        overlay = open_overlay(elsewhere.path)
    assert overlay.form == "monolith"
    found = contents(overlay)
    expected = {k: v for k, v in written(elsewhere).items() if k not in elsewhere.base}
    assert_same_contents(found, expected)


@pytest.mark.filterwarnings("ignore::outlier_mlx.errors.CheckpointWarning")
def test_the_environment_goes_before_the_folder(elsewhere: Built, tmp_path: Path):
    other = build(tmp_path / "other", "monolith", seed=5)
    inner(other).rename(inner(elsewhere))
    found = open_overlay(elsewhere.path).experts[1][0].gate.trits.read()
    np.testing.assert_array_equal(found, elsewhere.trits[1, 0, "gate"])


@pytest.mark.filterwarnings("error::outlier_mlx.errors.CheckpointWarning")
def test_overlays_with_experts_do_not_ask_the_environment(elsewhere: Built, tmp_path: Path):
    built = write_overlay(tmp_path / "v32", tokenizer=False, seed=4)
    assert_same_contents(contents(open_overlay(built.path)), written(built))


def test_a_monolith_of_another_model(elsewhere: Built, tmp_path: Path):
    """Names are compared where both are known; shapes always."""
    (tmp_path / "packed/meta.json").write_text('{"model_ref": "owner/A"}')
    damage.edit_config(elsewhere.path, _name_or_path="owner/B")
    with pytest.raises(CheckpointError, match=r"experts of owner/A, not of owner/B"):
        open_overlay(elsewhere.path)
    damage.edit_config(elsewhere.path, _name_or_path="owner/A", hidden_size=48)
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match=r"\(4, 48\)"):
        open_overlay(elsewhere.path)


def test_no_such_monolith(elsewhere: Built, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(MONOLITH_VARIABLE, "/no/such/experts.bin")
    with pytest.raises(CheckpointError, match=rf"{MONOLITH_VARIABLE}: /no/such/experts\.bin"):
        open_overlay(elsewhere.path)


def test_nothing_outside_the_folder_is_looked_for(
    elsewhere: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """No folder of the user's: a global place would serve any model the experts of another."""
    monkeypatch.delenv(MONOLITH_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "packed").rename(tmp_path / "packed_experts")
    with pytest.raises(CheckpointError, match="layer 1 has 0 experts"):
        open_overlay(elsewhere.path)
