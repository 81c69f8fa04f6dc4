"""Launches of the Hopper prefill kernel with folded weights for the compile tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import MXFP4, Format, FP8_1x128, ScaledTensor, dtype_of
from narrowgemm.kernels.gluon.sm90 import fold, fold_stub, fold_whole, fp8_cluster_tile
from narrowgemm.kernels.operands import Operands
from narrowgemm.prepack_bits import FP8_PREPACK, PREPACK
from narrowgemm.problem import Config, Operand, Problem, Step

from .gluon_sm90_cluster_jobs import check_places

M, N, K, G = 512, 1528, 1056, 4
LAYOUTS = ("dense", "contiguous", "offsets", "psum", "masked")


def describe(layout: str, a: Format = FP8_1x128, a_scale: str = "mn", order: str = PREPACK, **kw) -> Problem:
    dtype = "fp32" if a.scale == "fp32" else "e8m0"
    return Problem("gemm" if layout == "dense" else "grouped_gemm", layout, M, N, K, 1 if layout == "dense" else G,
                   Operand(a, scale_dtype=dtype, scale_major=a_scale), Operand(MXFP4, prepack=order, scale_dtype="e8m0", folds=True),
                   rows=M // G, alignment=128, **kw)


def operands(p: Problem, factor: bool = False) -> Operands:
    def new(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tiles, chunks = -(-p.n // 64), -(-p.k // 128)
    dims = (G, p.m) if p.layout == "masked" else (p.m,)
    fmt = p.a.format
    blocks = fmt.scale_shape((p.m, p.k))[1]
    scale_type = torch.float32 if p.a.scale_dtype == "fp32" else torch.uint8
    scale = new(*dims[:-1], blocks, p.m, dtype=scale_type).mT if p.a.scale_major == "mn" else new(*dims, blocks, dtype=scale_type)
    index = {"dense": None, "contiguous": new(p.m, dtype=torch.int32), "offsets": new(p.groups + 1, dtype=torch.int64)}
    return Operands(
        ScaledTensor(new(*dims, p.k // fmt.elem.per_byte, dtype=fmt.elem.dtype), scale, fmt),
        ScaledTensor(new(p.groups, tiles, chunks, 64, 64), new(p.groups, tiles, -(-chunks // 2), 4, 8, 4, 2, 2), MXFP4),
        new(*dims, p.n, dtype=dtype_of(p.out_dtype)), p.m, p.n, p.k, p.groups, index[p.layout] if p.layout in index else
        new(G, dtype=torch.int32), 128, factor=new(p.groups, tiles * 64, dtype=torch.float32) if factor else None,
        top=new(p.groups, tiles * 64))


def call(p: Problem, config: Config, factor: bool = False) -> None:
    work = torch.empty(fold.workspace(p, config), dtype=torch.uint8, device="meta")
    for launch in fold.launches(Step(fold.NAME, config, len(work)), p, operands(p, factor), work):
        compiled = launch.warm()
        if isinstance(launch.arguments[-1], fp8_cluster_tile.Tile):
            check_places(compiled.asm["ptx"], launch.arguments[-1])


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': each tile, each way to A; 'all': every config in every layout and with every option."""
    arch = get_arch(target)
    dense, contiguous = describe("dense"), describe("contiguous")
    runs = [(describe("contiguous", order=FP8_PREPACK), 0, False), (contiguous, -3, False), (describe("masked", MXFP4), -1, True), (dense, 1, False),
            (describe("offsets", FP8_1x128.with_scale("e8m0"), "k", out_dtype="fp32"), 1, True), (replace(describe("masked", order=FP8_PREPACK), rows=256), 6, False),
            (replace(describe("offsets", order=FP8_PREPACK), rows=256, groups=64, m=64 * 256), 5, False)]
    if which == "all":
        kinds = [describe(layout, a, **kw) for layout in LAYOUTS for a in (FP8_1x128, MXFP4)
                 for kw in ({}, {"order": FP8_PREPACK}, {"out_dtype": "fp32"}, {"accumulate": True, "out_dtype": "fp16"}, {"out_aligned": False})]
        # with tails by half, and quarters; by offsets with rows beyond whole tiles, too
        kinds += [replace(p, rows=256) for p in kinds if p.layout == "masked"]
        kinds += [replace(describe("offsets", order=FP8_PREPACK, out_dtype=out), rows=256, groups=groups, m=groups * 256)
                  for out in ("bf16", "fp16", "fp32") for groups in (200, 600)]
        runs = [(p, i, factor) for p in kinds for i in range(len(fold.configs(p, arch))) for factor in (False, True)]
    for p, i, factor in runs:
        c = fold.configs(p, arch)[i]
        plain = fold_whole.tile_of(p, c, arch, factor) if fold.whole(c) else fold.tile_of(p, c, arch, factor, stub=fold_stub.wins(p.m, p.groups))
        found = [plain, fold.tile_of(p, c, arch, factor, True)]
        stated = max(t.shared_bytes for t in found[: 1 if p.a.format.element == "e4m3" else 2] if t)
        yield f"{p.layout} {p.a.format.name} {p.out_dtype} {c} | {stated}", partial(call, p, c, factor)
