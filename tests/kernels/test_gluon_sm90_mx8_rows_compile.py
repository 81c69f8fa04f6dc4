"""The Hopper kernel for plain MXFP8 weights with tokens as wgmma's rows compiles: FP8 wgmma as wide as a tile, TMA, no spills, wgmma not
serialised, and the shared memory that the host states is no less than the compiler's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import mx8_rows
from narrowgemm.kernels.launching import with_boxes
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Config, Problem, Step

from .._compile import compile_jobs
from .test_gluon_sm90_mx8_decode_compile import operands, problem

ARCH = get_arch("h200")
# rows, N, K, output; which config, bytes that rows of scales are apart beyond K / 32
FEW = (((64, 9216, 6144, "bf16"), 0, 0), ((40, 768, 6144, "fp32"), -1, 1))


def compile_step(p: Problem, config: Config, x: Operands) -> None:
    for made in mx8_rows.launches(Step(mx8_rows.NAME, config), p, x, None):
        compiled = made.warm()
        with_boxes(compiled, made.boxes)
        check_places(compiled, config)


def check_places(compiled, config: Config) -> None:
    """Boxes are as large as the kernel waits for. It takes descriptors by the numbers of their parameters."""
    assert [m["block_size"] for m in compiled.metadata.tensordesc_meta] == [[1, config.block_n, 128], [1, mx8_rows.TOKENS, 128]]
    ptx = compiled.asm["ptx"]
    assert re.findall(r"\.param \.align 64 \.b8 mx8_rows_kernel_param_(\d+)\[128\]", ptx) == ["0", "7"]
    assert f"m64n{config.block_n}k32.f32.e4m3.e4m3" in ptx


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    for shape, number, off in FEW:
        p = problem(*shape)
        found = mx8_rows.configs(p, ARCH)
        for c in found if which == "all" else [found[number]]:
            yield f"{shape} | {c} | {mx8_rows.smem_bytes(p, c)}", partial(compile_step, p, c, operands(p, off))


def check(reports: list[dict]) -> None:
    for r in reports:
        stated = int(r["job"].rsplit("|", 1)[1])
        assert r["spills"] == 0, f"{r['job']}: {r['spills']} bytes spilled"
        assert not r["serialized"], f"{r['job']}: ptxas serialises wgmma"
        assert r["shared"] <= stated <= ARCH.smem, f"{r['job']}: {r['shared']} bytes of shared memory, stated {stated}"
        assert r["ops"]["cp.async.bulk.tensor"], f"{r['job']}: no TMA"


@pytest.mark.compile
@pytest.mark.parametrize("triton", ["oldest", pytest.param("newest", marks=pytest.mark.slow)])
def test_few(triton: str) -> None:
    reports = compile_jobs("sm90", "tests.kernels.test_gluon_sm90_mx8_rows_compile:jobs", triton=triton)
    assert len(reports) == len(FEW)
    check(reports)


@pytest.mark.compile
@pytest.mark.slow
def test_whole_search_space() -> None:
    check(compile_jobs("sm90", "tests.kernels.test_gluon_sm90_mx8_rows_compile:jobs", "all"))
