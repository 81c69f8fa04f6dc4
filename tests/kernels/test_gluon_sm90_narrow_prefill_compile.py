"""The Hopper prefill kernel for narrow weights compiles: BF16 wgmma with A from registers, no spills, wgmma not serialised, TMA,
no slot given back before it is read, and the shared memory that the host states is no less than the compiler's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, FP8_ROW, FP16, MXFP4, MXFP8, FP8_1x128
from narrowgemm.kernels.gluon.sm90 import narrow_prefill
from narrowgemm.kernels.operands import Operands
from narrowgemm.prepack_bits import FP8_PREPACK, PREPACK
from narrowgemm.problem import Config, Problem, Step

from .._compile import check_slots, compile_jobs
from .test_gluon_sm90_narrow_compile import WHICH, operands, problem

ARCH = get_arch("h200")
# layout, A, B, groups, slots, N, K, pair, activation, combine, factors, most tokens and 64-row units of the tile that `few` compiles
PROBLEMS = (("offsets", BF16, MXFP4, 128, 16384, 5760, 2880, "interleaved", "swiglu_oai", False, False, (128, 1)),
            ("offsets", MXFP8, MXFP8, 128, 4096, 1536, 6144, "halves", "swiglu", False, True, (64, 2)),
            ("offsets", FP16, MXFP4, 256, 32768, 7168, 2048, "", "", True, True, (64, 1)),
            ("dense", MXFP4, MXFP4, 1, 8192, 2304, 6144, "", "", False, False, None),
            ("contiguous", FP8_1x128, MXFP4, 8, 4096, 7168, 2048, "", "", False, False, (128, 1)),
            ("offsets", FP8_1x128, FP8_PREPACK, 256, 8192, 7168, 2048, "", "", False, True, (32, 2)),
            ("offsets", FP8_1x128, FP8_PREPACK, 64, 8192, 4096, 7168, "halves", "swiglu", False, False, None),
            ("masked", FP8_1x128.with_scale("e8m0"), FP8_PREPACK, 8, 128, 7168, 1408, "", "", False, False, (32, 1)),
            ("offsets", FP8_ROW, FP8_PREPACK, 256, 32768, 4096, 7168, "", "", False, False, None),
            ("offsets", FP8_1x128, FP8_PREPACK, 256, 16384, 4096, 7168, "", "", False, True, (96, 1)),
            ("offsets", BF16, FP8_PREPACK, 128, 1024, 5760, 2880, "", "", False, False, (32, 1)),
            ("psum", FP8_1x128, MXFP8, 8, 4096, 2048, 1408, "", "", False, True, None),
            ("masked", BF16, MXFP8, 8, 1600, 7168, 2048, "", "", False, False, None))


# bytes of a tile's state that are kept beyond the registers, by tile: 96x192 of the newest Triton has the most, 464, none of them in one of
# its fifteen loops over K
BEYOND = {"96x192": 464, "160x192": 960, "144x256": 640, "288x128": 640}


def compile_step(p: Problem, config: Config, x: Operands) -> None:
    from narrowgemm.kernels.gluon.sm90 import narrow_prefill_parts_device

    size = narrow_prefill.workspace(p, config)
    work = torch.empty(size, dtype=torch.uint8, device="meta")
    for made in narrow_prefill.launches(Step(narrow_prefill.NAME, config, size), p, x, work):
        compiled = made.warm()
        if config.option("stream") and made.kernel.__name__ == narrow_prefill_parts_device.KERNEL.value:
            maps = re.findall(r"\.param \.align 64 \.b8 narrow_prefill_kernel_param_(\d+)\[128\]", compiled.asm["ptx"])
            assert maps[5] == str(narrow_prefill_parts_device.W_PARAMETER.value), "boxes of weights are asked for by this number"


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': one small tile of some problems; 'some': those of three slots, no power of two; 'all': every config of each."""
    for layout, a, b, groups, slots, n, k, pair, activation, combine, factors, shape in PROBLEMS:
        p = problem(layout, a, MXFP4 if b == FP8_PREPACK else b, groups, slots, n, k, pair, activation, combine)
        x = operands(p, pair, factors)
        if b == FP8_PREPACK:
            p = replace(p, b=replace(p.b, prepack=p.b.prepack.replace(PREPACK, FP8_PREPACK), folds=True))
            x.top = torch.empty((groups, -(-n // 64) * 64), dtype=torch.uint8, device="meta")
        assert narrow_prefill.supports(p, ARCH) is None
        for c in narrow_prefill.configs(p, ARCH):
            if which == "all" or ((c.block_m, c.block_n // 128) == shape and (which == "few" or c.num_stages == 3)):
                stated = narrow_prefill.tile_of(p, c, p.op == "routed_gemm", factors).shared_bytes
                yield f"{layout} {a.name} x {p.b.prepack} {activation} | {c} | {stated}", partial(compile_step, p, c, x)


def check(reports: list[dict], spills: int = 0) -> None:
    for r in reports:
        # three consumers share a block's registers, two of two units each fill them: a tile's state is kept beyond them, in no loop over K
        beyond = max([most for tile, most in BEYOND.items() if f"{tile}x128 " in r["job"]], default=0)
        most = max(spills, beyond) if r["kernel"] == "narrow_prefill_kernel" else 0
        assert r["spills"] <= most, f"{r['job']}: {r['spills']} bytes spilled in {r['kernel']}"
        assert not r["serialized"] and not r["starved"], f"{r['job']}: ptxas serialises wgmma"
        if r["kernel"] != "narrow_prefill_kernel":
            continue
        stated = int(r["job"].rsplit("|", 1)[1])
        assert r["shared"] <= stated <= ARCH.smem, f"{r['job']}: {r['shared']} bytes of shared memory, stated {stated}"
        by_fp8 = FP8_PREPACK in r["job"] and "bf16=1" not in r["job"]
        products = sum(n for op, n in r["ops"].items() if op.endswith("k32.f32.e4m3.e4m3"))     # 288x128 has none of 32 columns
        assert by_fp8 == bool(products), f"{r['job']}: multiplied in {'BF16' if by_fp8 else 'FP8'}"
        for op in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg"):
            assert r["ops"][op], f"{r['job']}: no {op}"
        check_slots(r)


@pytest.mark.compile
@pytest.mark.parametrize("triton, which", WHICH)
def test_small_tiles(triton: str, which: str) -> None:
    reports = compile_jobs("sm90", f"{__name__}:jobs", which, triton=triton, sass=True)
    kernels = [r["kernel"] for r in reports]
    front = kernels.count("narrow_prefill_prep_kernel") + kernels.count("narrow_fp8_front_kernel")
    assert kernels.count("narrow_prefill_kernel") == front == (8 if which == "few" else 3)
    # the newest keeps what is worked out once a tile beyond the registers: 8 loads a K block in one of its loops over K, none in the others
    check(reports, 0 if triton == "oldest" else 256)


@pytest.mark.compile
@pytest.mark.slow
def test_whole_search_space() -> None:
    # a block that finds its entries itself keeps a tile's state beyond the registers: reloaded once a tile, in no loop over K (160x128 has
    # the most; none of its sixteen loops over K has a local load)
    check(compile_jobs("sm90", f"{__name__}:jobs", "all", sass=True), 480)
