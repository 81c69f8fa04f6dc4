"""The launch in front of products of FP8 tokens in widths of columns: rows in the weights' order, several a program, and their scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from narrowgemm.formats import FP8_ROW, MXFP4, FP8_1x128
from narrowgemm.kernels.gluon.sm90.narrow_fp8_front import PREP_K, FrontStatic
from narrowgemm.scales import e8m0_to_float


def run(device: str, x: torch.Tensor, scale: torch.Tensor, index: torch.Tensor | None, row: bool, each: int,
        chain: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, factors, scales [K blocks, rows, 4])."""
    from narrowgemm.kernels.gluon.sm90.narrow_fp8_front_device import SCALE_BLOCKS, SCALE_POSITIONS, narrow_fp8_front_kernel

    (rows, k), kx = x.shape, -(-x.shape[1] // 128) * 128
    to, factor = torch.full((rows, kx), 7, dtype=torch.uint8, device=device), torch.full((rows,), 7.0, device=device)
    four = torch.full((kx // 128 + (kx // 128 % 2 if chain else 0), rows, 4), 7.0, device=device)
    programs = -(-rows // each) * -(-kx // PREP_K) + (0 if row else -(-rows // SCALE_POSITIONS.value) * -(-kx // (128 * SCALE_BLOCKS.value)))
    cfg = FrontStatic(row, index is not None, each, CHAIN=chain, PDL=False)
    x, scale = x.view(torch.float8_e4m3fn).to(device), scale.to(device)
    index = (torch.zeros(1, dtype=torch.int64) if index is None else index).to(device)
    taken = torch.full((2,), 7, dtype=torch.int32, device=device)
    narrow_fp8_front_kernel[(programs,)](x, scale, to.view(torch.float8_e4m3fn), factor, four, index, taken, k, kx, x.stride(0), scale.stride(0),
                                         scale.stride(1), index.numel() - 1, rows, cfg)
    assert taken.tolist() == [0, 7]
    return to.cpu(), factor.cpu(), four.cpu()


def in_order(x: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(len(x), -(-x.shape[1] // 128) * 128, dtype=torch.uint8)
    wide[:, :x.shape[1]] = x
    return wide.view(len(x), -1, 4, 8, 4).permute(0, 1, 3, 2, 4).reshape(wide.shape)


@pytest.mark.parametrize("rows, k, each", [(37, 200, 2), (70, 2304, 4), (5, 2048, 1)])
@pytest.mark.parametrize("kind", ["fp32", "e8m0", "row"])
def test_rows_and_scales(device: str, kind: str, rows: int, k: int, each: int) -> None:
    """Words of four of the four blocks of 32 in turn; scales as they are, of positions 1, 0, 9 and 8 further on; nothing behind the last group."""
    g = torch.Generator().manual_seed(rows)
    x, end = torch.randint(0, 120, (rows, k), generator=g, dtype=torch.uint8), rows - 3
    blocks = 1 if kind == "row" else -(-k // 128)
    scale = torch.randint(0, 255, (rows, blocks), generator=g).byte() if kind == "e8m0" else torch.rand(rows, blocks, generator=g)
    tokens, factor, four = run(device, x, scale, torch.tensor([0, 2, end]), kind == "row", each)
    assert torch.equal(tokens[:end], in_order(x)[:end]) and bool((tokens[end:] == 7).all())
    if kind == "row":
        assert torch.equal(factor[:end], scale[:end, 0]) and bool((factor[end:] == 7).all())
        return
    value = e8m0_to_float(scale) if kind == "e8m0" else scale
    for j, on in enumerate((1, 0, 9, 8)):
        assert torch.equal(four[:, :max(rows - on, 0), j], value.t()[:, on:])


def test_scales_that_lie_by_k_block_and_no_groups(device: str) -> None:
    g = torch.Generator().manual_seed(1)
    x, scale = torch.randint(0, 120, (40, 256), generator=g, dtype=torch.uint8), torch.rand(2, 40, generator=g).t()
    tokens, _, four = run(device, x, scale, None, False, 2)
    assert torch.equal(tokens, in_order(x)) and torch.equal(four[:, :, 1], scale.t())


@pytest.mark.parametrize("blocks", [2, 5])
def test_scales_as_ratios(device: str, blocks: int) -> None:
    """Of the first of two K blocks to the second one's, which is as it is unless it is nothing beside the first: every product of the two
    that a sum meets is its scale."""
    g = torch.Generator().manual_seed(blocks)
    x, scale = torch.zeros(40, 128 * blocks, dtype=torch.uint8), torch.rand(40, blocks, generator=g) + 0.01
    scale[3, 0], scale[4, 1], scale[5, 0], scale[6, :2] = 0.0, 0.0, 1e30, 0.0
    scale[7, 0], scale[8, 1], scale[9, 1] = torch.nan, torch.nan, 1e-38
    wide = torch.zeros(40, blocks + blocks % 2)
    wide[:, :blocks] = scale
    given = run(device, x, scale, None, False, 2, chain=True)[2][:, :, 1].t()
    assert given.shape == wide.shape
    first, second, ratio, unit = wide[:, ::2], wide[:, 1::2], given[:, ::2], given[:, 1::2]
    assert torch.equal(unit.isnan(), second.isnan()) and torch.equal(ratio.isnan(), first.isnan() | second.isnan())
    finite = ~ratio.isnan()
    assert bool((unit[finite] >= 2.0**-126).all()) and bool((ratio[finite] <= 2.0**100).all())
    torch.testing.assert_close((ratio * unit)[finite], first[finite], rtol=1e-6, atol=0)
    as_it_is = finite & (second >= 1e-20) & (second >= 1e-20 * first)
    assert torch.equal(unit[as_it_is], second[as_it_is]) and bool((unit[finite & ~as_it_is] <= (first * 2.0**-63).clamp(min=2.0**-126)[finite & ~as_it_is]).all())


@pytest.mark.parametrize("a", [FP8_1x128, FP8_ROW], ids=lambda a: a.name)
def test_where_it_is_taken(a: object) -> None:
    """Positions that are rows of A, tiles in widths of columns; anything else is brought by the other launch in front."""
    from narrowgemm.arch import get_arch
    from narrowgemm.kernels.gluon.sm90 import narrow_prefill
    from narrowgemm.prepack_bits import FP8_PREPACK
    from narrowgemm.problem import Step

    from .test_gluon_sm90_narrow_compile import operands, problem

    def front(layout: str, tokens: int, units: int, **more: object) -> str:
        p = problem(layout, a, MXFP4, 8, 4096, 512, 1024, "", "", False)
        x = operands(p, "", False)
        p = replace(p, b=replace(p.b, prepack=FP8_PREPACK, folds=True), **more)
        c = next(c for c in narrow_prefill.configs(p, get_arch("h200")) if (c.block_m, c.block_n // 64) == (tokens, units))
        size = narrow_prefill.workspace(p, c)
        made = narrow_prefill.launches(Step(narrow_prefill.NAME, c, size), p, x, torch.empty(size, dtype=torch.uint8, device="meta"))
        return made[-2].kernel.__name__

    assert front("offsets", 160, 2) == front("offsets", 96, 3) == "narrow_fp8_front_kernel"
    others = front("offsets", 64, 2), front("masked", 160, 2), front("psum", 160, 2), front("offsets", 160, 2, a_div=2)
    assert set(others) == {"narrow_prefill_prep_kernel"}
