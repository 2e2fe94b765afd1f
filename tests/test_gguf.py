"""Broken GGUF files, and blocks that are no trits with one scale a row."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx import open_overlay
from tests import damage
from tests.builders import Built, write_overlay
from tests.form_builders import to_gguf
from tests.forms import BLOCKS, build, refused


def rename_experts(built: Built, change: Callable[[str], str]) -> None:
    with (built.path / "experts.gguf").open("r+b") as file:
        data = file.read()
        file.seek(0)
        file.write(change(data.decode("latin-1")).encode("latin-1"))


def sizes(width: int, out: int) -> str:
    """How dimensions of two experts are written, as text of bytes."""
    return struct.pack("<3Q", width, out, 2).decode("latin-1")


GGUFS: dict[str, tuple[Callable[[Built], Any], tuple[str, ...]]] = {
    "a truncated file": (
        lambda b: damage.truncate(b.path / "experts.gguf", 3000),
        ("experts.gguf",),
    ),
    "half a header": (
        lambda b: (b.path / "experts.gguf").write_bytes(
            (b.path / "experts.gguf").read_bytes()[:100]
        ),
        ("experts.gguf",),
    ),
    "another magic": (
        lambda b: rename_experts(b, lambda t: "GGML" + t[4:]),
        ("experts.gguf", "not a GGUF file"),
    ),
    "tensors beyond count": (
        lambda b: rename_experts(b, lambda t: t[:8] + "\xff" * 8 + t[16:]),
        ("experts.gguf",),
    ),
    "fields beyond count": (
        lambda b: rename_experts(b, lambda t: t[:16] + "\xff\xff\xff\x7f" + t[20:]),
        ("experts.gguf",),
    ),
    "a matrix is missing": (
        lambda b: rename_experts(b, lambda t: t.replace("ffn_up_exps", "ffn_xx_exps")),
        ("layer 1, expert 0", "up trits"),
    ),
    "the layer of another model": (
        lambda b: rename_experts(b, lambda t: t.replace("blk.1.ffn_up_", "blk.9.ffn_up_")),
        ("blk.9", "2 layers"),
    ),
    "scales of their own": (
        lambda b: rename_experts(
            b, lambda t: t.replace("blk.1.ffn_gate_inp.weight", "blk.1.ffn_up_exps.scalexx")
        ),
        ("scalexx",),
    ),
    "rows that blocks do not divide": (
        lambda b: rename_experts(b, lambda t: t.replace(sizes(256, 512), sizes(128, 1024), 1)),
        ("experts.gguf", "not a multiple of", "256"),
    ),
    "fewer bytes than weights": (
        lambda b: rename_experts(b, lambda t: t.replace(sizes(512, 256), sizes(512, 2**30), 1)),
        ("experts.gguf",),
    ),
    "a router in blocks": (
        lambda b: rename_experts(
            b, lambda t: t.replace("blk.1.ffn_up_exps.weight", "blk.1.ffn_gate_inp.weigh")
        ),
        ("expert 0", "up trits"),
    ),
}


@pytest.mark.parametrize("case", GGUFS)
def test_gguf_refused(case: str, tmp_path: Path):
    built = build(tmp_path / "o", "gguf")
    harm, said = GGUFS[case]
    harm(built)
    refused(built, *said)


def write_gguf(built: Built, part: str, blocks: np.ndarray, kind: str) -> None:
    """Put other blocks in the place of one merged tensor, which must take as many bytes."""
    import gguf

    path = built.path / "experts.gguf"
    found = next(t for t in gguf.GGUFReader(path).tensors if f"{part}_exps" in t.name)
    assert found.n_bytes == blocks.size and found.tensor_type.name == kind
    with path.open("r+b") as file:
        file.seek(found.data_offset)
        file.write(blocks.tobytes())


@pytest.mark.parametrize("d", [np.inf, np.nan, -np.inf])
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_block_scales_are_finite(d: float, kind: str, tmp_path: Path):
    built = to_gguf(write_overlay(tmp_path / "o", tokenizer=False, **BLOCKS), kind=kind)
    size = {"TQ1_0": 54, "TQ2_0": 66}[kind]
    blocks = np.zeros((2 * 512, size), np.uint8)
    blocks[700, -2:] = np.array([d], "<f2").view(np.uint8)
    write_gguf(built, "up", blocks.reshape(-1), kind)
    refused(built, "experts.gguf: blk.1.ffn_up_exps.weight[1]", "row 0")


def test_a_row_has_one_scale(tmp_path: Path):
    built = build(tmp_path / "o", "gguf")
    blocks = np.zeros((2 * 256, 2, 54), np.uint8)  # zeros are trits of -1
    blocks[..., -2:] = np.array([0.5], "<f2").view(np.uint8)
    blocks[3, 1, -2:] = np.array([0.25], "<f2").view(np.uint8)
    write_gguf(built, "down", blocks.reshape(-1), "TQ1_0")
    refused(built, "ffn_down_exps.weight[0]", "row 3", "different scales")
    # In a block without weights any scale will do.
    blocks[3, 1, :52] = 128
    write_gguf(built, "down", blocks.reshape(-1), "TQ1_0")
    scales = open_overlay(built.path).experts[1][0].down.row_scales()
    np.testing.assert_array_equal(scales, np.full(256, 0.5, np.float32))


def test_the_unused_code_of_tq2_0(tmp_path: Path):
    built = build(tmp_path / "o", "gguf-tq2_0")
    blocks = np.zeros((2 * 512, 66), np.uint8)
    blocks[600, 5] = 0b11000000
    write_gguf(built, "gate", blocks.reshape(-1), "TQ2_0")
    refused(built, "ffn_gate_exps.weight[1]", "code 3")


def test_gguf_rows_that_blocks_do_not_divide(tmp_path: Path):
    import gguf

    built = build(tmp_path / "o", "gguf")
    (built.path / "experts.gguf").unlink()
    writer = gguf.GGUFWriter(built.path / "experts.gguf", "outlier")
    writer.add_tensor("blk.1.ffn_up_exps.weight", np.zeros((2, 512, 256), np.float32))
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()
    refused(built, "ffn_up_exps", "F32", "TQ1_0")


def test_gguf_takes_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = build(tmp_path / "o", "gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(built, "experts.gguf", "outlier-mlx[gguf]")
