"""The Hopper decode kernel compiles: wgmma with E4M3 on both sides and K = 32, no spills, wgmma not serialised, and the
shared memory that the host states is no less than the compiler's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import fp8_decode
from narrowgemm.kernels.operands import Operands
from narrowgemm.ops.explain import describe
from narrowgemm.problem import Config, Problem, Step

from .._compile import TRITONS, compile_jobs

N, K, G = 512, 1024, 4
ARCH = get_arch("h200")
WORST_SPILL = {"oldest": 0, "newest": 32}      # bytes; the newest's masked tile of 64 columns, and not in every run
INDEX = {"contiguous": torch.int32, "offsets": torch.int64, "psum": torch.int32, "masked": torch.int32}
# layout, rows a group, token columns, in between, of few rows, weight rows, warps, most units a tile, K blocks of a trip
FEW = (("dense", 64, 64, 0, 0, 64, 4, 2, 4), ("dense", 16, 16, 0, 0, 64, 4, 2, 4), ("masked", 20, 64, 0, 32, 64, 4, 1, 1),
       ("offsets", 8, 64, 0, 16, 64, 4, 1, 1), ("psum", 16, 64, 0, 32, 128, 4, 1, 1), ("contiguous", 64, 64, 0, 0, 128, 4, 1, 4),
       ("offsets", 20, 128, 64, 32, 128, 8, 1, 1), ("offsets", 1, 8, 0, 0, 64, 4, 2, 4))
FRONT = {8: "sizes", 20: "tokens"}         # of offsets with so many rows a group: behind a launch of the layer


def problem(layout: str, rows: int, out_dtype: str = "bf16") -> Problem:
    if layout == "dense":
        return describe("gemm", m=rows, n=N, k=K, out_dtype=out_dtype)
    m = rows if layout == "masked" else rows * G
    p = describe("grouped_gemm", layout=layout, groups=G, m=m, n=N, k=K, out_dtype=out_dtype)
    return replace(p, front=FRONT.get(rows, "")) if layout == "offsets" else p


def operands(p: Problem, dtype: torch.dtype = torch.bfloat16, scale: torch.dtype = torch.float32) -> Operands:
    masked, dense = p.layout == "masked", p.layout == "dense"
    a = torch.empty((G, p.m, K) if masked else (p.m, K), dtype=torch.float8_e4m3fn, device="meta")
    b = torch.empty((N, K) if dense else (G, N, K), dtype=torch.float8_e4m3fn, device="meta")

    def scaled(x, fmt):
        return ScaledTensor(x, torch.empty(fmt.scale_shape(x.shape), dtype=scale, device="meta"), fmt)

    index = None
    if not dense:
        length = {"contiguous": p.m, "offsets": G + 1}.get(p.layout, G)
        index = torch.empty(length, dtype=INDEX[p.layout], device="meta")
    out = torch.empty((*a.shape[:-1], N), dtype=dtype, device="meta")
    return Operands(scaled(a, FP8_1x128), scaled(b, FP8_128x128), out, p.m, N, K, 1 if dense else G, index, 128)


def compile_step(p: Problem, config: Config, x: Operands) -> None:
    size = fp8_decode.workspace(p, config)
    work = torch.empty(size, dtype=torch.uint8, device="meta") if size else None
    for launch in fp8_decode.launches(Step(fp8_decode.NAME, config, size), p, x, work):
        launch.warm()


def chosen(which: str) -> Iterator[tuple[str, Problem, Config, Operands]]:
    """'few': one config a layout and a corner each; 'all': every config of the search space, for every token width."""
    if which == "all":
        for layout in fp8_decode.LAYOUT_IDS:
            for rows in (1, 16, 32, 64):
                p = problem(layout, rows)
                for q in (p, replace(p, front="tokens")) if layout == "offsets" and rows == 1 else (p,):
                    for c in fp8_decode.configs(q, ARCH):
                        yield f"{layout} {rows} {q.front}", q, c, operands(q)
        return
    for layout, rows, *want in FEW:
        p = problem(layout, rows)
        c = next(c for c in fp8_decode.configs(p, ARCH)
                 if [c.block_m, c.option("middle"), c.option("narrow"), c.block_n, c.num_warps, min(c.split_k, 2),
                     c.option("trip", 1)] == want)
        yield f"{layout} {rows}", p, replace(c, extra=(*c.extra, ("keep", 1))) if layout == "masked" else c, operands(p)
    for tokens, blocks, stages in ((128, 2, 8), (16, 8, 4)):
        p = problem("dense", tokens)
        c = Config(tokens, 64, 128, 4, stages, swap_ab=True, persistent=True, split_k=blocks, extra=(("cluster", blocks), ("guess", 3), ("trip", 4)))
        yield f"dense {tokens} in clusters", p, c, operands(p)
    for tokens, rows, warps, more in ((8, 64, 4, (("ahead", 16), ("box", 4), ("trip", 4))),
                                       (128, 128, 8, (("box", 2), ("middle", 64), ("narrow", 16), ("trip", 2)))):
        p = replace(problem("offsets", 1), front="tokens")
        c = Config(tokens, rows, 128, warps, 3, swap_ab=True, persistent=True, extra=more)
        yield f"offsets {tokens} by boxes", p, c, operands(p)
    p = replace(problem("dense", 8, "fp32"), accumulate=True)
    yield "dense 8 fp32 accumulate e8m0", p, fp8_decode.configs(p, ARCH)[0], operands(p, torch.float32, torch.uint8)


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    for name, p, c, x in chosen(which):
        job = f"m64n{c.block_m}k32 | {name} | {c} | {fp8_decode.smem_bytes(p, c)}"
        yield job, lambda p=p, c=c, x=x: compile_step(p, c, x)


def check(reports: list[dict], spill: int = 0) -> None:
    for r in reports:
        assert r["spills"] <= spill, f"{r['job']}: {r['spills']} bytes spilled"
        assert not r["serialized"] and not r["starved"], f"{r['job']}: ptxas serialises wgmma"
        if r["kernel"] != "fp8_decode_kernel":
            continue
        stated = int(r["job"].rsplit("|", 1)[1])
        assert r["shared"] <= stated <= ARCH.smem, f"{r['job']}: {r['shared']} bytes of shared memory, stated {stated}"
        shape = r["job"].split(" ")[0] + ".f32.e4m3.e4m3"
        for op in ("wgmma.mma_async", shape, "cp.async.bulk.tensor", "setmaxnreg"):
            assert r["ops"][op], f"{r['job']}: no {op}"


@pytest.mark.compile
@pytest.mark.parametrize("triton", TRITONS)
def test_every_layout(triton: str) -> None:
    reports = compile_jobs("sm90", "tests.kernels.test_gluon_sm90_decode_compile:jobs", triton=triton)
    assert sum(r["kernel"] == "fp8_decode_kernel" for r in reports) == len(FEW) + 5
    check(reports, WORST_SPILL[triton])


@pytest.mark.compile
@pytest.mark.slow
def test_whole_search_space() -> None:
    check(compile_jobs("sm90", "tests.kernels.test_gluon_sm90_decode_compile:jobs", "all"))
