"""K-major copies of FP8 operands, and the Hopper products on them: NN, TN, weight gradients over groups that are packed tightly."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect, get_arch
from narrowgemm.formats import FP8_ROW, FP8_TENSOR, FP8_1x128
from narrowgemm.kernels.gluon.sm90 import fp8_scaled, fp8_wgrad
from narrowgemm.kernels.triton import k_major
from narrowgemm.problem import Operand
from narrowgemm.testing.numerics import calc_diff

from .._compile import compile_jobs

E5M2 = torch.float8_e5m2
SIZES = [5, 0, 130, 128, 0, 70]


def payload(*shape: int, device: str, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    g = torch.Generator().manual_seed(shape[-1])
    return torch.randn(shape, generator=g).to(device, dtype)


def run(x: torch.Tensor, workspace: torch.Tensor, sizes: list[int] | None) -> tuple[torch.Tensor, list[int]]:
    """The copy as a tensor, and where its groups start."""
    index = segments = None
    groups = 0
    if sizes is not None:
        groups = len(sizes)
        index = torch.tensor([0, *sizes], device=x.device).cumsum(0)
        found, segments = k_major.find_segments(index, x.shape[-1], groups, workspace, 0)
        found.run()
    made, copied = k_major.copy(x, workspace, 4096, index, segments, groups)
    made.run()
    flat = workspace[4096:].view(x.dtype)
    out = torch.as_strided(flat, copied.shape, copied.strides)
    return out, [] if segments is None else segments.view()[: groups + 1].tolist()


@pytest.mark.parametrize("turned, shape", [(False, (70, 200)), (True, (2, 130, 129))])
def test_copies(device, turned: bool, shape: tuple[int, ...]) -> None:
    """Rows off 16 bytes, or the other axis contiguous; nothing is written outside of the copy."""
    x = payload(*shape, device=device)
    if turned:
        x = x.mT.contiguous().mT
    workspace = torch.full((1 << 17,), 99, dtype=torch.uint8, device=device)
    out, _ = run(x, workspace, None)
    assert torch.equal(out.reshape(x.shape).float(), x.float())
    rows = x.numel() // x.shape[-1]
    assert (workspace[:4096] == 99).all() and (workspace[4096 + rows * k_major.columns(x.shape[-1]):] == 99).all()


@pytest.mark.parametrize("turned", [False, True])
def test_groups_get_segments(device, turned: bool) -> None:
    x = payload(100, sum(SIZES) + 9, device=device, dtype=E5M2)
    if turned:
        x = x.mT.contiguous().mT
    workspace = torch.full((1 << 18,), 99, dtype=torch.uint8, device=device)
    out, starts = run(x, workspace, SIZES)
    assert starts == [0, 128, 128, 384, 512, 512, 640]
    at = 0
    for size, start, end in zip(SIZES, starts, starts[1:]):
        assert torch.equal(out[0, :, start : start + size].float(), x[:, at : at + size].float())
        assert not out[0, :, start + size : end].float().any(), "the rest of a segment is not zero"
        at += size


def test_what_can_be_copied() -> None:
    assert k_major.refuse(Operand(FP8_ROW, major="strided")) and k_major.refuse(Operand(FP8_ROW, major="mn")) is None
    assert k_major.needed(Operand(FP8_ROW, aligned=False)) and not k_major.needed(Operand(FP8_ROW))
    assert k_major.columns(200) == 208 and k_major.columns(200, 3) == 256 + 3 * 128
    assert k_major.seconds(1e9, get_arch("h200")) > 4e-4


@pytest.mark.parametrize("op, layout, a, b", [("gemm", "dense", "mn", "mn"), ("grouped_gemm", "offsets", "k", "mn"),
                                              ("grouped_gemm_wgrad", "k_grouped", "mn", "mn")])
def test_plans_count_the_copies(op: str, layout: str, a: str, b: str, monkeypatch) -> None:
    """The Hopper kernel is chosen for operands that lie the other way, and its plan says what it needs for them."""
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    shape = {"dense": (4096, 1, 2048, 2048), "offsets": (8192, 8, 2048, 2048), "k_grouped": (2048, 8, 4096, 8192)}[layout]
    m, groups, n, k = shape

    def operand(rows: int, major: str, lead: tuple[int, ...] = ()) -> ng.ScaledTensor:
        x = torch.empty((*lead, rows, k), dtype=torch.float8_e4m3fn, device="meta")
        return ng.ScaledTensor(x if major == "k" else x.mT.contiguous().mT, torch.empty((*lead, 1, 1), device="meta"), FP8_TENSOR)

    from narrowgemm.ops import gemm, grouped, wgrad
    from narrowgemm.ops.common import Options

    x, w = operand(m, a), operand(n, b, () if layout != "offsets" else (groups,))
    if layout == "dense":
        plan = gemm.plan_of(x, w, None, torch.bfloat16, False, Options())
    elif layout == "offsets":
        plan = grouped.plan_of(x, w, ng.Offsets(torch.empty(groups + 1, dtype=torch.int64, device="meta")), None, torch.bfloat16, False,
                               True, Options())
    else:
        plan = wgrad.plan_of(x, w, ng.KGrouped(torch.empty(groups + 1, dtype=torch.int64, device="meta")), None, torch.float32, False,
                             Options())
    assert plan.backend == "gluon_sm90" and plan.workspace_bytes >= (m * k if a == "mn" else groups * n * k)


def test_many_short_groups_are_hoppers() -> None:
    """256 groups of one K block each: the portable kernel took 10 ms of what bytes take 0.8 for, and was predicted to win."""
    plan = ng.explain("grouped_gemm_wgrad", layout="k_grouped", groups=256, m=2048, n=2048, k=32768, a="fp8_row", b="fp8_row",
                      device="h100").plan
    assert plan.kernel == fp8_wgrad.NAME


def reference(a: torch.Tensor, b: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.stack([x @ y.T for x, y in zip(a.float().split(sizes, 1), b.float().split(sizes, 1))])


@pytest.mark.gpu
@pytest.mark.parametrize("majors", ["mn-mn", "k-mn", "k-k"])
@pytest.mark.parametrize("out_dtype, accumulate", [(torch.bfloat16, False), (torch.float32, True)])
def test_tight_weight_gradients(majors: str, out_dtype: torch.dtype, accumulate: bool) -> None:
    if detect(torch.device("cuda")).target != "sm90":
        pytest.skip("Hopper's kernel")
    sizes = [300, 0, 1111, 5, 128, 2000]
    turn = lambda x, m: x if m == "k" else x.mT.contiguous().mT  # noqa: E731
    ma, mb = majors.split("-")
    a = turn(payload(520, sum(sizes), device="cuda"), ma)
    b = turn(payload(264, sum(sizes), device="cuda", dtype=E5M2), mb)
    one = torch.full((1, 1), 0.5, device="cuda")
    layout = ng.KGrouped(torch.tensor([0, *sizes], device="cuda").cumsum(0))
    x, y = (ng.ScaledTensor(t, one, FP8_TENSOR.with_element(e)) for t, e in ((a, "e4m3"), (b, "e5m2")))
    out = torch.ones(len(sizes), 520, 264, device="cuda", dtype=out_dtype) if accumulate else None
    for _ in range(2):      # the second call is bound
        if out is not None:
            out.fill_(1)
        got = ng.grouped_gemm_wgrad(x, y, layout, out=out, out_dtype=None if out is not None else out_dtype, accumulate=accumulate,
                                    backend=fp8_wgrad.NAME)
        want = reference(a, b, sizes) * 0.25 + (1 if accumulate else 0)
        assert calc_diff(got.float(), want) < (1e-6 if out_dtype is torch.float32 else 5e-6)


@pytest.mark.gpu
def test_block_scales_of_turned_operands() -> None:
    """DeepGEMM's TN: groups at multiples of 128, both operands with the other axis contiguous."""
    if detect(torch.device("cuda")).target != "sm90":
        pytest.skip("Hopper's kernel")
    sizes = [256, 0, 640]
    a, b = (torch.randn(sum(sizes), r, device="cuda").bfloat16() for r in (384, 520))
    qa, qb = (ng.quantize(x.T.contiguous(), FP8_1x128, scale_layout="mn_major") for x in (a, b))
    layout = ng.KGrouped(torch.tensor([0, *sizes], device="cuda").cumsum(0), 128)
    want = ng.grouped_gemm_wgrad(qa, qb, layout, backend=fp8_wgrad.NAME)
    turned = [ng.ScaledTensor(q.data.mT.contiguous().mT, q.scale, q.format) for q in (qa, qb)]
    assert torch.equal(want, ng.grouped_gemm_wgrad(*turned, layout, backend=fp8_wgrad.NAME))


