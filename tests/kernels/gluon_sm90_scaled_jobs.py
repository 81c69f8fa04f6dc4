"""Launches of the Hopper kernel for row-wise and tensor-wise scales, for the compile tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import FP8_ROW, FP8_TENSOR, Format, ScaledTensor, dtype_of
from narrowgemm.kernels.gluon.sm90 import fp8_scaled
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Config, Operand, Problem, Step

M, N, K, G = 512, 1536, 1040, 4
LAYOUTS = ("dense", "contiguous", "offsets", "psum", "masked")


def describe(layout: str, a: Format = FP8_ROW, b: Format = FP8_ROW, promote: int = 512, **kw) -> Problem:
    return Problem("gemm" if layout == "dense" else "grouped_gemm", layout, M, N, K, 1 if layout == "dense" else G,
                   Operand(a, scale_dtype="fp32", scale_major="k"), Operand(b, scale_dtype="fp32", scale_major="k"),
                   rows=M // G, promote=promote, **kw)


def scaled(shape: tuple[int, ...], fmt: Format) -> ScaledTensor:
    return ScaledTensor(torch.empty(shape, dtype=fmt.elem.dtype), torch.empty(fmt.scale_shape(shape)), fmt)


def operands(p: Problem) -> Operands:
    planes = (G,) if p.layout == "masked" else ()
    groups = () if p.layout == "dense" else (G,)
    index = {"dense": None, "contiguous": torch.empty(M, dtype=torch.int32), "offsets": torch.empty(G + 1, dtype=torch.int64)}
    return Operands(scaled((*planes, M, K), p.a.format), scaled((*groups, N, K), p.b.format),
                    torch.empty(*planes, M, N, dtype=dtype_of(p.out_dtype)), M, N, K, p.groups,
                    index[p.layout] if p.layout in index else torch.empty(G, dtype=torch.int32), 128)


def call(p: Problem, config: Config) -> None:
    made = fp8_scaled.launches(Step(fp8_scaled.NAME, config), p, operands(p), None)
    assert made[0].arguments[-1] == fp8_scaled.tile_of(p, config, get_arch("sm90"))
    for x in made:
        x.run()


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': every tile with and without promotion, one layout each; 'all': every layout with every tile, and every option."""
    arch = get_arch(target)
    mixed = {"mixed": describe("offsets", FP8_ROW.with_element("e5m2"), FP8_TENSOR), "tensor": describe("dense", FP8_TENSOR, FP8_TENSOR),
             "fp32": describe("dense", out_dtype="fp32"), "accumulate": describe("contiguous", accumulate=True, out_dtype="fp16"),
             "plain stores": describe("psum", out_aligned=False)}
    shapes = set()
    for layout in LAYOUTS if which == "all" else ("offsets", ):
        for promote in (512, 0):
            p = describe(layout, promote=promote)
            for c in fp8_scaled.configs(p, arch):
                shape = (layout, c.block_m, c.block_n, promote)
                if shape not in shapes:
                    shapes.add(shape)
                    yield f"{layout} promote={promote} {c}", lambda p=p, c=c: call(p, c)
    for name, p in mixed.items():
        for c in fp8_scaled.configs(p, arch)[: 8 if which == "all" else 1]:
            yield f"{name} {c}", lambda p=p, c=c: call(p, c)
