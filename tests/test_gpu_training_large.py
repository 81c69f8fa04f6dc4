"""On a GPU, alone: training products whose operands or outputs pass 2^31 elements and 4 GiB, checked on sampled rows."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import FP8_TENSOR, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import fp8_scaled, fp8_wgrad
from narrowgemm.testing.numerics import calc_diff

pytestmark = pytest.mark.gpu
ROWS = 1 << 20
LIMIT = 5e-6


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    if detect(torch.device("cuda")).target != "sm90":
        pytest.skip("Hopper's kernels")
    gc.collect()
    torch.cuda.empty_cache()
    yield


def payload(*shape: int) -> torch.Tensor:
    """E4M3 of either sign without NaN, made in place: no second tensor of the size."""
    x = torch.empty(shape, dtype=torch.uint8, device="cuda")
    x.random_(0, 256)
    return x.bitwise_and_(0xB7).view(torch.float8_e4m3fn)       # magnitudes below 1


def scaled(x: torch.Tensor) -> ScaledTensor:
    return ScaledTensor(x, torch.full((1, 1) if x.dim() == 2 else (x.shape[0], 1, 1), 0.5, device="cuda"), FP8_TENSOR)


def sampled(rows: int) -> torch.Tensor:
    return torch.tensor([0, 1, 127, 128, rows // 2 + 77, rows - 129, rows - 1], device="cuda")


def test_forward_a_beyond_4_gib() -> None:
    a, b = payload(ROWS, 4352), payload(3, 128, 4352)
    assert a.numel() > 2**32
    offsets = torch.tensor([0, 400_000, 400_000, ROWS], device="cuda")
    out = ng.grouped_gemm(scaled(a), scaled(b), ng.Offsets(offsets), backend=fp8_scaled.NAME)
    for r in sampled(ROWS).tolist():
        g = 0 if r < 400_000 else 2
        assert calc_diff(out[r].float(), 0.25 * a[r].float() @ b[g].float().T) < LIMIT, r


def test_forward_weights_beyond_4_gib_and_many_groups() -> None:
    groups = 160
    b, a = payload(groups, 4096, 7168), payload(groups, 7168)
    assert b.numel() > 2**32
    out = ng.grouped_gemm(scaled(a), scaled(b), ng.Offsets(torch.arange(groups + 1, device="cuda")), backend=fp8_scaled.NAME)
    for g in (0, 1, 74, 75, 149, 150, groups - 1):
        assert calc_diff(out[g].float(), 0.25 * a[g].float() @ b[g].float().T) < LIMIT, g


def test_output_beyond_4_gib() -> None:
    a, b = payload(ROWS, 128), payload(2, 2304, 128)
    out = ng.grouped_gemm(scaled(a), scaled(b), ng.Offsets(torch.tensor([0, 5, ROWS], device="cuda")), backend=fp8_scaled.NAME)
    assert out.numel() > 2**31 and out.nbytes > 2**32
    rows = sampled(ROWS)
    want = 0.25 * a[rows].float() @ b[1].float().T
    want[:2] = 0.25 * a[rows[:2]].float() @ b[0].float().T
    assert calc_diff(out[rows].float(), want) < LIMIT


@pytest.mark.parametrize("which", ["NT", "NN", "TN"])
def test_dense_operand_beyond_4_gib(which: str) -> None:
    """An operand that lies the other way is turned in a workspace of its own size."""
    long, short = payload(*((ROWS, 4352) if which == "NT" else (4352, ROWS))), payload(128, 4352)
    assert long.numel() > 2**32
    rows = sampled(ROWS)
    want = 0.25 * (long[rows] if which == "NT" else long[:, rows].T).float() @ short.float().T
    a, b = scaled(long if which == "NT" else long.T), scaled(short)
    if which == "NN":
        a, b = b, a
    out = ng.gemm(a, b, backend=fp8_scaled.NAME)
    got = out[:, rows].T if which == "NN" else out[rows]
    assert calc_diff(got.float(), want) < LIMIT


@pytest.mark.parametrize("which", ["A", "B"])
def test_weight_gradient_operand_beyond_4_gib(which: str) -> None:
    long, short = payload(4352, ROWS), payload(128, ROWS)
    offsets = torch.tensor([0, 1024, 1024, ROWS - 128, ROWS], device="cuda", dtype=torch.int32)
    a, b = (long, short) if which == "A" else (short, long)
    out = ng.grouped_gemm_wgrad(scaled(a), scaled(b), ng.KGrouped(offsets, 128), backend=fp8_wgrad.NAME)
    assert not out[1].any()
    rows = sampled(4352)
    for g, (lo, hi) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        if hi > lo:
            want = sum(0.25 * long[rows, i : min(i + 65536, hi)].double() @ short[:, i : min(i + 65536, hi)].double().T
                       for i in range(lo, hi, 65536))
            got = out[g, rows] if which == "A" else out[g][:, rows].T
            assert calc_diff(got.double(), want) < 1e-6, g


def test_dgrad_of_weights_beyond_4_gib() -> None:
    """The weights as the forward product takes them, `[G, N, K]`: dgrad finds their other orientation in the workspace."""
    groups = 84
    w, dy = payload(groups, 7168, 7168), payload(groups, 7168)
    assert w.numel() > 2**32
    weights = scaled(w)
    turned = ScaledTensor(w.mT, weights.scale, FP8_TENSOR)
    dx = ng.grouped_gemm(scaled(dy), turned, ng.Offsets(torch.arange(groups + 1, device="cuda")), backend=fp8_scaled.NAME)
    for g in (0, 1, 40, 41, 42, groups - 2, groups - 1):
        assert calc_diff(dx[g].float(), 0.25 * dy[g].float() @ w[g].float()) < LIMIT, g


@pytest.mark.parametrize("recipe", ["rowwise", "block"])
def test_a_step_beyond_2_31_elements(recipe: str) -> None:
    """Quantisation along both axes, forward, dgrad and wgrad of one layer whose input passes 2^31 elements."""
    k, n = 2304, 128
    x = torch.empty(ROWS, k, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    w = torch.empty(2, n, k, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    assert x.numel() > 2**31
    cut = ROWS - 4096
    offsets = torch.tensor([0, cut, ROWS], device="cuda")
    y = ng.grouped_linear(x, w, group_offs=offsets, recipe=recipe)
    dy = torch.empty_like(y).normal_()
    y.backward(dy)
    rows = sampled(ROWS)
    group = (rows >= cut).long()
    with torch.no_grad():
        want = torch.stack([x[r].float() @ w[g].float().T for r, g in zip(rows.tolist(), group.tolist())])
        assert calc_diff(y[rows].float(), want) < 1.2e-3
        want = torch.stack([dy[r].float() @ w[g].float() for r, g in zip(rows.tolist(), group.tolist())])
        assert calc_diff(x.grad[rows].float(), want) < 1.2e-3
        assert calc_diff(w.grad[1].float(), dy[cut:].float().T @ x[cut:].float()) < 1.2e-3
        first = sum(dy[i : i + 65536].float().T @ x[i : i + 65536, -64:].float() for i in range(0, cut - 65536 + 1, 65536))
        last = cut // 65536 * 65536
        first += dy[last:cut].float().T @ x[last:cut, -64:].float()
        assert calc_diff(w.grad[0, :, -64:].float(), first) < 1.2e-3