@pytest.mark.gpu
@pytest.mark.parametrize("majors", ["k-mn", "mn-k", "mn-mn"])
def test_dense_and_grouped(majors: str) -> None:
    """NN, TN and TT, and K off 16 bytes: the same bits as from K-major operands."""
    if detect(torch.device("cuda")).target != "sm90":
        pytest.skip("Hopper's kernel")
    turn = lambda x, m: x if m == "k" else x.mT.contiguous().mT  # noqa: E731
    ma, mb = majors.split("-")
    a, b = payload(333, 1168, device="cuda"), payload(4, 520, 1168, device="cuda", dtype=E5M2)
    sa, sb = torch.rand(333, 1, device="cuda") + 0.5, torch.rand(4, 520, 1, device="cuda") + 0.5
    for count, layout in ((0, None), (4, ng.Offsets(torch.tensor([0, 100, 100, 133, 333], device="cuda")))):
        w, ws = (b, sb) if count else (b[0], sb[0])
        x = ng.ScaledTensor(turn(a, ma), sa, FP8_ROW)
        y = ng.ScaledTensor(turn(w, mb), ws, FP8_ROW.with_element("e5m2"))
        plain = (ng.ScaledTensor(a, sa, FP8_ROW), ng.ScaledTensor(w, ws, y.format))
        got, want = (ng.grouped_gemm(*o, layout, backend=fp8_scaled.NAME) if count else ng.gemm(*o, backend=fp8_scaled.NAME)
                     for o in ((x, y), plain))
        assert torch.equal(got, want)
    odd = payload(70, 1168, device="cuda")[:, :1152]
    lone = ng.ScaledTensor(odd, sa[:70], FP8_ROW)
    w = ng.ScaledTensor(payload(136, 1159, device="cuda")[:, 7:], sb[0, :136], FP8_ROW)      # rows off 16 bytes
    got = ng.gemm(lone, w, out_dtype=torch.float32, backend=fp8_scaled.NAME)
    assert calc_diff(got, (odd.float() * sa[:70]) @ (w.data.float() * w.scale).T) < 1e-6


