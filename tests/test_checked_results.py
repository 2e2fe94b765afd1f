"""The self-test: it passes here, and a wrong result of a product or a kernel is found and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from kernels.emulator import virtual_metal
from outlier_mlx.measure import bench_cases, bench_kernels, checked_results
from outlier_mlx.measure.checked_results import Check
from outlier_mlx.runtime import ops
from tests.metal import needs_emulator


def test_this_machine_computes_what_it_should():
    found = checked_results.self_test()
    assert found.wrong == []
    names = [check.name for check in found.checks]
    assert len(names) == len(set(names)) >= 27
    for bits in (2, 4):
        for group in (32, 64, 128):
            how = f"{bits} bits, groups of {group}, float32"
            assert f"quantized_matmul, {how}, 1 vector" in names
            assert f"gather_qmm, {how}, 96 vectors" in names
    assert "a layer of experts, float32, 33 tokens" in names


def test_without_a_gpu_no_kernel_is_claimed():
    if mx.metal.is_available():
        pytest.skip("there is a GPU")
    assert checked_results.self_test().kernels == 0


def one_code_off(product: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The same product, but the first weight of every row is another one."""

    def wrong(x: mx.array, weight: mx.array, *rest: mx.array, **how: Any) -> mx.array:
        return product(x, weight ^ (mx.arange(weight.shape[-1]) == 0), *rest, **how)

    return wrong


def one_row_missing(product: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def wrong(*given: mx.array, **how: Any) -> mx.array:
        y = product(*given, **how)
        return y * (mx.arange(y.shape[-1]) != 3)

    return wrong


@pytest.mark.parametrize("name", ["gather_qmm", "quantized_matmul"])
@pytest.mark.parametrize("damage", [one_code_off, one_row_missing])
def test_a_wrong_product_is_found(name: str, damage: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mx, name, damage(getattr(mx, name)))
    wrong = checked_results.self_test().wrong
    products = [check for check in wrong if check.name.startswith(name)]
    assert len(products) == 12 and all("wrong" in str(check.error) for check in products)
    layers = [check.name for check in wrong if "experts" in check.name]
    assert bool(layers) == (name == "gather_qmm")  # what the layers use here
    assert len(wrong) == len(products) + len(layers)


def test_a_product_that_fails_is_told(monkeypatch: pytest.MonkeyPatch):
    def fails(*given: Any, **how: Any) -> mx.array:
        raise RuntimeError("[metal::Device] Unable\nto build metal library")

    monkeypatch.setattr(mx, "quantized_matmul", fails)
    found = checked_results.self_test()
    text = "[metal::Device] Unable to build metal library"
    assert Check("quantized_matmul, 2 bits, groups of 32, float32, 1 vector", text) in found.wrong


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch):
    real = mx.gather_qmm
    monkeypatch.setattr(mx, "gather_qmm", lambda *a, **k: real(*a, **k) * mx.nan)
    assert len(checked_results.self_test().wrong) == 15


@needs_emulator
@pytest.mark.slow
def test_every_kernel():
    """On the emulator, in every dtype."""
    with virtual_metal(count=False) as metal:
        found = checked_results.self_test()
    assert found.wrong == [] and found.kernels >= 3 * len(set(metal.names))
    assert len(set(metal.names)) == 10  # all but the one of large routers


@needs_emulator
def test_a_comparison_that_fails_is_told(monkeypatch: pytest.MonkeyPatch):
    def fails(*given: Any) -> Any:
        raise RuntimeError("[metal] out of memory")

    monkeypatch.setattr(bench_kernels, "cases", fails)
    monkeypatch.setattr(checked_results, "TOKENS", (1,))
    with virtual_metal(count=False):
        wrong = checked_results.self_test().wrong
    dtypes = "float32", "float16", "bfloat16"
    assert wrong == [Check(f"kernels, {dtype}", "[metal] out of memory") for dtype in dtypes]


@needs_emulator
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch):
    """Both in a layer and by itself; other kernels stay sound."""
    real = bench_cases.cases
    some = "tq1_0_down", "tq1_0_to_affine2"
    monkeypatch.setattr(
        bench_kernels, "cases", lambda *a: [case for case in real(*a) if case.name in some]
    )
    monkeypatch.setattr(checked_results, "TOKENS", (1,))
    with virtual_metal(count=False):
        assert checked_results.self_test().wrong == []
        for module in (bench_cases, ops):
            monkeypatch.setattr(module, "tq1_0_down", one_row_missing(module.tq1_0_down))
        wrong = [check.name for check in checked_results.self_test().wrong]
    dtypes = "float32", "float16", "bfloat16"
    layers = [f"a layer of experts, {dtype}, 1 token" for dtype in dtypes]
    assert wrong == layers + [f"tq1_0_down, {dtype}" for dtype in dtypes]
