"""Launches of the Hopper weight-gradient kernel for the compile tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import FP8_ROW, FP8_TENSOR, Format, FP8_1x128, ScaledTensor, dtype_of
from narrowgemm.kernels.gluon.sm90 import fp8_wgrad
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Config, Operand, Problem, Step, promotion
from narrowgemm.scales import mn_major_tma_aligned

from .gluon_sm90_scaled_jobs import scaled

M, N, K, G = 512, 1536, 2048, 4


def describe(a: Format = FP8_ROW, b: Format = FP8_ROW, fast: bool = False, out_dtype: str = "fp32", **kw) -> Problem:
    return Problem("grouped_gemm_wgrad", "k_grouped", M, N, K, G, Operand(a, scale_dtype="fp32", scale_major="mn"),
                   Operand(b, scale_dtype="fp32", scale_major="mn"), promote=promotion(a, b, fast), out_dtype=out_dtype, alignment=128, **kw)


def call(p: Problem, config: Config) -> None:
    a, b = (scaled(shape, f) for shape, f in (((p.m, p.k), p.a.format), ((p.n, p.k), p.b.format)))
    if p.a.format.group[1]:
        a, b = (ScaledTensor(x.data, mn_major_tma_aligned(x.scale), x.format) for x in (a, b))
    x = Operands(a, b, torch.empty(G, p.m, p.n, dtype=dtype_of(p.out_dtype)), p.m, p.n, p.k, G,
                 torch.empty(G + 1, dtype=torch.int32))
    space = torch.empty(fp8_wgrad.workspace(p, config), dtype=torch.uint8)
    for made in fp8_wgrad.launches(Step(fp8_wgrad.NAME, config), p, x, space):
        made.run()


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    arch = get_arch(target)
    problems = {"fp32": describe(), "fast": describe(fast=True), "blocks": describe(FP8_1x128, FP8_1x128), "accumulate": describe(accumulate=True),
                "many tiles": replace(describe(FP8_1x128, FP8_1x128, out_dtype="bf16"), m=17 * 128, n=4096),
                "bf16": describe(out_dtype="bf16"), "mixed": describe(FP8_TENSOR, FP8_ROW.with_element("e5m2"))}
    for name, p in problems.items():
        seen = set()
        for c in fp8_wgrad.configs(p, arch):
            once = not seen or (name == "blocks" and c.block_m == c.block_n)    # one piece a warpgroup, too
            if (c.block_m, c.block_n) not in seen and (which == "all" or once):
                seen.add((c.block_m, c.block_n))
                yield f"{name} {c}", lambda p=p, c=c: call(p, c)
