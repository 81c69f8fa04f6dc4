"""Grouped products whose groups end within a tile, on a GPU: sizes about halves of tiles, the same bits as without tails, nothing beside."""

from __future__ import annotations

import pytest
import torch

import narrowgemm as ng
from narrowgemm.formats import FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import bf16, expand, fp8_block
from narrowgemm.testing.numerics import check_kernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
                                                  reason="Hopper's kernels")]
SIZES = (0, 1, 63, 64, 65, 128, 129, 192, 193, 256, 320, 0, 512, 600, 830)     # 223 in the mean: tails are for groups of such sizes
CONFIGS = {"block": (128, 256, 4, {}), "two an SM": (128, 128, 3, {"ctas": 2})}


def sizes_of(groups: int) -> list[int]:
    order = torch.randperm(groups).tolist()
    return [SIZES[i % len(SIZES)] for i in order]


def places(layout: str, sizes: list[int]) -> tuple[ng.Layout, tuple[int, ...], list]:
    """(layout, leading shape of A and the output, the rows of each group)."""
    if layout == "masked":
        most = max(sizes) + 5
        return (ng.Masked(torch.tensor(sizes, dtype=torch.int32, device="cuda"), 224), (len(sizes), most),
                [(g, slice(0, n)) for g, n in enumerate(sizes)])
    bounds = torch.tensor([5, *sizes]).cumsum(0)
    lows = bounds.tolist()
    return ng.Offsets(bounds.cuda()), (lows[-1] + 9,), [slice(a, b) for a, b in zip(lows, lows[1:])]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", ["offsets", "masked"])
@pytest.mark.parametrize("groups", [15, 40, 256])
def test_fp8(name: str, layout: str, groups: int) -> None:
    *tile, options = CONFIGS[name]
    n, k = (768, 1664) if groups < 100 else (512, 384)
    sizes = sizes_of(groups)
    where, shape, rows = places(layout, sizes)
    a = (torch.randn(*shape, k, device="cuda") * 60).to(torch.float8_e4m3fn)
    planes, m = shape[:-1], shape[-1]
    sa = torch.rand(*planes, k // 128, -(-m // 4) * 4, device="cuda").add_(0.5)[..., :m].mT
    w = ScaledTensor((torch.randn(groups, n, k, device="cuda") * 60).to(torch.float8_e4m3fn),
                     torch.rand(groups, -(-n // 128), k // 128, device="cuda").add_(0.5), FP8_128x128)
    x = ScaledTensor(a, sa, FP8_1x128)

    def run(**more: int) -> torch.Tensor:
        out = torch.full((*shape, n), 777.0, device="cuda", dtype=torch.bfloat16)
        return ng.grouped_gemm(x, w, where, out=out, backend=fp8_block.NAME, config=fp8_block._config(*tile, **options, **more))

    got = run()
    assert torch.equal(got, run())
    assert torch.equal(got, run(tails=0)), "tails change bits"
    mine, full = torch.zeros(shape, dtype=torch.bool, device="cuda"), a.float() * sa.repeat_interleave(128, -1)
    dense = w.dequantize()
    for g, at in enumerate(rows):
        mine[at] = True
        if sizes[g]:
            check_kernel(got[at], full[at] @ dense[g].T).assert_()
    assert bool((got[~mine] == 777.0).all()), "wrote rows that are no group's"


@pytest.mark.parametrize("config", [c for c in expand.CANDIDATES if not c.extra], ids=str)
@pytest.mark.parametrize("layout", ["offsets", "masked"])
def test_bf16(config: ng.Config, layout: str) -> None:
    groups, n, k = 40, 1544, 264
    sizes = sizes_of(groups)
    where, shape, rows = places(layout, sizes)
    x = torch.randn(*shape, k, device="cuda").bfloat16()
    w = torch.randn(groups, n, k, device="cuda").bfloat16()
    out = torch.full((*shape, n), 777.0, device="cuda", dtype=torch.bfloat16)
    ng.grouped_gemm(x, w, where, out=out, backend=bf16.NAME, config=config)
    mine = torch.zeros(shape, dtype=torch.bool, device="cuda")
    for g, at in enumerate(rows):
        mine[at] = True
        if sizes[g]:
            check_kernel(out[at], x[at].float() @ w[g].float().T).assert_()
    assert bool((out[~mine] == 777.0).all()), "wrote rows that are no group's"
