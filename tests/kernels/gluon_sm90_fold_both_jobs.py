"""Launches of the Hopper FP8 product of MXFP8 by folded MXFP8 weights, for the compile tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import MXFP8
from narrowgemm.kernels.gluon.sm90 import fold_both
from narrowgemm.prepack import PackedWeight
from narrowgemm.prepack_folded import FoldedCopy, regions
from narrowgemm.problem import Config, Problem, Step

from . import gluon_sm90_expand_jobs as base

COLUMNS, PICKS = 128, 640


def describe(layout: str, **kw) -> Problem:
    p = base.describe(layout, MXFP8, MXFP8, **kw)
    return replace(p, b=replace(p.b, picks=PICKS))


def call(p: Problem, config: Config, factors: bool) -> None:
    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    work = new(fold_both.workspace(p, config))
    x = base.operands(p, factors)
    x.folded_rest = new(regions(p.groups, p.n, p.k, COLUMNS, PICKS).size)
    if p.b.prepack:
        x.folded = new(p.groups, p.n, p.k)
    x.packed = PackedWeight(x.b.data, x.b.scale, MXFP8, (p.groups, p.n, p.k), folded=FoldedCopy(x.folded, x.folded_rest, COLUMNS, PICKS))
    for launch in fold_both.launches(Step(fold_both.NAME, config, len(work)), p, x, work):
        launch.warm()


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': two layouts on 128x256 and on the widest of other tiles, with factors of weights' rows and without; 'all': every layout with every option, and every width."""
    arch = get_arch(target)
    runs = [describe("offsets"), describe("dense")]
    if which == "all":
        runs = [describe(layout, **kw) for layout in fold_both.KINDS
                for kw in ({}, {"out_dtype": "fp32"}, {"out_dtype": "fp16"}, {"out_aligned": False})]
    plain = replace(describe("dense", prepack=""), n=1536, k=1152)
    yield "weights as they came | 0", partial(call, plain, fold_both.configs(plain, arch)[0], False)
    for p in runs:
        p = replace(p, n=1536)
        offered = fold_both.configs(p, arch)
        for c in offered if which == "all" and (p.layout, p.out_dtype) == ("dense", "bf16") else (offered[0], offered[-1]):
            tile = fold_both.tile_of(p, c, arch)
            assert tile is not None
            for factors in (False, True) if which == "few" else (False, ):
                yield f"{p.layout} {p.out_dtype} {c}{' factors' if factors else ''} | {tile.shared_bytes}", partial(call, p, c, factors)
