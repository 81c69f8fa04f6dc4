"""Launches of the Hopper BF16 grouped product for the compile tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import bf16
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Config, Operand, Problem, Step

M, N, K, G = 512, 1528, 1000, 4
INDEX = {"contiguous": (M, torch.int32), "offsets": (G + 1, torch.int64), "psum": (G, torch.int32), "masked": (G, torch.int32)}


def describe(layout: str, **kw) -> Problem:
    return Problem("grouped_gemm", layout, M, N, K, G, Operand(BF16), Operand(BF16), rows=M // G, alignment=128, **kw)


def call(p: Problem, config: Config) -> None:
    planes = (G,) if p.layout == "masked" else ()
    size, dtype = INDEX[p.layout]

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x = Operands(ScaledTensor(new(*planes, M, K), None, BF16), ScaledTensor(new(G, N, K), None, BF16), new(*planes, M, N), M, N, K, G,
                 torch.empty(size, dtype=dtype, device="meta"), 128)
    launch, = bf16.launches(Step(bf16.NAME, config), p, x, None)
    launch.warm()


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': a tile with tails; 'all': every config in every layout."""
    arch = get_arch(target)
    for layout in INDEX if which == "all" else ("offsets", ):
        p = describe(layout)
        assert bf16.supports(p, arch) is None
        for c in bf16.configs(p, arch)[:None if which == "all" else 1]:
            tile = bf16.tile_of(p, c, arch)
            assert tile is not None
            yield f"{layout} {c} | {tile.shared_bytes}", lambda p=p, c=c: call(p, c)
