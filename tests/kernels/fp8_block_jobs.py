"""Launches of the portable FP8 kernels for the compile tests: every layout, and every config of the search space."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import narrowgemm as ng
from narrowgemm.arch import get_arch
from narrowgemm.formats import Format, FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.kernels.triton import fp8_block, fp8_wgrad
from narrowgemm.ops.explain import describe
from narrowgemm.problem import Config

N, K, G = 512, 1024, 4
DENSE_ROWS = (16, 4096)


def operand(fmt: Format, *shape: int, e8m0: bool = False) -> ScaledTensor:
    scale_shape = fmt.scale_shape(shape)
    scale = torch.zeros(*scale_shape[:-2], scale_shape[-1], scale_shape[-2], dtype=torch.uint8 if e8m0 else torch.float32).mT
    return ScaledTensor(torch.zeros(shape, dtype=fmt.elem.dtype), scale, fmt.with_scale("e8m0") if e8m0 else fmt)


def layouts(m: int) -> dict[str, ng.Layout]:
    i32 = torch.int32
    return {"contiguous": ng.Contiguous(torch.zeros(m, dtype=i32)), "offsets": ng.Offsets(torch.zeros(G + 1, dtype=torch.int64)),
            "psum": ng.Psum(torch.zeros(G, dtype=i32))}


def call(layout: str, m: int, config: Config, *, k: int = K, e8m0: bool = False) -> None:
    b = operand(FP8_128x128, G, N, k, e8m0=e8m0)
    if layout == "dense":
        ng.gemm(operand(FP8_1x128, m, k, e8m0=e8m0), b[0], backend="triton", config=config)
    elif layout == "masked":
        ng.grouped_gemm(operand(FP8_1x128, G, m, k, e8m0=e8m0), b, ng.Masked(torch.zeros(G, dtype=torch.int32)),
                        backend="triton", config=config)
    else:
        ng.grouped_gemm(operand(FP8_1x128, m, k, e8m0=e8m0), b, layouts(m)[layout], backend="triton", config=config)


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': one small-M and one large config a layout; 'all': every config of the search space."""
    arch = get_arch(target)
    for m in DENSE_ROWS:
        configs = fp8_block.configs(describe("gemm", m=m, n=N, k=K), arch)
        for c in configs if which == "all" else configs[:1]:
            yield f"dense m{m} {c}", lambda m=m, c=c: call("dense", m, c)
        for layout in ("contiguous", "offsets", "psum", "masked"):
            problem = describe("grouped_gemm", layout=layout, groups=G, m=m if layout == "masked" else m * G, n=N, k=K)
            configs = fp8_block.configs(problem, arch)
            for c in configs if which == "all" else configs[:1]:
                yield f"{layout} m{m} {c}", lambda layout=layout, m=m, c=c: call(layout, m, c)
    c = fp8_block.configs(describe("gemm", m=4096, n=N, k=K), arch)[0]
    yield "dense, E8M0 scales, K tail", lambda: call("dense", 4096, c, k=K - 32, e8m0=True)
    wgrad = describe("grouped_gemm_wgrad", layout="k_grouped", groups=G, m=N, n=N, k=K, b="fp8_1x128")
    found = fp8_wgrad.configs(wgrad, arch)
    if target == "gfx942":      # E4M3 becomes FP16 by many instructions: the first tile takes three times as long to compile as this one
        found.sort(key=lambda c: c.block_m * c.block_n)
    for c in found[: None if which == "all" else 1]:
        a = operand(FP8_1x128, N, K)
        a = ScaledTensor(torch.zeros(K, N, dtype=a.data.dtype).mT, a.scale, a.format)  # gradients are stored [K, M]
        yield f"wgrad {c}", lambda c=c, a=a: ng.grouped_gemm_wgrad(a, a, ng.KGrouped(torch.zeros(G + 1, dtype=torch.int64)),
                                                                   backend="triton", config=c)
