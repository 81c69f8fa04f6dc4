"""The Hopper kernel for plain MXFP8 weights by BF16 wgmma compiles: wgmma of BF16 and, for NaN, of FP8, TMA, no spills, wgmma not
serialised, and the shared memory that the host states is no less than the compiler's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import mx8_bf16
from narrowgemm.kernels.launching import with_boxes
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Config, Problem, Step

from .._compile import compile_jobs
from .test_gluon_sm90_mx8_decode_compile import operands, problem

ARCH = get_arch("h200")
# rows, N, K, output; bytes that rows of scales are apart beyond K / 32
SHAPES = (((64, 9216, 6144, "bf16"), 0), ((50, 6144, 6144, "fp16"), 4), ((40, 768, 6144, "fp32"), 1), ((300, 768, 6144, "bf16"), 0))


def compile_step(p: Problem, config: Config, x: Operands) -> None:
    made = mx8_bf16.launches(Step(mx8_bf16.NAME, config), p, x, torch.empty(mx8_bf16.workspace(p, config), dtype=torch.uint8, device="meta"))
    compiled = [m.warm() for m in made][1]
    with_boxes(compiled, made[1].boxes)
    assert [m["block_size"] for m in compiled.metadata.tensordesc_meta] == [[1, config.block_n // 2, 128], [config.block_m, 64]]
    assert re.findall(r"\.param \.align 64 \.b8 mx8_bf16_kernel_param_(\d+)\[128\]", compiled.asm["ptx"]) == ["0", "7"]


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    for shape, off in SHAPES if which == "all" else SHAPES[2:]:
        p = problem(*shape)
        found = mx8_bf16.configs(p, ARCH)
        for c in found if which == "all" else found[-1:]:
            yield f"m64n{c.block_m}k16.f32.bf16.bf16 | {shape} | {c} | {mx8_bf16.smem_bytes(p, c)}", partial(compile_step, p, c, operands(p, off))


def check(reports: list[dict]) -> None:
    for r in reports:
        assert r["spills"] == 0, f"{r['job']}: {r['spills']} bytes spilled"
        assert not r["serialized"], f"{r['job']}: ptxas serialises wgmma"
        if r["ops"]["wgmma.mma_async"]:
            stated = int(r["job"].rsplit("|", 1)[1])
            assert r["shared"] <= stated <= ARCH.smem, f"{r['job']}: {r['shared']} bytes of shared memory, stated {stated}"
            for op in (r["job"].split(" | ")[0], "m64n8k32.f32.e4m3.e4m3", "cp.async.bulk.tensor"):
                assert r["ops"][op], f"{r['job']}: no {op}"


@pytest.mark.compile
@pytest.mark.parametrize("triton", ["oldest", pytest.param("newest", marks=pytest.mark.slow)])
def test_few(triton: str) -> None:
    reports = compile_jobs("sm90", "tests.kernels.test_gluon_sm90_mx8_bf16_compile:jobs", triton=triton)
    assert len(reports) == 2 * (len(SHAPES) - 2)
    check(reports)


@pytest.mark.compile
@pytest.mark.slow
def test_all() -> None:
    check(compile_jobs("sm90", "tests.kernels.test_gluon_sm90_mx8_bf16_compile:jobs", "all"))
