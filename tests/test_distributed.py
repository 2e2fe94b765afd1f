"""One model over several processes, connected by MLX's ring on the loopback device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import outlier_mlx
from outlier_mlx.engine.distributed.cuts import Cut, Run, spans
from outlier_mlx.engine.distributed.tensor_parallel import TensorParallel, heads_of
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.runtime.affine2 import row_bytes
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.ternary import rows as ternary_rows
from tests.program import run
from tests.ranks import run_python_ranks, run_ranks

PROMPT = [1, 5, 7, 200, 31, 8, 9, 100]

LOGITS = """
import json, sys
import mlx.core as mx
import numpy as np
import outlier_mlx
from outlier_mlx.engine.distributed.ranks import connect, finish
from outlier_mlx.engine.paging.paged import store_of

folder, prompt, how = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
own = connect(pipeline=how.pop("pipeline", False))
model, _ = outlier_mlx.load(folder, dtype="float32", **how)
mx.eval(model.parameters())
loaded = mx.get_active_memory(), mx.get_peak_memory()
logits = np.array(model(mx.array([prompt])))
finish()
paged = store_of(model) is not None
print(json.dumps({"logits": logits.tolist(), "loaded": loaded, "paged": paged}))
"""


def logits_of_ranks(
    size: int, folder: Path, model: Path, prompt: list[int] = PROMPT, **how: Any
) -> list[Any]:
    """What `LOGITS` finds on each rank."""
    words = json.dumps(prompt), json.dumps(how)
    return run_python_ranks(size, folder, LOGITS, model, *words)


def logits_here(model: Path, prompt: list[int] = PROMPT) -> np.ndarray:
    """The logits of one process."""
    return np.array(outlier_mlx.load(model, dtype="float32")[0](mx.array([prompt])))


def assert_same_logits(found: list[Any], model: Path) -> None:
    expected = logits_here(model)
    for rank in found:
        np.testing.assert_allclose(rank["logits"], expected, rtol=1e-5, atol=1e-5)


# -- what a rank has ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "parts", "unit", "expected"),
    [
        (173 * 16, 2, 16, [(0, 86 * 16), (86 * 16, 173 * 16)]),
        (100, 3, 32, [(0, 32), (32, 64), (64, 100)]),
        (16, 4, 16, [(0, 4), (4, 8), (8, 12), (12, 16)]),
        (5, 2, 1, [(0, 2), (2, 5)]),
    ],
)
def test_a_width_is_split_at_multiples_of_a_unit_where_it_has_enough(
    total: int, parts: int, unit: int, expected: list[tuple[int, int]]
) -> None:
    assert spans(total, parts, unit) == expected


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(40, 8, 2), (40, 8, 3), (4, 2, 4), (6, 2, 5)]
)
def test_every_head_is_on_one_rank_with_the_keys_it_reads(
    heads: int, kv_heads: int, size: int
) -> None:
    found = [heads_of(rank, size, heads, kv_heads) for rank in range(size)]
    queries = [head for own in found for head in range(*own.queries)]
    assert queries == list(range(heads))
    for own in found:
        count, keys = own.counts
        assert count % keys == 0
        group = heads // kv_heads
        for place, head in enumerate(range(*own.queries)):
            assert own.keys[0] + place // (count // keys) == head // group


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(OutlierError, match="4 attention heads cannot be split over 5 ranks"):
        heads_of(0, 5, 4, 2)


@pytest.mark.parametrize("width", [13824 // 16, 80, 96, 33])
@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_packed_rows_are_rows_of_the_same_layout(width: int, size: int) -> None:
    # h is what gate and up give: the sum over ranks of down times h is that of one process.
    rng = np.random.default_rng(width)
    trits = rng.integers(-1, 2, (6, width)).astype(np.int8)
    h = rng.integers(-9, 10, width)
    packed = ternary_rows.pack_rows(trits)
    nbytes = row_bytes(width)
    total = np.zeros(6, np.int64)
    covered = np.zeros(width, int)
    for start, stop in spans(nbytes, size, 16):
        own = -(-(stop - start) // 16) * 16
        part = np.full((6, own), 128, np.uint8)
        part[:, : stop - start] = packed[:, start:stop]
        columns = np.full(5 * own, -1)
        for n in range(5):
            for byte in range(start, stop):
                if n * nbytes + byte < width:
                    columns[n * own + byte - start] = n * nbytes + byte
        there = columns >= 0
        local = ternary_rows.unpack_rows(part, 5 * own)
        total += local[:, there].astype(np.int64) @ h[columns[there]]
        assert not local[:, ~there].any()
        covered[columns[there]] += 1
    assert (covered == 1).all()
    np.testing.assert_array_equal(total, trits.astype(np.int64) @ h)


def test_a_rank_reads_its_columns_and_rows_only(tier: Path) -> None:
    tensors = read_shards(tier)
    config = describe(raw_config(tier))
    for rank in range(3):
        split = TensorParallel(tensors, config, rank, 3)
        for name, cut in split.cuts.items():
            tensor = tensors[name]
            whole = mx.array(tensor.read())
            expected = cut.of(whole)
            assert mx.array_equal(cut.read(tensor), expected), name
            assert split.shapes()[name].shape == expected.shape


def test_a_cut_fills_what_no_run_covers() -> None:
    cut = Cut(-1, (Run(1, 3), Run(4, 5, 3)), 5, fill=7)
    assert cut.of(mx.arange(6)[None]).tolist() == [[1, 2, 7, 4, 7]]


# -- the same results -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_the_logits_of_one_process(size: int, tier: Path, tmp_path: Path) -> None:
    assert_same_logits(logits_of_ranks(size, tmp_path, tier), tier)


@pytest.mark.slow
def test_quantized_heads_that_divide_groups_give_the_same_logits(
    place: Path, tmp_path: Path
) -> None:
    # A head has 16 columns, and a group 64.
    assert_same_logits(logits_of_ranks(2, tmp_path, place / "tier"), place / "tier")


@pytest.mark.slow
def test_two_ranks_write_the_same_text_and_only_the_first_talks(
    place: Path, tmp_path: Path
) -> None:
    words = ("generate", place / "tier", "--prompt", "the cat", "--max-tokens", 12)
    expected = run(*words)
    found = run_ranks(2, tmp_path, *words)
    assert found[0].out == expected.out
    assert "prompt: " in found[0].err
