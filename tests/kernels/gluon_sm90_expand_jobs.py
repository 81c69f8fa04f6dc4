"""Launches of the Hopper BF16 product and of the launch in front of it, for the compile tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import MXFP4, MXFP8, Format, ScaledTensor, dtype_of
from narrowgemm.kernels.gluon.sm90 import bf16_cluster, expand
from narrowgemm.kernels.operands import Operands
from narrowgemm.prepack import PREPACK
from narrowgemm.problem import Config, Operand, Problem, Step

M, N, K, G = 512, 1528, 1056, 4
LAYOUTS = ("dense", "contiguous", "offsets", "psum", "masked")


def describe(layout: str, a: Format = MXFP8, b: Format = MXFP8, prepack: str = PREPACK, **kw) -> Problem:
    return Problem("gemm" if layout == "dense" else "grouped_gemm", layout, M, N, K, 1 if layout == "dense" else G,
                   Operand(a, scale_dtype="e8m0", scale_major="k"), Operand(b, prepack=prepack, scale_dtype="e8m0"),
                   rows=M // G, alignment=128, **kw)


def operands(p: Problem, factor: bool = False) -> Operands:
    def new(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tiles, chunks = -(-p.n // 64), -(-p.k // 128)
    dims = (G, M) if p.layout == "masked" else (M,)
    halves = (2,) if p.b.format.element == "e4m3" else ()
    index = {"dense": None, "contiguous": new(M, dtype=torch.int32), "offsets": new(G + 1, dtype=torch.int64)}
    if p.b.prepack:
        b = ScaledTensor(new(p.groups, tiles, chunks, *halves, 64, 64), new(p.groups, tiles, -(-chunks // 2), 4, 8, 4, 2, 2), p.b.format)
    else:
        b = ScaledTensor(new(p.n, p.k, dtype=p.b.format.elem.dtype), new(p.n, p.k // 32), p.b.format)
    return Operands(
        ScaledTensor(new(*dims, p.k // p.a.format.elem.per_byte, dtype=p.a.format.elem.dtype), new(*dims, p.k // 32), p.a.format), b,
        new(*dims, p.n, dtype=dtype_of(p.out_dtype)), M, p.n, p.k, p.groups, index[p.layout] if p.layout in index else
        new(G, dtype=torch.int32), 128, factor=new(p.groups, tiles * 64, dtype=torch.float32) if factor else None)


def call(p: Problem, config: Config, factor: bool = False, count: int = 2) -> None:
    """Compile the first `count` launches."""
    work = torch.empty(expand.workspace(p, config), dtype=torch.uint8, device="meta")
    for launch in expand.launches(Step(expand.NAME, config, len(work)), p, operands(p, factor), work)[:count]:
        launch.warm()


def behind(p: Problem) -> None:
    """Compile what takes shifts back behind cuBLAS."""
    work = torch.empty(expand.workspace(p, expand.CUBLAS), dtype=torch.uint8, device="meta")
    (launch, ) = expand._rescale(Step(expand.NAME, expand.CUBLAS, len(work)), p, operands(p), work)
    launch.warm()


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': two tiles and a pair of blocks, two pairs of formats, the launch in front where weights are not packed, the one behind cuBLAS;
    'all': every config in every layout and with every option, plain weights on pairs of blocks, too."""
    arch = get_arch(target)
    own = expand.configs(describe("offsets"), arch)
    runs = [(describe("offsets", MXFP8, MXFP4), own[0], False), (describe("masked", MXFP4, MXFP8), own[2], True),
            (describe("dense", prepack=""), expand.PAIRS, False)]
    yield "plain weights | 0", partial(call, describe("dense", prepack=""), own[0], count=1)
    for prepack in ("", PREPACK):
        yield f"behind cuBLAS, weights {prepack or 'plain'} | 0", partial(behind, describe("dense", prepack=prepack))
    if which == "all":
        kinds = [describe(layout, a, b, **kw) for layout in LAYOUTS for a in (MXFP8, MXFP4) for b in (MXFP8, MXFP4)
                 for kw in ({}, {"out_dtype": "fp32"}, {"accumulate": True, "out_dtype": "fp16"}, {"out_aligned": False})]
        runs = [runs[-1], *((p, c, factor) for p in kinds for c in expand.configs(p, arch) for factor in (False, True))]
    for p, c, factor in runs:
        tile = (bf16_cluster if bf16_cluster.blocks(c) else expand).tile_of(p, c, arch, factor or expand.plain(p))
        assert tile is not None
        yield f"{p.layout} {p.a.format.name} {p.b.format.name} {p.out_dtype} {c} | {tile.shared_bytes}", partial(call, p, c, factor)
