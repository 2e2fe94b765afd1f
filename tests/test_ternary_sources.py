"""Matrices that are ternary, or nearly: read exactly as trits and scales, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx.checkpoints.ternary_model import RowsSource
from outlier_mlx.errors import CheckpointError
from outlier_mlx.storage import ternary_matrix
from outlier_mlx.storage.gguf import GgufTensor
from outlier_mlx.storage.rounding import widened
from outlier_mlx.storage.safetensors import read_header
from outlier_mlx.storage.ternary_affine import AffineSource
from outlier_mlx.storage.ternary_bitnet import FloatSource, MasterWeights, NearHalf, PackedBitnet
from outlier_mlx.storage.ternary_blocks import BlockSource, WholeTensor
from outlier_mlx.storage.ternary_matrix import NotTernary, TernaryMatrix, TernarySource, settled
from outlier_mlx.ternary import pack_rows
from outlier_mlx.ternary.scales import tile_scales
from tests.tensor_file import Stored, rounded, stored, to_bfloat16, write_stored
from tests.ternary_sources import BLOCKS, encode, random_ternary, words
from tests.trits import random_trits


def in_order(calls: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    return (call() for call in calls)


def settle(source: TernarySource) -> TernaryMatrix:
    return settled(source, in_order)


def values_of(matrix: TernaryMatrix) -> np.ndarray:
    """The weights, read in two pieces; float64 of trit times scale. Packed rows have the same."""
    rows, width = matrix.shape
    middle = rows // 16 * 8
    pieces = []
    for start, stop in ((0, middle), (middle, rows)):
        if start == stop:
            continue
        trits, scales = matrix.read(start, stop)
        rows_of_bytes, packed_scales = matrix.packed(start, stop)
        assert np.array_equal(rows_of_bytes, pack_rows(trits))
        assert packed_scales.dtype == scales.dtype and np.array_equal(packed_scales, scales)
        numbers = widened(scales, matrix.scales.dtype).astype(np.float64)
        assert scales.shape == (matrix.scales.shape((stop - start, width)))
        assert np.isin(trits, (-1, 0, 1)).all() and (numbers >= 0).all()
        group = matrix.scales.group or width
        pieces.append(trits * np.repeat(numbers.reshape(stop - start, -1), group, axis=1))
    return np.concatenate(pieces)


class Affine:
    """Codes (out, in), scales and biases (out, in / group), to change before `source`."""

    def __init__(self, folder: Path, group: int = 128, dtype: str = "F16", groups: int = 4):
        self.folder, self.group, self.dtype = folder, group, dtype
        made = random_ternary((16, group * groups), group, np.random.default_rng(2), dtype)
        self.codes = made.trits + 1
        self.scales, self.biases = made.scales.copy(), -made.scales

    @property
    def values(self) -> np.ndarray:
        scales, biases = (rounded(a, self.dtype).astype(float) for a in (self.scales, self.biases))
        spread = partial(np.repeat, repeats=self.group, axis=1)
        return spread(scales) * self.codes + spread(biases)

    def source(self) -> AffineSource:
        path = self.folder / "model.safetensors"
        tensors = {
            "x.weight": stored(words(self.codes, code=lambda codes: codes)),
            "x.scales": stored(self.scales, self.dtype),
            "x.biases": stored(self.biases, self.dtype),
        }
        write_stored(path, tensors)
        found = read_header(path)
        weight, scales, biases = (found[f"x.{leaf}"] for leaf in ("weight", "scales", "biases"))
        return AffineSource.of(weight, scales, biases, self.group)


@pytest.fixture(params=["F16", "BF16"])
def affine(request: pytest.FixtureRequest, tmp_path: Path) -> Affine:
    return Affine(tmp_path, dtype=request.param)


def mirrored(a: Affine) -> None:
    a.scales[::2] *= -1
    a.biases[::2] *= -1


def shifted(a: Affine) -> None:
    a.codes[3] += 1
    a.biases[3] = -2 * a.scales[3]


def sparse(a: Affine) -> None:
    a.codes[:4] = 1  # zeros, with a scale
    a.scales[5:8, 1] = a.biases[5:8, 1] = 0


def code_3_of_zeros(a: Affine) -> None:
    a.scales[2] = a.biases[2] = 0
    a.codes[2, ::3] = 3


def outer_codes(a: Affine) -> None:
    """Codes 0 and 3 alone can be ternary, too."""
    a.codes[1] = np.where(a.codes[1] == 0, 0, 3)
    a.scales[1], a.biases[1] = 0.5, -0.75


@pytest.mark.parametrize(
    "change", [lambda a: None, mirrored, shifted, sparse, code_3_of_zeros, outer_codes]
)
def test_affine_codes_that_are_ternary(change: Callable[[Affine], None], affine: Affine):
    change(affine)
    matrix = settle(affine.source())
    np.testing.assert_array_equal(values_of(matrix), affine.values)
    assert matrix.scales.group == 128
    trits, scales = matrix.read(0, 16)
    empty = ~trits.reshape(16, -1, 128).any(axis=-1)
    assert (scales[empty] == 0).all()


def one_ulp(a: Affine) -> None:
    a.biases[7, 2] = np.float32(a.biases[7, 2] * (1 + 2**-7 if a.dtype == "BF16" else 1 + 2**-10))


def code_3(a: Affine) -> None:
    a.codes[7, 300] = 3


def another_grid(a: Affine) -> None:
    """What `mx.quantize` makes of ternary weights."""
    a.scales[7, 2] = -0.5 * a.scales[7, 2]
    a.biases[7, 2] *= -1


@pytest.mark.parametrize("change", [one_ulp, code_3, another_grid])
def test_affine_codes_that_are_not(change: Callable[[Affine], None], affine: Affine):
    change(affine)
    with pytest.raises(NotTernary, match=r"x\.weight: not ternary: row 7, group 2 holds"):
        settle(affine.source())


def test_a_scale_that_16_bits_do_not_hold(tmp_path: Path):
    a = Affine(tmp_path)
    a.codes[3, :128] = 1
    a.scales[3, 0], a.biases[3, 0] = 1, 2.0**-12
    with pytest.raises(NotTernary, match=r"row 3, group 0 has the scale 1\.00024414"):
        settle(a.source())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["scales", "biases"])
def test_numbers_that_are_not_finite(name: str, bad: float, affine: Affine):
    getattr(affine, name)[4, 1] = bad
    with pytest.raises(CheckpointError, match=rf"x\.{name}: holds NaN or infinity") as caught:
        settle(affine.source())
    assert not isinstance(caught.value, NotTernary)


def pairs_merge(a: Affine) -> None:
    a.scales[:, 1::2] = a.scales[:, 0::2]
    a.biases = -a.scales


def pairs_merge_by_zeros(a: Affine) -> None:
    """Different scales, but one group of each pair has only zeros."""
    for first in range(0, a.codes.shape[1], 128):
        a.codes[::2, first : first + 64] = 1
        a.codes[1::2, first + 64 : first + 128] = 1


def one_pair_does_not(a: Affine) -> None:
    pairs_merge(a)
    a.scales[9, 3] *= 2
    a.biases[9, 3] *= 2


@pytest.mark.parametrize(
    ("change", "groups", "expected"),
    [
        (pairs_merge, 4, 128),
        (pairs_merge_by_zeros, 4, 128),
        (one_pair_does_not, 4, 64),
        (pairs_merge, 3, 64),  # 192 is not a multiple of 128
    ],
)
def test_groups_of_64_that_are_groups_of_128(
    change: Callable[[Affine], None], groups: int, expected: int, tmp_path: Path
):
    a = Affine(tmp_path, group=64, groups=groups)
    if groups == 3:
        a.scales[:], a.biases[:] = 0.5, -0.5
    else:
        change(a)
    matrix = settle(a.source())
    assert matrix.scales.group == expected
    np.testing.assert_array_equal(values_of(matrix), a.values)


def test_shapes_of_affine_tensors(tmp_path: Path):
    a = Affine(tmp_path)
    a.scales = a.scales[:, :-1]
    with pytest.raises(CheckpointError, match=r"x\.scales: F16 \(16, 3\), expected F16 \(16, 4\)"):
        a.source()


class Blocks:
    """Rows of blocks in a file."""

    def __init__(self, folder: Path, kind: str, trits: np.ndarray, d: np.ndarray):
        path = folder / "x.gguf"
        raw = encode(kind, trits, d)
        path.write_bytes(raw.tobytes())
        size = BLOCKS[kind]
        per_block = raw.shape[1] * size // trits.shape[1]
        self.tensor = GgufTensor("x.weight", path, kind, trits.shape, 0, size, per_block)
        self.values = trits * np.repeat(d.astype(float), size, axis=1)

    def source(self, **how: Any) -> BlockSource:
        return BlockSource(WholeTensor(self.tensor), **how)


def scales_of(kind: str, rows: int, blocks: int, low: float = -0.5) -> np.ndarray:
    drawn = np.random.default_rng(8).uniform(low, 0.5, (rows, blocks))
    return drawn.astype(np.float16)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind: str, tmp_path: Path):
    """Negative scales, and a block of zeros, which keeps its scale."""
    trits = random_trits(16, 1024)
    trits[3, :256] = 0
    d = scales_of(kind, 16, 1024 // BLOCKS[kind])
    blocks = Blocks(tmp_path, kind, trits, d)
    matrix = settle(blocks.source())
    assert matrix.scales.group == (64 if kind == "Q2_0" else 128)
    assert matrix.scales.dtype == "float16"
    np.testing.assert_array_equal(values_of(matrix), blocks.values)
    assert matrix.read(3, 4)[1][0, 0] == np.abs(d[3, 0])


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_with_one_scale_a_row(kind: str, tmp_path: Path):
    """TQ1_0 and TQ2_0 get one float32 scale a row; the others keep their groups."""
    trits, size = random_trits(16, 1024), BLOCKS[kind]
    d = np.repeat(scales_of(kind, 16, 1, low=0.1), 1024 // size, axis=1)
    d[2, -1] = 0.75
    trits[2, -size:] = 0  # another scale, of zeros
    blocks = Blocks(tmp_path, kind, trits, d)
    matrix = settle(blocks.source())
    by_row = kind.startswith("TQ")
    assert (matrix.scales.group, matrix.scales.dtype) == (
        (0, "float32") if by_row else (128, "float16")
    )
    np.testing.assert_array_equal(values_of(matrix), blocks.values)


def test_a_row_of_one_block_keeps_its_groups(tmp_path: Path):
    blocks = Blocks(tmp_path, "TQ1_0", random_trits(16, 256), scales_of("TQ1_0", 16, 1))
    assert settle(blocks.source()).scales.group == 128


@pytest.mark.parametrize("factor", [0.25, -3.0])
def test_a_factor_is_folded_into_the_scales_of_rows(factor: float, tmp_path: Path):
    d = np.repeat(scales_of("TQ2_0", 8, 1), 2, axis=1)
    blocks = Blocks(tmp_path, "TQ2_0", random_trits(8, 512), d)
    matrix = settle(blocks.source(factor=np.float32(factor)))
    assert (matrix.scales.group, matrix.scales.dtype) == (0, "float32")
    np.testing.assert_array_equal(values_of(matrix), blocks.values * factor)


def test_a_factor_and_blocks_of_different_scales(tmp_path: Path):
    blocks = Blocks(tmp_path, "TQ2_0", random_trits(8, 512), scales_of("TQ2_0", 8, 2))
    with pytest.raises(CheckpointError, match=r"x\.weight: blocks of different scales, and a"):
        settle(blocks.source(factor=np.float32(0.5)))


@pytest.mark.parametrize(("kind", "head"), [("PTQ1_0", 128), ("TQ1_0", 64), ("Q2_0", 192)])
def test_columns_in_another_order(kind: str, head: int, tmp_path: Path):
    width = 768
    blocks = Blocks(
        tmp_path, kind, random_trits(8, width), scales_of(kind, 8, width // BLOCKS[kind])
    )
    order = tuple(np.random.default_rng(3).permutation(width // head).tolist())
    matrix = settle(blocks.source(head=head, order=order))
    expected = blocks.values.reshape(8, -1, head)[:, list(order)].reshape(8, width)
    np.testing.assert_array_equal(values_of(matrix), expected)
    assert matrix.scales.group == (128 if head % 128 == 0 else 64)


def tensor_of(folder: Path, array: Any, dtype: str | None = None) -> Any:
    path = folder / "one.safetensors"
    write_stored(path, {"x.weight": array if isinstance(array, Stored) else stored(array, dtype)})
    return read_header(path)["x.weight"]


def packed_rows(trits: np.ndarray) -> np.ndarray:
    quarters = (trits + 1).astype(np.uint8).reshape(4, -1, trits.shape[1])
    return (quarters << np.arange(0, 8, 2, dtype=np.uint8)[:, None, None]).sum(0).astype(np.uint8)


def test_packed_bitnet(tmp_path: Path):
    trits = random_trits(40, 48)
    source = PackedBitnet(tensor_of(tmp_path, packed_rows(trits)), np.float32(0.3))
    matrix = settle(source)
    assert (matrix.scales.group, matrix.scales.dtype) == (0, "float32")
    np.testing.assert_array_equal(values_of(matrix), trits * np.float64(np.float32(0.3)))
    for start, stop in ((0, 40), (9, 11), (25, 40), (39, 40)):  # across quarters, and within one
        np.testing.assert_array_equal(source.read(start, stop)[0], trits[start:stop])


@pytest.mark.parametrize("row", [0, 13, 29, 39])
def test_packed_bitnet_with_code_3(row: int, tmp_path: Path):
    trits = random_trits(40, 48)
    trits[row, 5] = 2
    source = PackedBitnet(tensor_of(tmp_path, packed_rows(trits)), np.float32(1))
    with pytest.raises(NotTernary, match=f"row {row}, column 5 has code 3"):
        settle(source)


def test_master_weights(tmp_path: Path):
    """Rounded as the model does: by the mean of sizes, ties to even, scale in bfloat16."""
    weights = rounded(np.random.default_rng(1).normal(0, 0.02, (24, 64)), "BF16")
    counter = NearHalf()
    source = MasterWeights.of(tensor_of(tmp_path, weights, "BF16"), counter, in_order)
    mean = np.float32(np.abs(weights.astype(np.float64)).mean())
    trits, scales = settle(source).read(0, 24)
    inverse = np.float32(1) / mean
    np.testing.assert_array_equal(trits, np.clip(np.rint(weights * inverse), -1, 1))
    assert set(scales.tolist()) == {float(rounded(np.float32(1) / inverse, "BF16"))}
    assert counter.count == 0


def test_master_weights_near_a_half_are_counted(tmp_path: Path):
    weights = np.full((2, 8), 1.0, np.float32)
    weights[0, :3] = [0.5, -0.5, 0.25]
    weights[1, 0] = 8 * 2 - np.abs(weights).sum() + 1  # so that the mean is 1
    counter = NearHalf()
    source = MasterWeights.of(tensor_of(tmp_path, weights, "BF16"), counter, in_order)
    trits, _ = source.read(0, 2)
    assert counter.count == 2 and trits[0, :3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_master_weights_that_are_not_finite(bad: float, tmp_path: Path):
    weights = np.ones((2, 8), np.float32)
    weights[1, 3] = bad
    with pytest.raises(CheckpointError, match=r"x\.weight: holds NaN or infinity"):
        MasterWeights.of(tensor_of(tmp_path, weights, "BF16"), NearHalf(), in_order)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("by_row", [False, True])
def test_floats_that_are_ternary(dtype: str, by_row: bool, tmp_path: Path):
    made = random_ternary((8, 512), 128, np.random.default_rng(4), dtype)
    if by_row:
        made.scales[:] = made.scales[:, :1]
    name = {"F16": "float16", "BF16": "bfloat16"}[dtype]
    source = FloatSource(tensor_of(tmp_path, made.values, dtype), 128, name)
    matrix = settle(source)
    assert matrix.scales.group == (0 if by_row else 128)
    np.testing.assert_array_equal(values_of(matrix), made.values)
    changed = made.values.copy()
    changed[5, 200] = made.scales[5, 1] * 1.5
    with pytest.raises(NotTernary, match="row 5, group 1 holds more than one size"):
        settle(FloatSource(tensor_of(tmp_path, changed, dtype), 128, name))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_floats_that_are_not_finite(bad: float, tmp_path: Path):
    values = np.ones((8, 128), np.float16)
    values[2, 2] = bad
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        settle(FloatSource(tensor_of(tmp_path, values), 128, "float16"))


@pytest.mark.parametrize("group", [0, 64, 128])
@pytest.mark.parametrize("rows", [16, 21])
def test_packed_rows_are_read_back(group: int, rows: int, tmp_path: Path):
    trits = random_trits(rows, 384)
    numbers = np.random.default_rng(6).uniform(0, 1, (rows, 384 // group if group else 1))
    scales = numbers.astype(np.float16 if group else np.float32)
    held = tile_scales(scales) if group else scales.reshape(-1)
    path = tmp_path / "rows.safetensors"
    write_stored(path, {"x.weight": stored(pack_rows(trits)), "x.scales": stored(held)})
    found = read_header(path)
    source = RowsSource(found["x.weight"], found["x.scales"], 384, group)
    matrix = settle(source)
    assert matrix.scales == source.scales
    spread = np.repeat(scales.astype(float), group or 384, axis=1)
    np.testing.assert_array_equal(values_of(matrix), trits * spread)


def test_packed_rows_that_are_damaged(tmp_path: Path):
    rows = pack_rows(random_trits(16, 384))
    rows[5, 3] = min(set(range(256)) - {(256 * q + 242) // 243 for q in range(243)})
    path = tmp_path / "rows.safetensors"
    scales = np.ones(16, np.float32)
    write_stored(path, {"x.weight": stored(rows), "x.scales": stored(scales)})
    found = read_header(path)
    with pytest.raises(CheckpointError, match=r"x\.weight: from row 0: byte \d+ at \[5, 3\]"):
        settle(RowsSource(found["x.weight"], found["x.scales"], 384, 0))


def test_slabs_see_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A group that does not merge in the last of several slabs is seen."""
    monkeypatch.setattr(ternary_matrix, "SLAB_BYTES", 512)
    a = Affine(tmp_path, group=64)
    pairs_merge(a)
    assert settle(a.source()).scales.group == 128
    a.scales[15, 3] *= 2
    a.biases[15, 3] *= 2
    assert settle(a.source()).scales.group == 64


def test_bfloat16_bits_keep_their_sign_apart():
    bits = to_bfloat16(np.array([[-0.5, 0.25]], np.float32))
    trits = np.array([[1, -1, 0, 1]], np.int8)
    scales = ternary_matrix.without_sign(trits, bits, "bfloat16")
    assert widened(scales, "bfloat16").tolist() == [[0.5, 0.25]]
    assert trits.tolist() == [[-1, 1, 0, 1]]
