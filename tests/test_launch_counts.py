"""How many launches a decoding step is, counted from MLX's graph."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import activations

from kernels.costs import CHIPS
from kernels.costs_decode import MODELS
from kernels.costs_routing import launched, rows
from kernels.emulator import virtual_metal
from kernels.launch_counts import Shape, count, launches, mlx_lm_moe, tier
from kernels.launch_counts_ternary import count_layers, mlx_two_bits, ternary
from tests.program import ROOT, run_command

SMALL = {"hidden": 64, "width": 128, "heads": 4, "kv_heads": 2, "vocab": 300, "layers": 2}


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8)])
def test_a_routed_layer(experts: int, top_k: int):
    """At most five beside the shared FFN's own, for Outlier's 14B; mlx-lm's layer has 18."""
    shape = Shape(experts=experts, top_k=top_k)
    found = count(tier(shape), shape)
    assert found["routed"].total() <= 5
    kernels = ["tq1_0_route", "tq1_0_swiglu", "tq1_0_down"]
    if experts == 64:  # a router of 1.3 MB
        kernels.append("tq1_0_logits")
    assert found["routed"] == Counter(kernels)
    assert found["shared FFN"] == {"QuantizedMatmul": 3, "swiglu": 1}
    assert found["layer"].total() == 20 + len(kernels)
    # Beside the layers: the embedding is three gathers and their conversion; a norm, the head.
    assert found["token"].total() == shape.layers * found["layer"].total() + 6
    theirs = count(mlx_lm_moe(shape), shape)
    assert theirs["routed"].total() == 18 and theirs["shared FFN"] == found["shared FFN"]
    assert mx.get_active_memory() < 1 << 28  # weights would be gigabytes


def test_what_is_counted_is_what_is_launched():
    """The kernels of a layer, in the emulator."""
    shape = Shape(**SMALL, experts=5)
    block = tier(shape).layers[1].mlp
    block.set_dtype(mx.float32)
    expected = {name: n for name, n in count(tier(shape), shape)["routed"].items() if "tq1" in name}
    for linear in ("gate_proj", "up_proj", "down_proj"):
        experts = block.switch_mlp[linear]
        experts.scales = experts.scales.astype(mx.float32)
    with virtual_metal(count=False) as metal:
        mx.eval(block(mx.zeros((1, 1, shape.hidden))))
    assert Counter(metal.names) == expected


def test_one_call_at_a_time():
    """What is fused is one launch; what moves nothing is none."""
    x = mx.zeros((4, 8))
    norm = nn.RMSNorm(8)
    mx.eval(norm.weight)  # else it is filled in this graph
    assert launches(lambda x: activations.swiglu(x, x + 1).reshape(8, 4).T, x) == {
        "Add": 1,
        "swiglu": 1,
    }
    assert launches(lambda x: (norm(x), x[:, None].astype(mx.float16)), x) == {
        "rms_norm": 1,
        "AsType": 1,
    }
    assert launches(lambda x: x.reshape(2, 16), x) == {}
    with pytest.raises(ValueError, match=r"not known how many launches these are: \['LogSumExp'\]"):
        launches(lambda x: mx.logsumexp(x, axis=-1), x)
    assert activations.swiglu(x, x).shape == x.shape  # nothing stays replaced


def test_the_command_prints_both():
    script = ROOT / "scripts" / "launches.py"
    options = [word for name, n in SMALL.items() for word in (f"--{name}", str(n))]
    options = [option.replace("_", "-") for option in options]
    out = run_command(sys.executable, script, *options, cwd=ROOT).out.splitlines()
    assert [line.split(" | ")[1:5] for line in out[2:]] == [
        ["tier", "3", "4", "23"],
        ["tier, routing in plain MLX", "23", "4", "43"],
        ["mlx-lm's Qwen2-MoE", "18", "4", "38"],
    ]


def test_costs_of_routing():
    """A router is read once, and threads have room."""
    (one,) = launched(5120, 8, 2, 1)
    assert one.main + one.second / 2 <= 2700 and one.bytes == 5120 * (2 + 8 * 4)
    logits, route = launched(5120, 64, 8, 1)
    assert (logits.count, route.count) == (16, 1) and logits.bytes == 5120 * (2 + 4 * 4)
    assert max(g.registers for t in (1, 4) for g in launched(5120, 8, 2, t)) <= 104
    times = [float(row[-3]) for row in rows(CHIPS[0], 5120)]
    assert times[2] + times[3] < 0.1 * times[1]  # so another launch is worth it


def test_costs_of_routing_do_not_depend_on_chance():
    found = []
    for seed in (0, 226):  # 226: x and the router that it draws would cost less
        mx.random.seed(seed)
        launched.cache_clear()
        found.append(launched(512, 64, 8, 1))
    assert found[0] == found[1]


def test_layers_of_ternary_models():
    """No more than mlx-lm's 2-bit layers; with rotations half of its own, and four more."""
    shape = replace(MODELS[-1], vocab=512)
    for rotated in (False, True):
        ours = count_layers(ternary(shape, rotated=rotated), shape)
        theirs = count_layers(mlx_two_bits(shape, rotated=rotated), shape)
        for mine, other, matrices in zip(ours, theirs, (6, 7), strict=True):
            assert mine["tq1_0_linear"] == other["QuantizedMatmul"] == matrices
            assert mine["tq1_0_rotate"] == (4 if rotated else 0)
            assert other["Hadamard"] == (matrices if rotated else 0)
            assert mine.total() <= other.total() and (
                not rotated or 1.8 * mine.total() < other.total()
            )
