"""Launches of the Hopper FP8 product with MXFP8 activations and folded weights, for the compile tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import MXFP4, MXFP8
from narrowgemm.kernels.gluon.sm90 import fold_mixed
from narrowgemm.problem import Config, Problem, Step

from . import gluon_sm90_expand_jobs as base


def describe(layout: str, **kw) -> Problem:
    p = base.describe(layout, MXFP8, MXFP4, **kw)
    return replace(p, b=replace(p.b, folds=True))


def call(p: Problem, config: Config, factor: bool = False) -> None:
    work = torch.empty(fold_mixed.workspace(p, config), dtype=torch.uint8, device="meta")
    x = base.operands(p, factor)
    x.top = torch.empty(p.groups, -(-p.n // 64) * 64, dtype=torch.uint8, device="meta")
    for launch in fold_mixed.launches(Step(fold_mixed.NAME, config, len(work)), p, x, work):
        if launch.kernel.fn.__name__ not in ("expand_kernel", "bf16_kernel"):
            launch.warm()


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': one layout; 'all': every layout with every option."""
    arch = get_arch(target)
    runs = [(describe("contiguous"), False)]
    if which == "all":
        runs = [(describe(layout, **kw), factor) for layout in base.LAYOUTS for factor in (False, True)
                for kw in ({}, {"out_dtype": "fp32"}, {"out_dtype": "fp16"}, {"out_aligned": False})]
    for p, factor in runs:
        c = fold_mixed.configs(p, arch)[0]
        tile = fold_mixed.tile_of(p, c, arch, factor)
        assert tile is not None
        yield f"{p.layout} {p.out_dtype} {c} | {tile.shared_bytes}", partial(call, p, c, factor)
