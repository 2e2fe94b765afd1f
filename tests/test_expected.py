"""The speed to expect: the bytes and launches of a token, and what a machine makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kernels.emulator import virtual_metal
from kernels.launch_counts import Shape, count, tier
from outlier_mlx.measure.bench import decode_bytes
from outlier_mlx.measure.expected import (
    LAYER_LAUNCHES,
    OTHER_LAUNCHES,
    ROUTED_LAUNCHES,
    Machine,
    Work,
    decoding,
    reading,
    used_share,
    work_of,
)
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.storage.shards import read_shards
from tests.builders import write_base, write_overlay
from tests.engine import load, tier_of

SMALL = {"hidden": 64, "width": 128, "heads": 4, "kv_heads": 2, "vocab": 300, "layers": 2}

# Outlier's 14B with 28 MoE layers: 10.3 GB a token, 2.4 of them experts.
OUTLIER = Work(10_263_000_000, 1, 1, 0, 2_386_500_000, 9_546_000_000, 0.0)


def work(folder: Path, context: int = 0) -> Work:
    found = work_of(read_shards(folder), describe(raw_config(folder)), context, folder.name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("disk", "shares"), [(5.0, [0.14, 0.28, 0.44, 0.61]), (17.0, [0.35, 0.57, 0.73, 0.84])]
)
def test_paged_experts_of_the_14b(disk: float, shares: list[float]):
    """Speeds with 0.5, 0.8, 0.9 and 0.95 of the experts in memory, of that with all of them."""
    machine = Machine(bandwidth_gb_s=273, launch_seconds=0, disk_gb_s=disk)
    resident = decoding(OUTLIER, machine)
    assert resident is not None and resident.tokens_per_s == pytest.approx(26.6, abs=0.05)
    found = []
    for hits in (0.5, 0.8, 0.9, 0.95):
        paged = decoding(OUTLIER, machine, (1 - hits) * OUTLIER.routed_bytes)
        assert paged is not None and paged.memory == resident.memory
        found.append(paged.tokens_per_s / resident.tokens_per_s)
    assert found == pytest.approx(shares, abs=0.005)


def test_the_disk_reads_beside_shared_ffns():
    """What they take of the token's time is not waited for; no more than that."""
    token = Work(10_000_000_000, 1, 1, 100, 4_000_000_000, 8_000_000_000, 0.3)
    machine = Machine(bandwidth_gb_s=100, launch_seconds=1e-5, disk_gb_s=5)
    some, few = decoding(token, machine, 400_000_000), decoding(token, machine, 100_000_000)
    assert some is not None and few is not None
    assert (some.memory, some.launches) == (few.memory, few.launches) == (0.1, 1e-3)
    assert some.disk == pytest.approx(0.08 - 0.03) and few.disk == 0.0
    assert some.seconds == pytest.approx(0.1 + 0.001 + 0.05)
    assert some.as_json() == {
        "tokens_per_s": pytest.approx(1 / 0.151),
        "seconds": {"memory": 0.1, "launches": 1e-3, "disk": pytest.approx(0.05)},
    }


def test_what_is_not_known_is_not_guessed():
    token = Work(1000, 1000, 1000, 1, 100, 400, 0.0)
    assert decoding(token, Machine()) is None
    assert decoding(token, Machine(bandwidth_gb_s=100), 10) is None
    assert reading(token, Machine(bandwidth_gb_s=100)) is None


def test_a_cpu_multiplies():
    token = Work(1000, 2_000, 1_000, 4, 0, 0, 0.0)
    cpu = Machine(weights_per_s=1e4, prompt_weights_per_s=2e4, launch_seconds=0.01)
    found = decoding(token, cpu)
    assert found is not None and found.seconds == pytest.approx(0.2 + 0.04)
    assert reading(token, cpu) == 20


def test_a_prompt_waits_for_the_slower_of_products_and_disk():
    """A chunk reads its missing experts once, while others multiply."""
    token = Work(1, 1, 1_000, 0, 0, 1, 0.0)
    both = Machine(prompt_weights_per_s=1e6, disk_gb_s=2)
    assert reading(token, both, 4e9, 512) == 256
    assert reading(token, both, 1e6, 512) == reading(token, both) == 1000
    assert reading(token, Machine(disk_gb_s=2), 4e9, 512) == 256


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_that_bench_counts(tied: bool, tmp_path: Path):
    """From headers alone, as from a loaded model."""
    built = write_overlay(tmp_path / "overlay", tied=tied)
    folder = tier_of(
        built.path, None, tmp_path / "tier", base_bits=4, group_size=32, dtype="float16"
    )
    with virtual_metal(count=False):
        model = load(folder, dtype="float16")
        assert work(folder).nbytes == decode_bytes(model, 0)
        assert work(folder, 100).nbytes == decode_bytes(model, 100)


def test_weights_of_a_token(tmp_path: Path):
    """Whatever they are stored in; an embedding is only multiplied if it is the head."""
    built = write_overlay(tmp_path / "overlay")
    dims, routed = built.dims, len(built.dims.routed_layers)
    experts = 3 * dims.hidden * dims.expert_intermediate * dims.top_k * routed
    recipes: list[dict[str, Any]] = [{"base_bits": None}, {"base_bits": 4, "group_size": 32}]
    for number, how in enumerate(recipes):
        folder = tier_of(built.path, None, tmp_path / str(number), **how)
        found = work(folder)
        head = dims.hidden * dims.vocab
        ffn = 3 * dims.hidden * dims.intermediate * dims.layers
        kv = dims.hidden // dims.heads * dims.kv_heads
        attention = dims.layers * (2 * dims.hidden**2 + 2 * dims.hidden * kv)
        matrices = head + ffn + attention + experts + dims.hidden * dims.experts * routed
        assert matrices < found.weights < 1.02 * matrices
        last = (ffn + attention) // dims.layers - 2 * dims.hidden * kv
        last += experts // routed + dims.hidden * dims.experts  # experts are in the last layer
        prompt = matrices - head - last
        assert prompt < found.prompt_weights < 1.02 * prompt
        packed = 2 * dims.expert_intermediate * (16 + 4) + dims.hidden * (16 + 4)
        assert found.routed_bytes == packed * dims.top_k * routed
        assert found.expert_bytes == packed * dims.experts * routed
        shared = sum(t.nbytes for name, t in read_shards(folder).items() if "shared_expert" in name)
        assert found.shared_share == shared / found.nbytes
        assert found.launches == 4 * 20 + routed * 3 + 6


def test_a_model_without_experts(tmp_path: Path):
    folder = write_base(tmp_path / "base").path
    found = work(folder)
    assert found.routed_bytes == found.shared_share == 0
    assert used_share(describe(raw_config(folder))) == 1


def test_launches_are_those_of_the_graph():
    shape = Shape(**SMALL, experts=5)
    found = count(tier(shape), shape)
    assert found["layer"].total() == LAYER_LAUNCHES + ROUTED_LAUNCHES
    token = shape.layers * (LAYER_LAUNCHES + ROUTED_LAUNCHES) + OTHER_LAUNCHES
    assert found["token"].total() == token
