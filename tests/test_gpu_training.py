"""On a GPU: the training products through both gates, every tile, against FP32; gradients, graphs, bit-equal repeats, any size."""

from __future__ import annotations

import gc

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import FP8_ROW, FP8_TENSOR, FP8_1x128
from narrowgemm.kernels.gluon.sm90 import fp8_scaled, fp8_wgrad
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.numerics import calc_diff

pytestmark = pytest.mark.gpu
E5M2 = FP8_ROW.with_element("e5m2")
UNEVEN = "uniform:0.3:1.7"


def hopper() -> None:
    if detect(torch.device("cuda")).target != "sm90":
        pytest.skip("Hopper's kernels")


@pytest.mark.parametrize("case", [
    Case("t", "offsets", 6, 150, 640, 1040, sizes=UNEVEN, slack=40, a=FP8_ROW, b=FP8_ROW), Case("t", "dense", 1, 333, 1096, 1168, a=FP8_ROW, b=FP8_ROW),
    Case("t", "offsets", 6, 150, 640, 1040, sizes="empty:0.5", a=E5M2, b=FP8_TENSOR, out_dtype="fp32", accumulate=True)], ids=lambda c: c.id)
@pytest.mark.parametrize("fast", [False, True])
def test_every_tile(case: Case, fast: bool) -> None:
    hopper()
    inputs = build(case, "cuda", seed=2)
    kernel = fp8_scaled
    seen = set()
    for config in kernel.configs(inputs.plan(backend=kernel.NAME, fast_accum=fast).problem, detect(inputs.device)):
        if (config.block_m, config.block_n) not in seen:
            seen.add((config.block_m, config.block_n))
            inputs.verify_repeats(backend=kernel.NAME, config=config, fast_accum=fast)
    assert len(seen) >= 3


@pytest.mark.parametrize("layout", ["contiguous", "psum", "masked"])
def test_other_layouts(layout: str) -> None:
    hopper()
    case = Case("t", layout, 6, 150, 640, 1040, sizes=UNEVEN, max_m=300 if layout == "masked" else 0, alignment=64, a=FP8_ROW, b=FP8_TENSOR)
    build(case, "cuda", seed=2).verify(backend=fp8_scaled.NAME)


@pytest.mark.parametrize("fmt, accumulate", [(FP8_ROW, False), (FP8_TENSOR, True), (FP8_1x128, False), (FP8_1x128, True)],
                         ids=lambda x: getattr(x, "name", str(x)))
def test_weight_gradient_every_tile(fmt, accumulate: bool) -> None:
    """One long group is cut along K: ten repeats give the same bits."""
    hopper()
    case = Case("t", "k_grouped", 6, 320, 520, 1024, sizes="skew128:300", a=fmt, b=fmt, out_dtype="fp32", accumulate=accumulate)
    inputs = build(case, "cuda", seed=2)
    seen = set()
    for config in fp8_wgrad.configs(inputs.plan(backend=fp8_wgrad.NAME).problem, detect(inputs.device)):
        if (config.block_m, config.block_n) not in seen:
            seen.add((config.block_m, config.block_n))
            inputs.verify_repeats(10, backend=fp8_wgrad.NAME, config=config)
    assert len(seen) >= 3


def test_cut_tiles_on_few_sms() -> None:
    hopper()
    build(Case("t", "k_grouped", 3, 512, 520, 6144, sizes="skew128:60", a=FP8_ROW, b=FP8_ROW, out_dtype="fp32"), "cuda").verify(
        backend=fp8_wgrad.NAME, max_sms=20)


LENS = [500, 0, 1300, 40, 3000, 7]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "block"])
def test_grouped_linear(recipe: str) -> None:
    """Values and gradients against FP32 per group; then the whole step in a CUDA graph, into a main gradient."""
    k, n = 1024, 1536
    x = torch.randn(sum(LENS), k, device="cuda").bfloat16().requires_grad_()
    w = (torch.randn(len(LENS), n, k, device="cuda") * 0.1).bfloat16().requires_grad_()
    lens = torch.tensor(LENS, device="cuda")
    y = ng.grouped_linear(x, w, lens, recipe=recipe, grads="e5m2")
    dy = torch.randn_like(y)
    y.backward(dy)
    parts = list(zip(x.detach().float().split(LENS), w.detach().float(), dy.float().split(LENS)))
    want = torch.cat([a @ b.T for a, b, _ in parts]), torch.cat([d @ b for _, b, d in parts]), torch.stack([d.T @ a for a, _, d in parts])
    for got, ref, limit in zip((y, x.grad, w.grad), want, (1e-3, 5e-3, 5e-3)):
        assert calc_diff(got.float(), ref) < limit
    assert not w.grad[1].any()
    want_w = w.grad.float()
    # a leaf's gradient is accumulated on the stream that its node was made on: leaves of their own, first used beside
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    main, side = torch.zeros_like(w, dtype=torch.float32), torch.cuda.Stream()

    def step() -> None:
        ng.grouped_linear(x, w, lens, recipe=recipe, grads="e5m2", main_grad=main).backward(dy)

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    main.zero_()
    graph.replay()
    assert calc_diff(main, want_w) < 5e-6


def test_large_weight_gradient() -> None:
    """An output of more than 2^31 elements, every group's checked on sampled rows."""
    hopper()
    gc.collect()
    torch.cuda.empty_cache()
    g, m, n = 40, 8192, 7168
    a, b = (torch.randn(r, 128 * g, device="cuda").to(torch.float8_e4m3fn) for r in (m, n))
    one = torch.ones(1, 1, device="cuda")
    offsets = torch.arange(g + 1, device="cuda", dtype=torch.int32) * 128
    out = ng.grouped_gemm_wgrad(ng.ScaledTensor(a, one, FP8_TENSOR), ng.ScaledTensor(b, one, FP8_TENSOR), ng.KGrouped(offsets, 128),
                                out_dtype=torch.bfloat16, backend=fp8_wgrad.NAME)
    assert out.numel() > 2**31
    rows = torch.tensor([0, 63, 64, 4097, m - 1], device="cuda")
    for i in range(g):
        ks = slice(128 * i, 128 * i + 128)
        want = a[rows][:, ks].float() @ b[:, ks].float().T
        assert calc_diff(out[i, rows].float(), want) < 5e-6, i
