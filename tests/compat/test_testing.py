"""`deep_gemm.testing`: the error measure, byte counts, decorators and timers."""

from __future__ import annotations

import os

import pytest
import torch


def test_calc_diff(deep_gemm):
    from deep_gemm.testing.numeric import calc_diff

    x, y = torch.randn((2, 50, 40))
    xd, yd = x.double(), y.double()
    want = 1 - 2 * (xd * yd).sum() / (xd * xd + yd * yd).sum()
    assert calc_diff(x, y) == pytest.approx(want.item())
    assert calc_diff(x, x) == 0 and calc_diff(0 * x, 0 * x) == 0
    y[0, 0] = float("nan")
    assert not calc_diff(x, y) < 0.001


def test_count_bytes(deep_gemm):
    x, s = torch.zeros((4, 6), dtype=torch.bfloat16), torch.zeros(5)
    assert deep_gemm.testing.count_bytes((x, s), [x, None], s) == 2 * 48 + 2 * 20


def test_assert_bitwise_equal(deep_gemm):
    check = deep_gemm.testing.numeric.assert_bitwise_equal
    x = torch.randn((3, 4)).to(torch.bfloat16)
    check(x, x.clone())
    y = x.clone()
    y[1, 2] += 1
    for other, match in ((y, r"1 of 12 elements differ \(w\), first at \(1, 2\)"), (x.float(), r"float32 \(w\)"),
                         (x[:2], r"\(3, 4\) .* against \(2, 4\)")):
        with pytest.raises(AssertionError, match=match):
            check(x, other, "w")


@pytest.mark.parametrize(("arch", "major"), [("h200", 9), ("b200", 10), ("rtx5090", 12), ("mi350x", 9), ("cpu", 9)])
def test_arch_major(deep_gemm, monkeypatch, arch, major):
    monkeypatch.setenv("NARROWGEMM_ARCH", arch)
    assert deep_gemm.testing.get_arch_major() == major


def test_decorators(deep_gemm, monkeypatch, capsys):
    ran = []

    @deep_gemm.testing.test_filter(lambda: False)
    def skipped() -> None:
        ran.append("skipped")

    @deep_gemm.testing.test_filter(lambda: True)
    def taken(x: int, *, y: int) -> None:
        ran.append((x, y))

    skipped()
    taken(1, y=2)
    assert ran == [(1, 2)] and "skipped: filtered" in capsys.readouterr().out

    monkeypatch.setenv("SOME_NAME", "1")
    seen = []
    for condition in (True, False):
        without = deep_gemm.testing.ignore_env("SOME_NAME", lambda c=condition: c)
        without(lambda: seen.append(os.environ.get("SOME_NAME")))()
    assert seen == [None, "1"] and os.environ["SOME_NAME"] == "1"


def test_timers_without_a_gpu(deep_gemm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls = []
    assert deep_gemm.testing.bench(lambda: calls.append(0), num_warmups=2, num_tests=3) > 0
    assert len(calls) == 5
    one = deep_gemm.testing.bench_kineto(lambda: calls.append(0), "gemm_", num_tests=3)
    two = deep_gemm.testing.bench_kineto(lambda: calls.append(0), ("nvjet", "reduce"), num_tests=3)
    assert one > 0 and two[0] > 0 and two[1] == 0
    with pytest.raises(ValueError, match=r"num_tests: got 0"):
        deep_gemm.testing.bench_kineto(lambda: None, "gemm_", num_tests=0)


@pytest.mark.gpu
def test_timers(deep_gemm, tmp_path):
    x = torch.randn((2048, 2048), device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)

    def call() -> None:
        torch.add(x, x, out=y)
        torch.cumsum(x, 0, out=y)

    bench, kineto = deep_gemm.testing.bench, deep_gemm.testing.bench_kineto
    assert 0 < bench(call, high_precision=True) < 1
    trace = tmp_path / "trace.json"
    add = kineto(call, "elementwise", num_tests=5, trace_path=str(trace), flush_l2=False)
    assert 0 < add < 1 and trace.stat().st_size > 0
    whole = kineto(call, "no_such_kernel", num_tests=5, barrier=torch.cuda.synchronize)
    assert whole > add
    assert kineto(call, ("no_such_kernel", "nor_this"), num_tests=5)[1] == 0
