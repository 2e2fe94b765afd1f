"""The kernels that mlx-lm ships pass lint, run, and equal the same computation in MLX operations.

Sums are added in another order here, so results agree to a few units in the last place of the
dtype; where a kernel only moves or selects, bit for bit.
"""

import math
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from kernels.emulator import RaceError, VirtualMetal

from .tools import fresh, numbers

EPSILON = {mx.float32: 2.0**-22, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


def normal(*shape: int, seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def assert_close(got: mx.array, expected: mx.array, steps: float = 4) -> None:
    """Within `steps` units in the last place of the largest value."""
    assert got.shape == expected.shape
    a, b = numbers(got), numbers(expected)
    allowed = steps * EPSILON[got.dtype] * max(1.0, float(np.abs(b).max()))
    assert np.abs(a - b).max() <= allowed


@pytest.fixture
def kernels(virtual_metal: VirtualMetal) -> ModuleType:
    return fresh("mlx_lm.kernels")


def test_bitlinear(virtual_metal: VirtualMetal) -> None:
    module = fresh("mlx_lm.models.bitlinear_layers")
    trits = np.random.default_rng(1).integers(-1, 2, (64, 256))
    rows = (trits + 1).astype(np.uint8).reshape(4, 16, 256)
    packed = rows[0] | rows[1] << 2 | rows[2] << 4 | rows[3] << 6
    for dtype in (mx.float32, mx.float16):
        for invert in (False, True):
            layer = module.BitLinear(256, 64, bias=False, invert_weight_scales=invert)
            layer.weight, layer.weight_scale = mx.array(packed), mx.array([2.5]).astype(dtype)
            x = normal(3, 256, seed=2, dtype=dtype)
            scale = 1 / 2.5 if invert else 2.5
            expected = (x.astype(mx.float32) @ mx.array(trits.T.astype(np.float32))) * scale
            assert_close(layer(x), expected.astype(dtype))
    assert set(virtual_metal.names) == {"bitlinear_matmul"}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gated_delta(virtual_metal: VirtualMetal, dtype: mx.Dtype) -> None:
    module = fresh("mlx_lm.models.gated_delta")
    b, t, hk, hv, dv = 1, 3, 2, 4, 8
    for dk in (64, 128):
        q, k = (normal(b, t, hk, dk, seed=s, dtype=dtype) * 0.1 for s in (1, 2))
        v = normal(b, t, hv, dv, seed=3, dtype=dtype)
        beta = mx.sigmoid(normal(b, t, hv, seed=4, dtype=dtype))
        state = normal(b, hv, dv, dk, seed=5)
        gates = {False: mx.sigmoid(normal(b, t, hv, seed=6)),
                 True: mx.sigmoid(normal(b, t, hv, dk, seed=7))}  # fmt: skip
        for vector, g in gates.items():
            for mask in (None, mx.array([[True, False, True]])):
                y, new = module.gated_delta_kernel(q, k, v, g, beta, state, mask)
                y_ops, new_ops = module.gated_delta_ops(q, k, v, g, beta, state, mask)
                if mask is not None:  # the kernel leaves out what the operations compute anyway
                    assert not numbers(y[:, 1]).any()
                    y, y_ops = y[:, ::2], y_ops[:, ::2]
                assert_close(y, y_ops)
                assert_close(new, new_ops)
            if dk == 128 and not vector:  # its authors promise the same bits
                two = module.gated_delta_kernel_xtree(q, k, v, g, beta, state)
                packed = module.gated_delta_kernel(q, k, v, g, beta, state)
                assert all(mx.array_equal(x, y) for x, y in zip(two, packed, strict=True))
    assert set(virtual_metal.names) == {
        "gated_delta_step", "gated_delta_step_mask", "gated_delta_step_vec",
        "gated_delta_step_vec_mask", "gated_delta_step_packed_btree", "gated_delta_step_xtree",
    }  # fmt: skip


def test_expert_routing(kernels: ModuleType) -> None:
    for experts, k in ((64, 4), (40, 3)):
        logits, bias = normal(5, experts, seed=1), normal(experts, seed=2) * 0.1
        indices, weights = kernels.expert_routing(
            logits, bias, top_k=k, multiplier=1.5, score_eps=1e-6, route_scale=2.0
        )
        scores = mx.sigmoid(logits * 1.5)
        chosen = mx.argsort(-(scores + bias), axis=-1)[:, :k]
        assert mx.array_equal(indices, chosen)
        expected = mx.take_along_axis(scores, chosen, -1)
        assert_close(weights, expected / (expected.sum(-1, keepdims=True) + 1e-6) * 2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_norm_add_norm(kernels: ModuleType, dtype: mx.Dtype) -> None:
    d = 544
    branch, stream = normal(3, d, seed=1, dtype=dtype), normal(3, d, seed=2)
    alpha, beta, post = (normal(d, seed=s) for s in (3, 4, 5))
    norm = nn.RMSNorm(d)
    norm.weight = normal(d, seed=6)
    for weight in (None, post):
        new, normed = kernels.norm_add_norm(
            branch, stream, alpha=alpha, beta=beta, post_weight=weight, post_eps=1e-5,
            next_norm=norm,
        )  # fmt: skip
        scaled = branch if weight is None else weight.astype(dtype) * branch
        n = mx.fast.rms_norm(scaled, None, 1e-5).astype(mx.float32)
        expected = alpha * stream + beta * n
        assert_close(new, expected, 4 if dtype == mx.float32 else 2**15)
        assert_close(normed, mx.fast.rms_norm(new, norm.weight, norm.eps).astype(dtype))
        assert mx.array_equal(kernels.pre_norm(new, norm, dtype=dtype), normed)
        alone, none = kernels.norm_add_norm(
            branch, stream, alpha=alpha, beta=beta, post_weight=weight, post_eps=1e-5,
            next_norm=None,
        )  # fmt: skip
        assert none is None and mx.array_equal(alone, new)


def test_post_expert_norm_combine(kernels: ModuleType) -> None:
    for d in (256, 600):
        experts, weights = normal(2, 4, d, seed=1), mx.abs(normal(2, 4, seed=2))
        norm = normal(d, seed=3)
        got = kernels.post_expert_norm_combine(experts, weights, norm_weight=norm, eps=1e-5)
        v = experts * norm
        v = v * mx.rsqrt((v * v).mean(-1, keepdims=True) + 1e-5)
        assert_close(got, (v * weights[..., None]).sum(1))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_qk_norm_and_rope(kernels: ModuleType, dtype: mx.Dtype) -> None:
    x = normal(2, 3, 2 * (4 + 2) * 64, seed=1, dtype=dtype)
    sizes: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "eps": 1e-5}
    q, k = kernels.qk_norm(x, query_scale=0.5, **sizes)
    q_ops = mx.fast.rms_norm(x[..., :256].reshape(2, 3, 4, 64), None, 1e-5) * 0.5
    k_ops = mx.fast.rms_norm(x[..., 256:384].reshape(2, 3, 2, 64), None, 1e-5)
    assert_close(q, q_ops)
    assert_close(k, k_ops)
    for offset in (7, mx.array([0, 11])):
        q, k = kernels.qk_norm_rope(x, query_scale=0.5, rope_base=1e4, offset=offset, **sizes)
        for got, plain in ((q, q_ops), (k, k_ops)):
            turned = mx.fast.rope(
                plain.swapaxes(1, 2), 64, traditional=True, base=1e4, scale=1.0, offset=offset
            )
            assert_close(got, turned.swapaxes(1, 2), 16)


def test_rms_norm_sigmoid_gate(kernels: ModuleType) -> None:
    wide = normal(2, 6, 4, 64, seed=1)
    gate = normal(2, 4, 3 * 64, seed=2)
    for x in (wide[:, ::2], wide[:, :3]):  # read through strides, without a copy
        got = kernels.rms_norm_sigmoid_gate(x, gate, eps=1e-5)
        normed = mx.fast.rms_norm(x, None, 1e-5).swapaxes(1, 2).reshape(2, 4, 192)
        assert_close(got, normed * mx.sigmoid(gate))


def test_state_space_step(virtual_metal: VirtualMetal) -> None:
    module = fresh("mlx_lm.models.ssm")
    n, h, d, groups, ds = 2, 4, 8, 2, 64
    x, dt, state = normal(n, 1, h, d, seed=1), normal(n, 1, h, seed=2), normal(n, h, d, ds, seed=3)
    a_log, skip, bias = (normal(h, seed=s) for s in (4, 5, 6))
    b, c = (normal(n, 1, groups, ds, seed=s) for s in (7, 8))
    limits = (0.001, 100.0)
    got = module.ssm_update_kernel(x, a_log, b, c, skip, dt, bias, state, limits)
    expected = module.ssm_attn(x, a_log, b, c, skip, dt, bias, state, limits)
    for one, two in zip(got, expected, strict=True):
        assert_close(one, two)


def test_wkv7(virtual_metal: VirtualMetal) -> None:
    module = fresh("mlx_lm.models.rwkv7")
    r, k, v, a, b = (normal(1, 3, 2, 64, seed=s) * 0.3 for s in range(5))
    w, state = mx.sigmoid(normal(1, 3, 2, 64, seed=6)), normal(1, 2, 64, 64, seed=7)
    y, new = module.wkv7_kernel(r, w, k, v, a, b, state)
    for t in range(3):
        args = [x[:, t] for x in (r, w, k, v, a, b)]
        step, state = module._wkv7_step_ops(*args, state)
        assert_close(y[:, t], step.reshape(1, 2, 64))
    assert_close(new, state)


def test_residual_mix_and_sinkhorn(
    virtual_metal: VirtualMetal, monkeypatch: pytest.MonkeyPatch
) -> None:
    kimi, deepseek = fresh("mlx_lm.models.kimi_k3"), fresh("mlx_lm.models.deepseek_v41")
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)  # they ask for it
    blocks = kimi.ResidualBlocks(1e-5)
    for seed in (1, 2, 3):
        blocks.append(normal(1, 2, 256, seed=seed))
    now, w = normal(1, 2, 256, seed=4), normal(256, seed=5) * 0.1
    got = kimi._attn_res_mix(blocks, now, w, 1e-5)
    assert_close(got, kimi._attn_res_mix(blocks, now, w, 1e-5, use_kernel=False), 16)
    comb, eps = mx.abs(normal(2, 5, 4, 4, seed=6)), mx.array([1e-6])
    got = deepseek._sinkhorn(comb, iters=5, eps=eps)
    monkeypatch.undo()
    assert_close(got, deepseek._sinkhorn(comb, iters=5, eps=eps))
    assert virtual_metal.names == ["attnres_mix", "deepseek_v41_sinkhorn"]


@pytest.mark.parametrize("repaired", [False, True])
def test_distillation_losses(
    virtual_metal: VirtualMetal, monkeypatch: pytest.MonkeyPatch, repaired: bool
) -> None:
    """Their simdgroups write an array again before all have read it, which shows here.

    docs/emulator.md lists it. With one more barrier they compute the losses.
    """

    def metal_kernel(**arguments: Any) -> Any:
        if repaired:
            barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
            mark = "// Share the sum_exp across the threadgroup"
            assert mark in arguments["source"]
            arguments["source"] = arguments["source"].replace(mark, barrier)
        return virtual_metal.metal_kernel(**arguments)

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    monkeypatch.setattr("mlx_lm.utils.can_run_metal", lambda: True)
    module = fresh("mlx_lm.tuner.losses")
    q, p = normal(3, 2000, seed=1), normal(3, 2000, seed=2)
    log_q, log_p = (x - mx.logsumexp(x, -1, keepdims=True) for x in (q, p))
    kl = nn.losses.kl_div_loss(log_q, log_p, axis=-1, reduction="none")
    middle = mx.logaddexp(log_q, log_p) - math.log(2)
    halves = [nn.losses.kl_div_loss(middle, x, axis=-1, reduction="none") for x in (log_q, log_p)]
    cotangent = mx.array([1.0, 2.0, 3.0])

    def slope() -> mx.array:
        return module._kl_backward_kernel(
            inputs=[q, p, cotangent], output_shapes=[q.shape], output_dtypes=[q.dtype],
            template=[("T", q.dtype), ("V", 2000)], grid=(1024, 3, 1), threadgroup=(1024, 1, 1),
        )[0]  # fmt: skip

    cases = [
        (lambda: module.kl_div_loss(q, p), kl),
        (lambda: module.js_div_loss(q, p), 0.5 * (halves[0] + halves[1])),
        (slope, cotangent[:, None] * (mx.exp(log_q) - mx.exp(log_p))),
    ]
    for run, expected in cases:
        try:
            assert_close(run(), expected, 64)
        except RaceError as race:
            assert not repaired and "depends on the order of threads" in str(race)
