"""The plan: what a model will take, part by part; and how much memory its experts get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from outlier_mlx.engine import memory
from outlier_mlx.engine import plan as plan_module
from outlier_mlx.engine.generate import prefill_step
from outlier_mlx.engine.loading import load, load_model, load_tokenizer
from outlier_mlx.engine.machine import UNLIMITED, Budget, budget
from outlier_mlx.engine.memory import check_fits
from outlier_mlx.engine.needs import Needs, Use, needs_of
from outlier_mlx.engine.paging.budget import ALL, AUTO, ExpertMemory, Experts
from outlier_mlx.engine.paging.paged import store_of
from outlier_mlx.engine.paging.slots import slot_nbytes
from outlier_mlx.engine.plan import plan
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.models.sizes import kv_bytes
from outlier_mlx.serve.capacity import find_capacity
from tests.library import Library
from tests.marks import slow_but
from tests.memory import at_rest
from tests.plain_models import SIZES, make_model, write_model
from tests.program import assert_refused, run

FILE = "model.safetensors"
MAC, CPU = "this Mac's GPU", "this machine"
EXPERTS = Experts(layers=28, count=8, top_k=2, slot_nbytes=42_000_000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", ExpertMemory(nbytes=4 * 10**9)),
        ("4GiB", ExpertMemory(nbytes=4 << 30)),
        (" 1.5 gb ", ExpertMemory(nbytes=1_500_000_000)),
        ("512MB", ExpertMemory(nbytes=512 * 10**6)),
        ("50%", ExpertMemory(share=0.5)),
        ("100%", ALL),
        ("all", ALL),
        ("auto", AUTO),
    ],
)
def test_amounts_of_memory(text: str, expected: ExpertMemory) -> None:
    assert ExpertMemory.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "4", "GB", "-4GB", "0GB", "0%", "101%", "4TB", "1e9MB", "half"]
)
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(OutlierError, match="is no amount of memory: expected one such as 4GB"):
        ExpertMemory.parse(text)


def test_slots_of_an_amount() -> None:
    assert EXPERTS.total == 224 and EXPERTS.floor == 56
    assert ExpertMemory.parse("50%").slots_for(EXPERTS) == 112
    assert ExpertMemory.parse("4.2GB").slots_for(EXPERTS) == 100
    assert ExpertMemory(slots=60).slots_for(EXPERTS) == 60
    for text in ("all", "100%", "9.5GB"):
        assert ExpertMemory.parse(text).slots_for(EXPERTS) is None
    with pytest.raises(OutlierError) as refused:
        ExpertMemory.parse("2GB").slots_for(EXPERTS)
    assert str(refused.value) == (
        "2.00GB: too little memory for experts: the model needs 56 of its 224 experts in memory at"
        " least (2 in each of 28 layers): --expert-memory 2352MB"
    )
    assert ExpertMemory.parse("2352MB").slots_for(EXPERTS) == 56
    few = Experts(layers=2, count=8, top_k=2, slot_nbytes=10)
    with pytest.raises(OutlierError, match=r"at least \(all 8 of a layer\): --expert-memory 1MB"):
        ExpertMemory(slots=7).slots_for(few)


@pytest.fixture(scope="module")
def tier(library: Library) -> Path:
    """Four MoE layers of eight experts; a token uses two."""
    return library.tier(
        library.overlay(hidden=128, heads=2, layers=5, moe_layers=(1, 2, 3, 4), experts=8)
    )


def test_parts_of_a_plan(tier: Path) -> None:
    found = plan(tier, Use(100), available=Budget(UNLIMITED, MAC))
    index = json.loads((tier / "model.safetensors.index.json").read_text())
    assert found.weights.nbytes + found.experts.nbytes == index["metadata"]["total_size"]
    assert found.copies.nbytes == 0 and found.converted.nbytes > 0
    assert found.kv_cache.nbytes == 5 * 2 * 2 * 64 * 100 * 4  # float32
    assert found.needed == sum(part.nbytes for part in found.parts.values())
    assert found.fits and found.slots is None and found.expert_memory == ALL
    assert found.paged is not None and found.paged.total == 32
    assert found.experts.nbytes == 32 * found.paged.slot_nbytes
    assert all(part.source for part in found.parts.values())
    line = str(found)
    assert line.startswith("memory: ") and "to compute with; it is not known" in line


def test_slots_take_what_is_left_and_headroom_stays(tier: Path) -> None:
    whole = plan(tier, Use(100), available=Budget(UNLIMITED, MAC))
    assert whole.paged is not None
    for missing in (1, 5, 9):
        there_is = whole.needed - missing * whole.paged.slot_nbytes
        found = plan(tier, Use(100), available=Budget(there_is, MAC))
        assert found.slots is not None and 8 <= found.slots < 32
        assert found.experts.nbytes == found.slots * whole.paged.slot_nbytes
        assert found.fits == (found.needed <= there_is)
        if found.slots > 8:
            room = there_is - there_is // 32
            assert found.needed <= room < found.needed + whole.paged.slot_nbytes
        assert f"{found.slots} of 32 experts" in str(found)
        assert found.expert_memory == ExpertMemory(slots=found.slots)
    assert not plan(tier, Use(100), available=Budget(1000, MAC)).fits
    assert plan(tier, Use(100), ExpertMemory.parse("50%"), Budget(UNLIMITED, MAC)).slots == 16


def test_only_experts_in_packed_rows_are_paged(tier: Path, tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain", SIZES | {"model_type": "llama"})
    for text in ("all", "auto"):
        found = plan(plain, Use(10), ExpertMemory.parse(text), Budget(1000, MAC))
        assert found.slots is None and not found.fits
    with pytest.raises(OutlierError, match="--expert-memory 50%: plain has no experts that can be"):
        plan(plain, Use(10), ExpertMemory.parse("50%"), Budget(1000, MAC))
    with pytest.raises(OutlierError, match="plain needs"):
        check_fits(plain, Use(10), Budget(1000, MAC), memory=AUTO)


def test_what_is_loaded_on_a_cpu_is_what_was_planned(tier: Path) -> None:
    from mlx.utils import tree_flatten

    model, _ = load_model(tier)
    found = plan(tier, Use(100), available=Budget(UNLIMITED, CPU))
    flat: Any = tree_flatten(model.parameters())
    copies = sum(
        array.nbytes
        for module in model.modules()
        if getattr(module, "prepared", None)
        for array in module.prepared.arrays
    )
    assert copies == found.copies.nbytes
    assert sum(a.nbytes for _, a in flat) == found.weights.nbytes + found.experts.nbytes
    assert found.paged is not None and found.paged.slot_nbytes * 32 == copies


HYBRID: dict[str, Any] = SIZES | {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 8,
    "head_dim": 32,
    "full_attention_interval": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_next"])
def test_caches_of_linear_attention(kind: str) -> None:
    given = HYBRID | {"model_type": kind}
    if kind == "qwen3_5":
        given = {"model_type": kind, "text_config": HYBRID}
    else:
        given |= {"num_experts": 0, "num_experts_per_tok": 0, "decoder_sparse_step": 1}
        given |= {"shared_expert_intermediate_size": 0, "moe_intermediate_size": 0}
        given |= {"mlp_only_layers": [], "partial_rotary_factor": 0.25}
    model = make_model(given)
    model.set_dtype(mx.bfloat16)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.arange(256)[None] % 300, cache))
    assert sum(entry.nbytes for entry in cache) == kv_bytes(describe(given), 256)
    assert describe(given).attention == (0, 0, 0, None) * 2


@pytest.mark.parametrize(
    "config",
    [
        SIZES | {"model_type": "llama", "intermediate_size": 512},
        SIZES | {"model_type": "qwen3", "head_dim": 16, "num_attention_heads": 8},
        pytest.param(HYBRID | {"model_type": "qwen3_5"}, marks=pytest.mark.slow),
        "tier",
    ],
    ids=["FFN", "attention", "hybrid", "tier"],
)
def test_peak_memory_stays_below_the_plan(config: Any, tier: Path, tmp_path: Path) -> None:
    folder = tier
    if config != "tier":
        said = config | {"max_position_embeddings": 4096}
        if config["model_type"] == "qwen3_5":
            said = {"model_type": "qwen3_5", "text_config": HYBRID}
        folder = write_model(tmp_path / "model", said)
    model, _ = load_model(folder)
    step, tokens = 128, 700  # of which the cache makes 768
    assert prefill_step(model, step) == needs_of(folder, on_cpu=True).step(step) == step
    before = at_rest()
    prompt = mx.arange(tokens - 1) % 250
    for _ in generate_step(prompt, model, max_tokens=1, prefill_step_size=step):
        pass
    peak = mx.get_peak_memory() - before
    found = plan(folder, Use(tokens, step=step), available=Budget(UNLIMITED, CPU))
    bound = found.kv_cache.nbytes + found.activations.nbytes
    assert peak <= bound
    assert bound < 4 * peak


def test_a_prompt_is_counted_in_tokens_before_experts_are_paged_for_it(
    tier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "the heron waits in the reeds " * 12
    steps = ("--prefill-step-size", 8)
    command = ("generate", tier, "-p", prompt, "-m", 2, "--ignore-chat-template", *steps)
    tokens = len(load_tokenizer(tier, {}).encode(prompt)) + 2
    assert len(prompt) > 1.2 * tokens
    needed = plan(tier, Use(tokens, step=8), available=Budget(UNLIMITED, MAC)).needed
    monkeypatch.setattr(memory, "budget", lambda: Budget(needed, MAC))
    assert "of 32 experts" not in run(*command).err


def test_what_does_not_fit_is_paged_and_told(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("generate", tier, "-p", "the heron", "-m", 4, "--prefill-step-size", 8)
    whole = run(*command)
    assert "experts" not in whole.err
    planned = plan(tier, Use(6, step=8), available=Budget(UNLIMITED, MAC))
    monkeypatch.setattr(memory, "budget", lambda: Budget(planned.needed - 1, MAC))
    paged = run(*command)
    assert paged.out == whole.out
    first, second, *rest = paged.err.splitlines()
    assert first.startswith("memory: ") and " of 32 experts, " in first
    assert second.startswith("tier does not fit as a whole: the other experts are read from")
    assert any(line.startswith("experts: ") for line in rest)
    assert run(*command, "--quiet").err == ""
    asked = run(*command, "--expert-memory", "30%")
    assert asked.out == whole.out and "9 of 32 experts" in asked.err
    assert "does not fit as a whole" not in asked.err
    for options in (("--expert-memory", "all"), ("--expert-memory", "5%")):
        refused = run(*command, *options, code=1)
        assert_refused(refused, "tier needs" if "all" in options else "too little memory for expe")
    assert "experts" not in run(*command, "--ignore-memory").err
    monkeypatch.setattr(memory, "budget", lambda: Budget(10_000, MAC))
    assert_refused(run(*command, code=1), "with 8 of 32 experts in memory, the least")


def test_wrong_amounts_are_usage_errors(tier: Path) -> None:
    refused = run("generate", tier, "-p", "x", "--expert-memory", "much", code=2)
    assert "is no amount of memory: expected one such as 4GB" in " ".join(refused.err.split())


def test_load_with_auto_pages_only_what_does_not_fit(
    tier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in (None, "auto", "all"):
        assert store_of(load(tier, expert_memory=text)[0]) is None
    whole = plan(tier, available=Budget(UNLIMITED, CPU))
    monkeypatch.setattr(plan_module, "budget", lambda: Budget(whole.needed - 1, CPU))
    store = store_of(load(tier, expert_memory="auto")[0])
    assert store is not None and 8 <= store.pool.slots < 32
    assert store_of(load(tier)[0]) is None
    planned = plan(tier, Use(10), ExpertMemory(slots=9))
    store = store_of(load(tier, expert_memory=planned)[0])
    assert store is not None and store.pool.slots == 9


def test_a_paged_server_has_memory_for_what_it_promises(tier: Path) -> None:
    use = Use(20, step=8)
    whole = plan(tier, use, available=Budget(UNLIMITED, MAC))
    how: dict[str, Any] = {"memory": AUTO, "available": Budget(whole.needed - 1, MAC)}
    capacity, conversations, one = find_capacity(tier, use, **how)
    assert one.slots is not None and one.fits and conversations == 1
    _, conversations, more = find_capacity(tier, use, 2, **how)
    assert more.slots is not None and more.fits and conversations == 2
    assert more.slots <= one.slots and more.kv_cache.nbytes >= 2 * whole.kv_cache.nbytes
    assert capacity.cache_memory == one.kv_cache.nbytes


@pytest.mark.parametrize("slots", slow_but([17], [8, 17, 31]))
def test_peak_memory_of_paged_experts_stays_below_the_plan(tier: Path, slots: int) -> None:
    use = Use(500, step=256)
    planned = plan(tier, use, ExpertMemory(slots=slots), Budget(UNLIMITED, CPU))
    before = at_rest()
    model, _ = load_model(tier, expert_memory=planned)
    for _ in generate_step(mx.arange(480) % 250, model, max_tokens=20, prefill_step_size=256):
        pass
    peak = mx.get_peak_memory() - before
    assert peak <= planned.needed - planned.mlx_cache.nbytes
    resident = plan(tier, use, ALL, Budget(UNLIMITED, CPU))
    assert planned.loaded < resident.loaded


def test_a_14b_overlay_on_a_mac_with_16_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of docs/sizes.md: 28 layers of 8 experts, 17.9 GB in int4 and 1.6 bits."""
    width, hidden, rows = 13824, 5120, 8 * 13824 * 1024
    config = {
        "model_type": "outlier_moe",
        "hidden_size": hidden,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_layers": list(range(20, 48)),
        "ternary": {"format": "tq1_0_strided", "version": 2},
        "dtype": "bfloat16",
    }
    slot = 42_600_000
    needs = Needs(
        plain=8_314_000_000,
        copies=0,
        routed=224 * slot,
        routed_copies=0,
        converted=2 * (8 * width * hidden // 4 + 8 * 8 * width * hidden // 128),
        gathered=2 * rows,
        experts=Experts(28, 8, 2, slot),
        elements=10**10,
        config=describe(config),
        on_cpu=False,
        wide=False,
    )
    monkeypatch.setattr(plan_module, "needs_of", lambda folder, on_cpu, wide: needs)
    folder = Path("14b")
    short = plan(folder, Use(300), available=budget(16))
    assert short.fits and short.slots is not None and 56 < short.slots < 80
    assert short.step == 2048 and short.needed <= budget(16).nbytes * 31 / 32
    # With more context there is only room for the least, and for shorter steps.
    long = plan(folder, Use(4096), available=budget(16))
    assert long.fits and long.slots == 56 and long.step < 2048
    assert plan(folder, Use(4096), available=budget(32)).slots is None
    half = plan(folder, Use(4096), available=budget(24))
    assert half.slots is not None and half.slots > 130 and half.step == 2048


def test_shorter_steps_are_kept_to(tier: Path) -> None:
    planned = plan(tier, Use(400, step=16), ExpertMemory(slots=9), Budget(UNLIMITED, CPU))
    model, _ = load_model(tier, expert_memory=planned)
    assert prefill_step(model, 2048) == 16 and prefill_step(model, 8) == 8


def test_what_is_widened_takes_twice_as_much(tmp_path: Path) -> None:
    folder = tmp_path / "halves"
    write_model(folder, SIZES | {"model_type": "llama"})
    weights = {
        name: value.astype(mx.bfloat16)
        for name, value in cast("dict[str, mx.array]", mx.load(str(folder / FILE))).items()
    }
    mx.save_safetensors(str(folder / FILE), weights, {"format": "mlx"})
    mac = Budget(UNLIMITED, MAC)
    narrow, wide = (plan(folder, Use(100, wide=wide), available=mac) for wide in (False, True))
    assert wide.weights.nbytes == 2 * narrow.weights.nbytes
    assert wide.kv_cache.nbytes == 2 * narrow.kv_cache.nbytes
    with pytest.raises(OutlierError, match="halves needs"):
        check_fits(folder, Use(100, wide=True), Budget(narrow.needed, MAC))
    check_fits(folder, Use(100), Budget(narrow.needed, MAC))


@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_slot_is_as_large_as_the_pool_makes_it(tier: Path, on_cpu: bool) -> None:
    experts = needs_of(tier, on_cpu).experts
    config = describe(raw_config(tier))
    assert experts is not None and config.hidden and config.expert_width
    made = slot_nbytes(config.hidden, config.expert_width, packed=not on_cpu)
    assert experts.slot_nbytes == made
