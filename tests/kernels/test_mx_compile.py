"""The portable MX kernel compiles for every target: the scaled matrix instruction or conversion that it claims is there, no spills."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch

import narrowgemm as ng
from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, FP16, MXFP4, MXFP8, Format, FP8_1x128
from narrowgemm.kernels.triton import mx
from narrowgemm.problem import Operand, Problem

from .._compile import compile_jobs

PAIRS = ((BF16, MXFP4), (BF16, MXFP8), (MXFP8, MXFP8), (MXFP8, MXFP4), (MXFP4, MXFP4), (FP8_1x128, MXFP4), (FP8_1x128, MXFP8),
         (FP8_1x128.with_scale("e8m0"), MXFP4), (FP16, MXFP4))


def operand(fmt: Format, *shape: int) -> ng.ScaledTensor:
    data = torch.zeros((*shape[:-1], shape[-1] // fmt.elem.per_byte), dtype=fmt.elem.dtype)
    dtype = torch.float32 if fmt.scale == "fp32" else torch.uint8
    return ng.ScaledTensor(data, torch.zeros(fmt.scale_shape(shape), dtype=dtype) if fmt.scaled else None, fmt)


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': the smallest and the largest tile (FP8 1x128 and FP16: the largest); 'all': every config of the search space."""
    arch = get_arch(target)
    for a, b in PAIRS:
        p = Problem("gemm", "dense", 256, 512, 1024, 1, Operand(a, scale_dtype=a.scale if a.scaled else ""),
                    Operand(b, scale_dtype="e8m0"), rows=256)
        if mx.supports(p, arch) is None:
            every = mx.configs(p, arch)
            largest = max(every, key=lambda c: c.block_m * c.block_n)
            for c in every if which == "all" else (largest,) if a.group == (1, 128) or a is FP16 else (every[0], largest):
                yield (f"{a.name} x {b.name} | {c} | {mx.smem_bytes(p, c, arch)}",
                       lambda a=a, b=b, c=c: ng.gemm(operand(a, 256, 1024), operand(b, 512, 1024), backend="triton", config=c))


# CDNA4's scaled product, with operands of four bits (the compiler may swap the two)
FP4_ONE, FP4_BOTH = r"v_mfma_scale\w+ (cbsz|blgp):4$", r"v_mfma_scale\w+ cbsz:4 blgp:4$"
# the scaled product, or what converts in front of a BF16 one, by formats
OPS = {
    "sm90": {f"{a.name} x {b.name}": () for a, b in PAIRS},
    "sm100": {"mxfp4 x mxfp4": ("tcgen05.mma", "block_scale", "kind::mxf4."),
              **{pair: ("tcgen05.mma", "block_scale", "kind::mxf8f6f4") for pair in
                 ("mxfp8 x mxfp8", "mxfp8 x mxfp4", "fp8_1x128 x mxfp4", "fp8_1x128 x mxfp8", "fp8_1x128_ue8m0 x mxfp4")}},
    "gfx942": {"bf16 x mxfp4": (), "bf16 x mxfp8": (), "fp16 x mxfp4": ()},
    "gfx950": {"bf16 x mxfp4": ("v_cvt_scalef32_pk_bf16_fp4",), "fp16 x mxfp4": ("v_cvt_scalef32_pk_bf16_fp4",), "bf16 x mxfp8": ("v_cvt_scalef32_pk_bf16_fp8",),
               "mxfp8 x mxfp8": ("v_mfma_scale",), "mxfp4 x mxfp4": (FP4_BOTH, ), "fp8_1x128 x mxfp8": ("v_mfma_scale",),
               **{pair: (FP4_ONE, ) for pair in ("mxfp8 x mxfp4", "fp8_1x128 x mxfp4", "fp8_1x128_ue8m0 x mxfp4")}},
}


@pytest.mark.compile
@pytest.mark.parametrize("target", OPS)
def test_machine_code(target: str) -> None:
    check(target, compile_jobs(target, "tests.kernels.test_mx_compile:jobs"))


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("target", OPS)
def test_whole_search_space(target: str) -> None:
    check(target, compile_jobs(target, "tests.kernels.test_mx_compile:jobs", "all"))


def check(target: str, reports: list[dict]) -> None:
    seen = {r["job"].split(" | ")[0] for r in reports}
    assert seen >= set(OPS[target]), f"{target}: compiled only {seen}"
    for r in reports:
        pair, _, stated = r["job"].split(" | ")
        # Blackwell's fifth-generation tensor core takes 128 rows of A; fewer go to mma.sync
        wanted = OPS[target].get(pair, ()) if target != "sm100" or r["job"].split(" | ")[1].startswith("128x") else ()
        missing = [op for op in wanted if not any(re.match(op, name) and n for name, n in r["ops"].items())]
        assert not missing, f"{target}, {r['job']}: no {missing} in {r['ops']}"
        assert r["shared"] <= get_arch(target).smem, f"{target}, {r['job']}: {r['shared']} bytes of shared memory"
        assert r["shared"] <= int(stated), f"{target}, {r['job']}: {r['shared']} bytes of shared memory"
        assert r["spills"] == 0, f"{target}, {r['job']}: {r['spills']} bytes spilled"
