"""The Hopper kernel for narrow weights compiles: BF16 wgmma with A from registers, no spills, wgmma not serialised, cp.async,
and the shared memory that the host states is no less than the compiler's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, FP16, MXFP4, MXFP8, Format, FP8_1x128, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import narrow
from narrowgemm.kernels.gluon.sm90.narrow_tile import Static
from narrowgemm.kernels.operands import Operands
from narrowgemm.prepack import PackedWeight
from narrowgemm.prepack_bits import FP8_PREPACK, PREPACK
from narrowgemm.problem import Config, Epilogue, Operand, Problem, Step

from .._compile import compile_jobs

ARCH = get_arch("h200")
FP8 = FP8_1x128.with_scale("e8m0")
TOP_K = 4
# layout, A, B, groups, slots, N, K, pair, activation, combine, factors
FEW = (("offsets", BF16, MXFP4, 128, 4, 5760, 2880, "interleaved", "swiglu_oai", False, False),
       ("routed", MXFP8, MXFP8, 128, 16, 1536, 6144, "halves", "swiglu", False, True),
       ("offsets", BF16, MXFP4, 256, 512, 7168, 2048, "", "", True, True),
       ("routed", FP8, MXFP4, 384, 128, 7168, 1024, "", "", True, False),
       ("dense", MXFP4, MXFP8, 1, 48, 2304, 6144, "", "", False, False),
       ("masked", BF16, MXFP4, 8, 160, 7168, 2048, "", "", False, False),
       ("contiguous", FP8_1x128, MXFP4, 8, 320, 7168, 2048, "", "", False, False),
       ("psum", FP8_1x128, MXFP8, 16, 200, 2048, 1152, "", "", False, False),
       ("masked", FP8_1x128, MXFP4, 8, 160, 7168, 2048, "", "", False, True),
       ("offsets", FP16, MXFP4, 128, 64, 2880, 2880, "", "", False, False),
       ("offsets", BF16, FP8_PREPACK, 128, 1024, 5760, 2880, "interleaved", "swiglu_oai", False, False))

SOME = (4, 9)       # what the newest Triton compiles in every run: tokens in their order; gathered, two halves of each

WHICH = (("oldest", "few"), ("newest", "some"), pytest.param("newest", "few", marks=pytest.mark.slow))


def problem(layout: str, a: Format, b: Format, groups: int, slots: int, n: int, k: int, pair: str, activation: str,
            combine: bool) -> Problem:
    routed = layout == "routed" or activation or combine
    op = "gemm" if layout == "dense" else "routed_gemm" if routed else "grouped_gemm"
    args = (1.702, 7.0) if activation == "swiglu_oai" else ()
    m = slots // groups if layout == "masked" else slots
    return Problem(op, layout, m, n, k, groups, Operand(a, scale_dtype=a.scale if a.scaled else ""),
                   Operand(b, prepack=f"{PREPACK}:{pair}" if pair else PREPACK, scale_dtype="e8m0"),
                   rows=max(1, slots // groups), epilogue=Epilogue(bool(activation), activation, args, pair == "interleaved", combine, combine),
                   a_div=TOP_K if activation else 1)


def for_fp8(p: Problem) -> Problem:
    """The same with weights that were packed for FP8."""
    return replace(p, b=replace(p.b, prepack=p.b.prepack.replace(PREPACK, FP8_PREPACK), folds=True))


def operands(p: Problem, pair: str, factors: bool) -> Operands:
    def new(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tiles, chunks = -(-p.n // 64), -(-p.k // 128)
    e4m3 = p.b.format.element == "e4m3"
    b = PackedWeight(new(p.groups, tiles, chunks, *((2,) if e4m3 else ()), 64, 64), new(p.groups, tiles, -(-chunks // 2), 4, 8, 4, 2, 2),
                     p.b.format, (p.groups, p.n, p.k), pair, new(p.groups, tiles * 64, dtype=torch.float32) if factors else None)
    rows = (p.groups, p.m) if p.layout == "masked" else (p.m // p.a_div,)
    fmt = p.a.format
    data = new(*rows, p.k // fmt.elem.per_byte, dtype=fmt.elem.dtype)
    dtype = torch.float32 if fmt.scale == "fp32" else torch.uint8
    a = ScaledTensor(data, new(*fmt.scale_shape((*rows, p.k)), dtype=dtype) if fmt.scaled else None, fmt)
    n = p.n // 2 if p.epilogue.activation else p.n
    i32 = torch.int32
    index = None if p.layout == "dense" else new({"offsets": p.groups + 1, "contiguous": p.m}.get(p.layout, p.groups),
                                                 dtype=torch.int64 if p.layout == "offsets" else i32)
    more: dict[str, object] = {}
    if p.op == "routed_gemm":
        more = {"slots": new(p.m, dtype=i32), "num_slots": p.m, "top_k": TOP_K, "positions": p.m}
        if p.layout == "routed":
            more |= {"experts": new(p.m, dtype=i32), "posted": new(1, dtype=i32), "block_m": 16}
        if p.epilogue.bias:
            more["bias"] = new(p.groups, p.n, dtype=torch.bfloat16)
        if p.epilogue.routing_weight:
            more["weight"] = new(p.m, dtype=torch.float32)
    out = new(p.m // TOP_K if p.epilogue.combine else p.m, n, dtype=torch.bfloat16)
    if p.layout == "masked":
        out = new(p.groups, p.m, n, dtype=torch.bfloat16)
    return Operands(a, ScaledTensor(b.data, b.scale, b.format), out, p.m, p.n, p.k, p.groups, index, packed=b, factor=b.factor, **more)


def compile_step(p: Problem, config: Config, x: Operands) -> None:
    size = narrow.workspace(p, config)
    work = torch.empty(size, dtype=torch.uint8, device="meta")
    for made in narrow.launches(Step(narrow.NAME, config, size), p, x, work):
        compiled = made.warm()
        if isinstance(cfg := made.arguments[-1], Static):
            check_places(compiled.asm["ptx"], cfg)


def check_places(ptx: str, cfg: Static) -> None:
    """Weights are copied to addresses, and read by way of Gluon's view of the ring: it is at the start of shared memory."""
    fields = cfg.S_BOX * cfg.ROWS * 8
    assert f"[sto + {fields}]" in ptx, "fields are not copied to where the ring has them"
    read = re.findall(r"ldmatrix\.sync[^;]*\+(\d+)\]|ld\.shared[^;]*\+(\d+)\]|add\.s32 \s*%r\d+, %r\d+, (\d+);", ptx)
    assert str(fields) in {x for groups in read for x in groups}, f"fields are not read from {fields} on"


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': one config of each problem; 'some': of two; 'all': every config of the search space, and every shape of the table."""
    for number, (layout, a, b, groups, slots, n, k, pair, activation, combine, factors) in enumerate(FEW):
        if which == "some" and number not in SOME:
            continue
        p = problem(layout, a, MXFP4 if b == FP8_PREPACK else b, groups, slots, n, k, pair, activation, combine)
        x = operands(p, pair, factors)
        if b == FP8_PREPACK:
            p = for_fp8(p)
            x.top = torch.empty((groups, -(-n // 64) * 64), dtype=torch.uint8, device="meta")
        assert narrow.supports(p, ARCH) is None
        every = [narrow.make_config(bt, *shape, wide=wide) for bt, shapes in narrow.SHAPES[p.b.format.element].items() for shape in shapes
                 for wide in (False, True)]
        for c in every if which == "all" else narrow.configs(p, ARCH)[:1]:
            if narrow.legal(p, c, ARCH) is None:
                yield (f"m64n{c.block_m}k16 | {layout} {a.name} x {p.b.format.name} {p.b.prepack} {activation} | {c} | {narrow.smem_bytes(p, c)}",
                       partial(compile_step, p, c, x))


def check(reports: list[dict]) -> None:
    for r in reports:
        assert r["spills"] == 0, f"{r['job']}: {r['spills']} bytes spilled in {r['kernel']}"
        assert not r["serialized"] and not r["starved"], f"{r['job']}: ptxas serialises wgmma"
        if r["kernel"] != "narrow_kernel":
            continue
        stated = int(r["job"].rsplit("|", 1)[1])
        assert r["shared"] <= stated <= ARCH.smem, f"{r['job']}: {r['shared']} bytes of shared memory, stated {stated}"
        for op in ("wgmma.mma_async", "cp.async"):
            assert r["ops"][op], f"{r['job']}: no {op}"


@pytest.mark.compile
@pytest.mark.parametrize("triton, which", WHICH)
def test_every_layout(triton: str, which: str) -> None:
    some = FEW if which == "few" else [FEW[i] for i in SOME]
    reports = compile_jobs("sm90", "tests.kernels.test_gluon_sm90_narrow_compile:jobs", which, triton=triton)
    kernels = [r["kernel"] for r in reports]
    assert kernels.count("narrow_kernel") == kernels.count("narrow_prep_kernel") == len(some)
    assert kernels.count("narrow_combine_kernel") == sum(f[9] for f in some)
    check(reports)


@pytest.mark.compile
@pytest.mark.slow
def test_whole_search_space() -> None:
    check(compile_jobs("sm90", "tests.kernels.test_gluon_sm90_narrow_compile:jobs", "all"))
