"""Primus-Turbo's own test list on a GPU: a covering part of its 57,600 cases, at its sizes, and what its list leaves out.

Each (N, K) meets every number of groups and rows a group; formats, granularities, dtypes, `trans_b`, balance and `num_cu` go round beside
them, so that every pair of those occurs. The measure and the limits are its own: SNR against the unquantised product, 25 dB for
E4M3, 20 dB where E5M2 takes part; and 50 dB against the product of the same bits for the kernels by themselves.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from narrowgemm.compat.primus_turbo import (
    Float8QuantConfig,
    Format,
    ScalingGranularity,
    grouped_gemm_fp8,
    grouped_gemm_fp8_tensorwise_flydsl_kernel,
    grouped_gemm_fp8_variable_k_tensorwise_flydsl_kernel,
)
from narrowgemm.testing.numerics import snr_db

from .test_primus_turbo import unbalanced

pytestmark = pytest.mark.gpu
NK = ((2048, 1536), (2048, 1408), (1408, 2048), (2816, 2048), (3072, 5120), (5120, 1536), (4096, 7168), (7168, 2048))
GROUPS, ROWS = (1, 2, 3, 8, 16, 32), (128, 256, 512, 1024, 2048)
LIMIT = {Format.E4M3: 25.0, Format.E5M2: 20.0, Format.HYBRID: 20.0}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CHOICES = list(itertools.product(Format, ScalingGranularity, (torch.bfloat16, torch.float16), (True, False), (True, False), (-1, 48)))


def covering() -> list[tuple]:
    """(groups, rows, N, K, format, granularity, dtype, trans_b, balance, num_cu): every pair of the last six occurs."""
    out = []
    for i, ((n, k), g) in enumerate(itertools.product(NK, GROUPS)):
        m = ROWS[(i + i // 6) % len(ROWS)]
        if g * m <= 16384:
            out.append((g, m, n, k, *CHOICES[i * 31 % len(CHOICES)]))
    return out


def test_every_pair_occurs() -> None:
    cases = covering()
    assert {(c[2], c[3]) for c in cases} == set(NK) and {c[0] for c in cases} == set(GROUPS) and {c[1] for c in cases} == set(ROWS)
    for i, j in itertools.combinations(range(4, 10), 2):
        assert len({(c[i], c[j]) for c in cases}) == len({c[i] for c in cases}) * len({c[j] for c in cases}), (i, j)


def made(lens: list[int], n: int, k: int, dtype: torch.dtype, trans_b: bool) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.randn(sum(lens), k, device="cuda").to(dtype).requires_grad_()
    b = torch.randn(len(lens), *((n, k) if trans_b else (k, n)), device="cuda").to(dtype).requires_grad_()
    return a, b


def by_group(a, b, dy, lens, trans_b) -> tuple[torch.Tensor, ...]:
    """out, a.grad, b.grad per group, unquantised."""
    a, b, dy = a.detach().float(), b.detach().float(), dy.float()
    parts = list(zip(a.split(lens), b, dy.split(lens)))
    out = torch.cat([x @ (w.T if trans_b else w) for x, w, _ in parts])
    da = torch.cat([d @ (w if trans_b else w.T) for _, w, d in parts])
    return out, da, torch.stack([d.T @ x if trans_b else x.T @ d for x, _, d in parts])


@pytest.mark.parametrize("case", covering(), ids=lambda c: "-".join(str(getattr(x, "name", x)).removeprefix("torch.") for x in c))
def test_list(case) -> None:
    g, m, n, k, form, granularity, dtype, trans_b, balance, num_cu = case
    torch.manual_seed(g * m + n)
    lens = [m] * g if balance else unbalanced(g, m * g)
    a, b = made(lens, n, k, dtype, trans_b)
    out = grouped_gemm_fp8(a, b, torch.tensor(lens, device="cuda"), trans_b=trans_b, config=Float8QuantConfig(form, granularity),
                           num_cu=num_cu)
    dy = torch.randn_like(out)
    out.backward(dy)
    want = by_group(a, b, dy, lens, trans_b)
    assert min(snr_db(x.float(), y) for x, y in zip((out.detach(), a.grad, b.grad), want)) > LIMIT[form]
    # the kernels by themselves, on operands that come quantised, E4M3, E5M2 or one of each
    fa, fb = {Format.E4M3: (E4M3, E4M3), Format.E5M2: (E5M2, E5M2), Format.HYBRID: (E4M3, E5M2)}[form]
    qa, qb, qd = a.detach().to(fa), b.detach().to(fb), dy.to(fb)
    one, offs = torch.ones(1, device="cuda"), torch.tensor([0, *lens], device="cuda").cumsum(0)
    out = grouped_gemm_fp8_tensorwise_flydsl_kernel(qa, qb, one, one, offs, trans_b=trans_b, out_dtype=dtype, num_cu=num_cu)
    dw = grouped_gemm_fp8_variable_k_tensorwise_flydsl_kernel(qd, qa, one, one, offs, out_dtype=dtype, num_cu=num_cu)
    want = by_group(qa.float(), qb.float(), qd.float(), lens, trans_b)
    dw = dw if trans_b else dw.transpose(1, 2)
    finite = dtype != torch.float16 or max(x.abs().max() for x in want) < 6e4
    if finite:
        assert min(snr_db(x.float(), y) for x, y in ((out, want[0]), (dw, want[2]))) > 50


@pytest.mark.parametrize(("groups", "rows", "nk", "form", "trans_b", "balance"), [
    (1, 256, (2048, 1536), Format.E4M3, True, True), (8, 256, (4096, 7168), Format.HYBRID, True, False),
    (8, 1024, (2048, 1536), Format.E5M2, False, False), (1, 1024, (4096, 7168), Format.E4M3, False, True)])
@pytest.mark.parametrize("granularity", ScalingGranularity)
def test_ten_repeats_are_bit_equal(groups, rows, nk, form, trans_b, balance, granularity) -> None:
    lens = [rows] * groups if balance else unbalanced(groups, rows * groups)
    a, b = made(lens, *nk, torch.bfloat16, trans_b)
    dy = torch.randn(sum(lens), nk[0], device="cuda").bfloat16()
    first = None
    for _ in range(10):
        a.grad = b.grad = None
        out = grouped_gemm_fp8(a, b, torch.tensor(lens, device="cuda"), trans_b=trans_b, config=Float8QuantConfig(form, granularity))
        out.backward(dy)
        got = out.detach(), a.grad, b.grad
        first = first or got
        assert all(torch.equal(x, y) for x, y in zip(first, got))


@pytest.mark.parametrize("granularity", ScalingGranularity)
@pytest.mark.parametrize("lens", [[8192, 8192, 0, 0, 0, 0, 0, 0], [0, 1, 0, 8191]], ids=str)
def test_empty_groups(granularity, lens) -> None:
    """What its list tests for blocks alone: groups without rows, whose gradient is zero."""
    a, b = made(lens, 8192 if lens[0] else 1024, 2048, torch.bfloat16, True)
    out = grouped_gemm_fp8(a, b, torch.tensor(lens, device="cuda"), config=Float8QuantConfig(granularity=granularity))
    dy = torch.randn_like(out)
    out.backward(dy)
    assert all(bool(b.grad[g].any()) == bool(n) for g, n in enumerate(lens))
    assert min(snr_db(x.float(), y) for x, y in zip((out.detach(), a.grad, b.grad), by_group(a, b, dy, lens, True))) > 25


@pytest.mark.parametrize("granularity", ScalingGranularity)
def test_in_a_graph_with_other_sizes(granularity) -> None:
    """What its list skips: captured once, replayed with groups of other sizes, which live on the device."""
    lens = torch.tensor([300, 0, 200, 524], device="cuda")
    a, b = made(lens.tolist(), 512, 1024, torch.bfloat16, True)
    dy = torch.randn(1024, 512, device="cuda").bfloat16()
    config, side = Float8QuantConfig(granularity=granularity), torch.cuda.Stream()
    main_a, main_b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()

    def step() -> torch.Tensor:
        main_a.grad = main_b.grad = None
        out = grouped_gemm_fp8(main_a, main_b, lens, config=config)
        out.backward(dy)
        return out

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for sizes in ([300, 0, 200, 524], [0, 1000, 24, 0], [256] * 4):
        lens.copy_(torch.tensor(sizes))
        graph.replay()
        torch.cuda.synchronize()
        want = by_group(a, b, dy, sizes, True)
        assert min(snr_db(x.float(), y) for x, y in zip((out.detach(), main_a.grad, main_b.grad), want)) > 25, sizes
        assert all(bool(main_b.grad[g].any()) == bool(n) for g, n in enumerate(sizes))
