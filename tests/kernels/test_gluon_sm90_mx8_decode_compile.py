"""The Hopper kernel for plain MXFP8 weights and few tokens compiles: FP8 wgmma of 32 of K, TMA, no spills, wgmma not serialised,
and the shared memory that the host states is no less than the compiler's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import MXFP8, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import mx8_decode
from narrowgemm.kernels.launching import with_boxes
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Config, Operand, Problem, Step

from .._compile import compile_jobs

ARCH = get_arch("h200")
# rows, N, K, output; which config, bytes that rows of scales are apart beyond K / 32
FEW = (((1, 9216, 6144, "bf16"), 0, 0), ((16, 6144, 6144, "bf16"), 1, 3), ((32, 768, 6144, "fp32"), -1, 0), ((5, 6144, 768, "fp16"), 0, 0))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def problem(m: int, n: int, k: int, out: str) -> Problem:
    side = Operand(MXFP8, scale_dtype="e8m0", scale_major="k")
    return Problem("gemm", "dense", m, n, k, 1, side, side, rows=m, out_dtype=out)


def operands(p: Problem, off: int = 0) -> Operands:
    def side(rows: int) -> ScaledTensor:
        data = torch.empty(rows, p.k, dtype=torch.float8_e4m3fn, device="meta")
        return ScaledTensor(data, torch.empty(rows, p.k // 32 + off, dtype=torch.uint8, device="meta")[:, :p.k // 32], MXFP8)

    return Operands(side(p.m), side(p.n), torch.empty(p.m, p.n, dtype=DTYPES[p.out_dtype], device="meta"), p.m, p.n, p.k)


def compile_step(p: Problem, config: Config, x: Operands) -> None:
    for made in mx8_decode.launches(Step(mx8_decode.NAME, config), p, x, None):
        compiled = made.warm()
        with_boxes(compiled, made.boxes)
        check_places(compiled, config)


def check_places(compiled, config: Config) -> None:
    """Boxes are as large as the kernel waits for. It takes descriptors by the numbers of their parameters, and its ring by where shared
    memory starts: tokens' boxes are where Gluon's view of the ring has them, and where they are brought to."""
    assert [m["block_size"] for m in compiled.metadata.tensordesc_meta] == [[1, config.block_n, 128], [1, config.block_m, 128]]
    ptx = compiled.asm["ptx"]
    assert re.findall(r"\.param \.align 64 \.b8 mx8_decode_kernel_param_(\d+)\[128\]", ptx) == ["0", "7"]
    assert len(re.findall(rf"add\.s32 [^;]*, {config.num_stages * mx8_decode.ROWS * 128};", ptx)) >= 3


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    for shape, number, off in FEW:
        p = problem(*shape)
        found = mx8_decode.configs(p, ARCH)
        for c in found if which == "all" else [found[number]]:
            yield (f"m64n{c.block_m}k32.f32.e4m3.e4m3 | {shape} | {c} | {mx8_decode.smem_bytes(p, c)}",
                   partial(compile_step, p, c, operands(p, off)))


def check(reports: list[dict]) -> None:
    for r in reports:
        stated = int(r["job"].rsplit("|", 1)[1])
        assert r["spills"] == 0, f"{r['job']}: {r['spills']} bytes spilled"
        assert not r["serialized"], f"{r['job']}: ptxas serialises wgmma"
        assert r["shared"] <= stated <= ARCH.smem, f"{r['job']}: {r['shared']} bytes of shared memory, stated {stated}"
        for op in (r["job"].split(" | ")[0], "cp.async.bulk.tensor"):
            assert r["ops"][op], f"{r['job']}: no {op}"


@pytest.mark.compile
@pytest.mark.parametrize("triton", ["oldest", pytest.param("newest", marks=pytest.mark.slow)])
def test_few(triton: str) -> None:
    reports = compile_jobs("sm90", "tests.kernels.test_gluon_sm90_mx8_decode_compile:jobs", triton=triton)
    assert len(reports) == len(FEW)
    check(reports)


@pytest.mark.compile
@pytest.mark.slow
def test_whole_search_space() -> None:
    check(compile_jobs("sm90", "tests.kernels.test_gluon_sm90_mx8_decode_compile:jobs", "all"))