@pytest.mark.compile
def test_compiles_without_spills() -> None:
    reports = compile_jobs("sm90", "tests.kernels.quantize_both_jobs:k_major_jobs")
    assert len(reports) >= 4
    for r in reports:
        assert r["spills"] == 0 and r["shared"] <= 32768, r


@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_scales_of_each_group(device, scales: str, monkeypatch) -> None:
    """Every kernel of weight gradients takes them: interpreted the portable one, on Hopper its own too."""
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200") if device == "cpu" else None
    sizes, fmt = [130, 0, 40], FP8_ROW if scales == "row" else FP8_TENSOR
    a, b = payload(72, sum(sizes), device=device), payload(40, sum(sizes), device=device)
    one = (lambda r: torch.rand(3, r, 1, device=device) + 0.5) if scales == "row" else (lambda r: torch.rand(3, 1, 1, device=device) + 0.5)
    x, y = ng.ScaledTensor(a, one(72), fmt), ng.ScaledTensor(b, one(40), fmt)
    layout = ng.KGrouped(torch.tensor([0, *sizes], device=device).cumsum(0))
    want = reference(a, b, sizes) * x.scale * y.scale.mT
    hopper = device == "cuda" and detect(torch.device("cuda")).target == "sm90"
    for backend in ("triton.fp8_wgrad", *((fp8_wgrad.NAME,) if hopper else ())):
        assert calc_diff(ng.grouped_gemm_wgrad(x, y, layout, backend=backend), want) < 1e-6
