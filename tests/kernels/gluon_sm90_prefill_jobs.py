"""Launches of the Hopper prefill kernel for the compile tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import FP8_1x128, FP8_128x128, ScaledTensor, dtype_of
from narrowgemm.kernels.gluon.sm90 import fp8_block
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Config, Operand, Problem, Step

M, N, K, G = 512, 1536, 1024, 4
LAYOUTS = ("dense", "contiguous", "offsets", "psum", "masked")


def describe(layout: str, k: int = K, a_scale: str = "mn", e8m0: bool = False, **kw) -> Problem:
    dtype = "e8m0" if e8m0 else "fp32"
    return Problem("gemm" if layout == "dense" else "grouped_gemm", layout, M, N, k, 1 if layout == "dense" else G,
                   Operand(FP8_1x128, scale_dtype=dtype, scale_major=a_scale), Operand(FP8_128x128, scale_dtype=dtype),
                   rows=M // G, **kw)


def operands(p: Problem) -> Operands:
    empty, f8 = torch.empty, torch.float8_e4m3fn
    planes = (G,) if p.layout == "masked" else ()
    groups = () if p.layout == "dense" else (G,)
    scale = torch.uint8 if p.a.scale_dtype == "e8m0" else torch.float32
    sa = empty(*planes, p.k // 128, M, dtype=scale).mT if p.a.scale_major == "mn" else empty(*planes, M, p.k // 128, dtype=scale)
    index = {"dense": None, "contiguous": empty(M, dtype=torch.int32), "offsets": empty(G + 1, dtype=torch.int64)}
    return Operands(
        ScaledTensor(empty(*planes, M, p.k, dtype=f8), sa, p.a.format),
        ScaledTensor(empty(*groups, N, p.k, dtype=f8), empty(*groups, N // 128, p.k // 128, dtype=scale), p.b.format),
        empty(*planes, M, N, dtype=dtype_of(p.out_dtype)), M, N, p.k, p.groups,
        index[p.layout] if p.layout in index else empty(G, dtype=torch.int32), 128)


def call(p: Problem, config: Config) -> None:
    launch, = fp8_block.launches(Step(fp8_block.NAME, config), p, operands(p), None)
    tile = launch.arguments[-1]
    assert tile == fp8_block.tile_of(p, config, get_arch("sm90"))
    compiled = launch.run()
    if tile.LATE_STORE and tile.STORE_TMA:
        check_late_store(compiled.asm["ttgir"])


def check_late_store(ttgir: str) -> None:
    """A tile that is stored one trip late is stored where that tile is: its row comes round the loop.

    Triton 3.6 drops a loop-carried variable that starts as an alias of another, and then every tile went where the first was.
    """
    carried: set[str] = set()
    stores, outermost = 0, 0
    for line in ttgir.splitlines():
        if "scf.while (" in line:
            result, _, arguments = line.partition("scf.while (")
            names = {result.strip().split(":")[0], *re.findall(r"(%[\w.]+) = ", arguments.split(") : (")[0])}
            indent = len(line) - len(line.lstrip())
            # a loop inside the loop over tiles (looking for a tile's group) takes nothing from it
            carried = carried | names if carried and indent > outermost else names
            outermost = outermost if carried is not names and indent > outermost else indent
        elif carried and (made := re.match(r"\s*(%[\w.]+)(?::\d+)? = ", line)):
            carried.add(made[1])
        elif carried and "async_tma_" in line and "local_to_global" in line:
            row = re.search(r"\[(%[\w.]+)", line)
            assert row and row[1] in carried, f"a late store takes its row from before the loop: {line.strip()[:120]}"
            stores += 1
    assert stores, "no TMA store in a loop"


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': one config a layout, and some kinds of tile with an odd number of K blocks; 'all': every config of the search space and every option."""
    arch = get_arch(target)
    for layout in LAYOUTS:
        p = describe(layout)
        for c in fp8_block.configs(p, arch)[: None if which == "all" else 1]:
            yield f"{layout} {c}", lambda p=p, c=c: call(p, c)
    odd = describe("masked", k=7 * 128)
    few = {(128, 128, "slot"), (128, 256, ""), (128, 192, ""), (64, 128, "ctas")}
    for c in fp8_block.configs(odd, arch):
        if which == "all" or (c.block_m, c.block_n, "".join(k for k, _ in c.extra)) in few:
            yield f"masked, odd K, {c}", lambda c=c: call(odd, c)
    options = {"E8M0": describe("masked", e8m0=True, a_scale="k"), "fp32": describe("dense", out_dtype="fp32"),
               "accumulate": describe("contiguous", accumulate=True, out_dtype="fp16"),
               "plain stores": describe("psum", out_aligned=False)}
    for layout in ("dense", "masked"):
        p = describe(layout)
        late = replace(fp8_block.configs(p, arch)[0], extra=(("late_store", 1),))
        yield f"{layout} {late}", lambda p=p, c=late: call(p, c)
    large = replace(describe("masked"), groups=128, rows=256)
    tails = fp8_block._config(128, 256, 4)
    tile = fp8_block.tile_of(large, tails, arch)
    assert tile is not None and tile.TAIL
    yield f"tails {tails}", lambda: call(large, tails)
    for name, p in options.items():
        for c in fp8_block.configs(p, arch)[: 9 if which == "all" else 1]:
            yield f"{name} {c}", lambda p=p, c=c: call(p, c)
