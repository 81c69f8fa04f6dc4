"""Launches of the portable 16-bit kernel for the compile tests: few and many rows, each layout; every config of the search space."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import narrowgemm as ng
from narrowgemm.arch import get_arch
from narrowgemm.kernels.triton import bf16
from narrowgemm.ops.explain import describe
from narrowgemm.problem import Config

N, K, G = 512, 1024, 4


def call(layout: str, m: int, config: Config, dtype: torch.dtype, k: int, major: str) -> None:
    b = torch.zeros(G, N, k, dtype=dtype) if major == "k" else torch.zeros(G, k, N, dtype=dtype).mT
    if layout == "dense":
        ng.gemm(torch.zeros(m, k, dtype=dtype), b[0], backend="triton", config=config)
    elif layout == "masked":
        ng.grouped_gemm(torch.zeros(G, m, k, dtype=dtype), b, ng.Masked(torch.zeros(G, dtype=torch.int32)), backend="triton", config=config)
    elif layout in ("contiguous", "psum"):
        index = torch.zeros(m if layout == "contiguous" else G, dtype=torch.int32)
        ng.grouped_gemm(torch.zeros(m, k, dtype=dtype), b, ng.Contiguous(index) if layout == "contiguous" else ng.Psum(index, 128),
                        backend="triton", config=config)
    else:
        ng.grouped_gemm(torch.zeros(m, k, dtype=dtype), b, ng.Offsets(torch.zeros(G + 1, dtype=torch.int64)), backend="triton",
                        config=config)


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': what is first for few and for many rows; 'all': every config of every layout."""
    arch = get_arch(target)
    for layout, m in (("offsets", 16), ("masked", 4096), ("dense", 4096), ("contiguous", 4096), ("psum", 16)) if which == "few" else \
            [(layout, m) for layout in ("dense", "offsets", "masked", "contiguous", "psum") for m in (16, 64, 4096)]:
        problem = describe("gemm" if layout == "dense" else "grouped_gemm", layout=layout, groups=1 if layout == "dense" else G,
                           m=m, n=N, k=K, a="bf16", b="bf16")
        found = bf16.configs(problem, arch)
        for c in found if which == "all" else found[:1]:
            yield (f"{layout} m{m} {c} | {bf16.smem_bytes(c)}",
                   lambda layout=layout, m=m, c=c: call(layout, m, c, torch.bfloat16, K, "k"))
        if m != 4096 or which == "all":
            yield (f"FP16, weights [E, K, N], K tail m{m} {found[0]} | {bf16.smem_bytes(found[0])}",
                   lambda m=m, c=found[0]: call("offsets", m, c, torch.float16, K - 24, "mn"))
