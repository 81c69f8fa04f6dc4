"""The gated product on a GPU: the bits of product and activation apart, in groups that end within a tile, nothing beside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import detect
from narrowgemm.formats import FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import fp8_cluster, fp8_gated
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Operand, Problem
from narrowgemm.runtime import dispatch, launch

from .test_tails_gpu import sizes_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
                                                  reason="Hopper's kernels")]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("extra", [{}, {"cluster_n": 2}], ids=lambda x: "-".join(x) or "alone")
@pytest.mark.parametrize("groups, inter, k, activation, args", [
    (15, 768, 1664, "swiglu", ()), (40, 384, 128, "swiglu_oai", (1.702, 7.03)), (256, 128, 384, "swiglu_oai", ())])
def test_bits_of_the_steps(extra: dict[str, int], activation: str, args: tuple[float, ...], groups: int, inter: int, k: int) -> None:
    bounds = torch.tensor([0, *sizes_of(groups)]).cumsum(0).cuda()
    end = int(bounds[-1])
    m = end + 9
    a = (torch.randn(m, k, device="cuda") * 60).to(torch.float8_e4m3fn)
    sa = torch.rand(k // 128, -(-m // 4) * 4, device="cuda").add_(0.5)[..., :m].mT
    sa[7], sa[end // 2], sa[end - 1] = 0.0, float("nan"), float("inf")
    w = ScaledTensor((torch.randn(groups, 2 * inter, k, device="cuda") * 0.2).to(torch.float8_e4m3fn),
                     torch.rand(groups, 2 * inter // 128, k // 128, device="cuda").mul_(1e-3), FP8_128x128)
    x, where = ScaledTensor(a, sa, FP8_1x128), ng.Offsets(bounds)
    h = ng.grouped_gemm(x, w, where, out_dtype=torch.bfloat16, backend=fp8_cluster.NAME)
    want = ng.activate(h, layout=where, fmt=FP8_1x128, activation=activation, args=args)
    assert want.scale is not None
    p = Problem("gated_gemm", "offsets", m, 2 * inter, k, groups, Operand(FP8_1x128, scale_dtype="fp32", scale_major="mn"),
                Operand(FP8_128x128, scale_dtype="fp32"), rows=max(fp8_gated.MIN_ROWS, m // groups), epilogue=fp8_gated.epilogue(activation, args))
    arch = detect(torch.device("cuda"))
    config = replace(fp8_gated.configs(p, arch)[0], extra=tuple(extra.items()))
    plan = dispatch.select(p, arch, fp8_gated.NAME, config)
    for _ in range(3):
        out = torch.full((m, inter), 0x5A, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
        scale = torch.full((inter // 128, -(-m // 4) * 4), 777.0, device="cuda")
        mine = scale[:, :m].mT
        launch.run(plan, Operands(x, w, out, m, 2 * inter, k, groups, bounds, out_scale=mine))
        assert torch.equal(bits(out[:end]), bits(want.data[:end])) and torch.equal(bits(mine[:end]), bits(want.scale[:end]))
        assert (bits(out[end:]) == 0x5A).all() and (scale[:, end:] == 777.0).all()
