"""BF16 products on torch: who gets them, and that rows outside the groups stay as they were."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import Offsets, explain, gemm, grouped_gemm
from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16 as BF16_FORMAT
from narrowgemm.formats import ScaledTensor
from narrowgemm.kernels import torch_bf16
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Step
from narrowgemm.testing.numerics import check_kernel

BF16 = {"a": "bf16", "b": "bf16"}


@pytest.mark.parametrize("op, layout", [("gemm", "dense"), ("grouped_gemm", "offsets")])
def test_takes_bf16_on_a_gpu(op: str, layout: str) -> None:
    device = "h200" if layout == "dense" else "b200"        # Hopper's grouped products have a kernel of their own
    plan = explain(op, layout=layout, groups=8 if layout != "dense" else 1, m=65536, n=2048, k=2048, device=device, **BF16).plan
    assert plan.kernel == "torch_bf16" and plan.backend == "torch"


@pytest.mark.parametrize("why, changed", [
    ("BF16 operands", {"out_dtype": "fp32"}), ("BF16 operands", {"b": "mxfp4"}), ("masked layout", {"layout": "masked"}),
    ("groups at most", {"groups": 2048}), ("limits its SMs", {"max_sms": 16}), ("on 16 bytes", {"k": 100}),
    ("matrix instruction", {"device": "cpu"})])
def test_says_what_it_does_not_take(why: str, changed: dict) -> None:
    case = {"layout": "offsets", "groups": 8, "m": 256, "n": 512, "k": 512, "device": "h200", **BF16} | changed
    passed = dict(explain("grouped_gemm", **case).plan.passed_over)
    assert why in passed["torch_bf16"]


def test_parameters_as_operands() -> None:
    """Torch refuses `out` where an operand requires a gradient; a product records none, on no device."""
    x, w = torch.randn(16, 128).bfloat16(), torch.nn.Parameter(torch.randn(64, 128).bfloat16())
    out = torch.empty(16, 64).bfloat16()
    problem = explain("gemm", m=16, n=64, k=128, device="h200", **BF16).plan.problem
    operands = Operands(ScaledTensor(x, None, BF16_FORMAT), ScaledTensor(w, None, BF16_FORMAT), out, 16, 64, 128)
    torch_bf16.launch(Step("torch_bf16", torch_bf16.configs(problem, get_arch("h200"))[0]), problem, operands, None)
    check_kernel(out, x.float() @ w.detach().float().T).assert_()
    assert not gemm(x, w).requires_grad and not gemm(x, w, out=out).requires_grad


@pytest.mark.gpu
def test_parameters_on_a_gpu() -> None:
    x, w = torch.randn(64, 128, device="cuda").bfloat16(), torch.nn.Parameter(torch.randn(2, 256, 128, device="cuda").bfloat16())
    offsets = Offsets(torch.tensor([0, 30, 64], device="cuda"))
    with torch.autocast("cuda", dtype=torch.float16):
        for y, want in ((gemm(x, w[0], backend="torch_bf16"), gemm(x, w[0].detach(), backend="torch_bf16")),
                        (grouped_gemm(x, w, offsets, backend="torch_bf16"), grouped_gemm(x, w.detach(), offsets, backend="torch_bf16"))):
            assert torch.equal(y, want) and y.dtype == torch.bfloat16 and not y.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("major", ["k", "mn"])
def test_groups_and_nothing_else_are_written(major: str) -> None:
    torch.manual_seed(0)
    a = torch.randn(200, 256, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(6, 320, 256, device="cuda", dtype=torch.bfloat16)
    b = b if major == "k" else b.mT.contiguous().mT
    offsets = torch.tensor([3, 3, 60, 61, 61, 150, 190], device="cuda")
    a[190:] = float("nan")
    a[:3] = float("nan")
    out = torch.full((200, 320), 7.0, device="cuda", dtype=torch.bfloat16)
    grouped_gemm(a, b, Offsets(offsets), out=out, backend="torch_bf16")
    assert bool((out[:3] == 7).all()) and bool((out[190:] == 7).all())
    for g, (lo, hi) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        check_kernel(out[lo:hi], a[lo:hi].float() @ b[g].float().T).assert_()
    check_kernel(gemm(a[3:190], b[0], backend="torch_bf16"), a[3:190].float() @ b[0].float().T).assert_()


@pytest.mark.gpu
def test_bounds_that_are_wrong_reach_nothing_outside() -> None:
    a, b = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((64, 128), (3, 128, 128)))
    for bounds in ([-5, 10, 5, 1000], [70, 80, 90, 100], [10, 0, 64, 64]):
        out = grouped_gemm(a, b, Offsets(torch.tensor(bounds, device="cuda")), backend="torch_bf16",
                           out=torch.zeros(64, 128, device="cuda", dtype=torch.bfloat16))
        assert bool(out.isfinite().all())


@pytest.mark.gpu
def test_no_groups_have_rows() -> None:
    a, b = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((16, 128), (2, 128, 128)))
    out = torch.full((16, 128), 7.0, device="cuda", dtype=torch.bfloat16)
    grouped_gemm(a, b, Offsets(torch.zeros(3, dtype=torch.int64, device="cuda")), out=out, backend="torch_bf16")
    assert bool((out == 7).all())
